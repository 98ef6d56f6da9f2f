//! The file `state` of a snapshot, from a stranger. It is read or refused, and takes memory in
//! proportion to its length.
//!
//! An input is the file, or text with a section in each line: id, kind, version and state. The
//! latter gets the checksums that the file needs, so that what is behind them is tried too.

use std::path::Path;

use rvmm::machine::SavedMachine;
use rvmm::snapshot::Saved;
use rvmm::snapshot::directory::Snapshot;
use rvmm::snapshot::file::{self, Section};

fuzz_engine::fuzz_target!(|data: &[u8]| {
    read(data);
    let lines = std::str::from_utf8(data).unwrap_or_default().lines();
    let sections: Option<Vec<Section>> = lines.map(section).collect();
    if let Some(Ok(bytes)) = sections.as_ref().map(|sections| file::write(sections)) {
        if let Ok(again) = file::read(&bytes) {
            assert_eq!(Some(again), sections);
        }
        read(&bytes);
    }
});

/// Reads what may be the file `state`.
fn read(bytes: &[u8]) {
    if let Ok(sections) = file::read(bytes) {
        let again = file::write(&sections).expect("what was read can be written");
        assert_eq!(again, bytes);
    }
    let (read, held) = fuzz_engine::most_memory(|| machine(bytes));
    let most = 64 * bytes.len() + (64 << 10);
    assert!(held <= most, "{held} bytes for a file of {}", bytes.len());
    if let Ok(saved) = read {
        let config = saved.config();
        assert_eq!(saved.vcpus().len(), config.cpus as usize);
        assert_eq!(saved.ram().size, config.mem.size.bytes());
    }
}

fn machine(bytes: &[u8]) -> Result<SavedMachine, String> {
    let snapshot = Snapshot::of(Path::new("snapshot"), bytes).map_err(|error| error.to_string())?;
    SavedMachine::of(snapshot).map_err(|error| format!("{error:#}"))
}

/// The section in a line of text.
fn section(line: &str) -> Option<Section> {
    let mut words = line.splitn(4, ' ');
    let mut word = || words.next();
    let (id, kind) = (word()?.into(), word()?.into());
    let (version, json) = (word()?.parse().ok()?, word()?.into());
    let saved = Saved {
        kind,
        version,
        json,
    };
    Some(Section { id, saved })
}
