//! Snapshots on the disk that are merged, verified and shown.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::restored::{Files, RAM, new};
use super::*;
use crate::config::Transport;
use crate::machine::merge::merge;
use crate::machine::show::{Shown, verify};
use crate::memory::image;
use crate::snapshot::directory::{MEMORY, NewSnapshot};
use crate::snapshot::file::Section;
use crate::snapshot::{MACHINE, RamState, Saved, State};
use crate::util::Hex;
use crate::virtio::blk::SavedOverlay;

/// Whole snapshots, and changes since them, of a machine with a disk that has an overlay.
struct Chain {
    files: Files,
    sections: Vec<Section>,
}

/// The disk of [`Files`]: two clusters, and a word of bits.
const OVERLAY: SavedOverlay = SavedOverlay {
    size: 8192,
    clusters: 1,
};

impl Chain {
    fn new(name: &str) -> Self {
        let files = Files::new(name);
        let sections = new(&files, false, Transport::Pci);
        Self { files, sections }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.files.snapshot.join(name)
    }

    /// Writes a snapshot. Its page `id` has the byte `id`.
    fn write(&self, name: &str, id: u8, parent: Option<u8>) -> PathBuf {
        let path = self.path(name);
        let to = NewSnapshot::begin(&path).unwrap();
        let memory = to.create(MEMORY).unwrap();
        memory.set_len(RAM.bytes()).unwrap();
        memory
            .write_all_at(&[id; 4096], u64::from(id) * 4096)
            .unwrap();
        let sums = image::sums(&memory, RAM.bytes()).unwrap();
        let mut ram = RamState::new(layout::RAM_BASE, RAM.bytes(), &sums);
        if parent.is_some() {
            ram = ram.with_changes(&[1 << id]);
        }
        let overlay = to.create("overlay-disk0").unwrap();
        overlay.set_len(8192 + 8).unwrap();
        overlay.write_all_at(&[id; 4096], 4096).unwrap();
        overlay.write_all_at(&[2], 8192).unwrap();
        let copy = to.create("disk-disk0").unwrap();
        copy.write_all_at(&[id; 8192], 0).unwrap();
        let mut sections = self.sections.clone();
        for section in &mut sections {
            match (section.id.as_str(), section.saved.kind.as_str()) {
                (MACHINE, "machine") => edit(section, |state| {
                    state["id"] = String::from(Hex(vec![id; 16])).into();
                    state["parent"] = parent.map(|id| String::from(Hex(vec![id; 16]))).into();
                    state["config"]["disk"][0]["snapshot"] = true.into();
                }),
                (MACHINE, RamState::KIND) => section.saved = Saved::of(&ram).unwrap(),
                _ => {}
            }
        }
        let (id, saved) = ("overlay-disk0".into(), Saved::of(&OVERLAY).unwrap());
        sections.push(Section { id, saved });
        to.finish(&sections, &[memory, overlay, copy]).unwrap();
        path
    }
}

fn edit(section: &mut Section, change: impl Fn(&mut Value)) {
    let mut state: Value = serde_json::from_slice(&section.saved.json).unwrap();
    change(&mut state);
    section.saved.json = serde_json::to_vec(&state).unwrap();
}

fn verified(path: &Path) -> Result<String> {
    verify(&SavedMachine::open(path)?)
}

fn damage(path: &Path, at: u64) {
    let file: File = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(b"X", at).unwrap();
}

fn line<T>(result: Result<T>) -> String {
    format!("{:#}", result.err().unwrap())
}

#[test]
fn a_merged_snapshot_has_all_files() {
    let chain = Chain::new("merged");
    let paths = [chain.write("one", 1, None), chain.write("two", 2, Some(1))];
    let into = chain.path("all");
    merge(&paths, &into).unwrap();
    let text = verified(&into).unwrap();
    assert!(
        text.starts_with("the snapshot is whole: 8 KiB of memory"),
        "{text}"
    );
    for name in ["overlay-disk0", "disk-disk0"] {
        let [merged, last] = [&into, &paths[1]].map(|path| fs::read(path.join(name)).unwrap());
        assert!(merged == last, "{name}");
        assert!(text.contains(&format!("{name}: ")), "{text}");
    }
}

#[test]
fn a_damaged_snapshot_is_not_merged() {
    for bad in ["one", "two"] {
        let chain = Chain::new(&format!("damaged-{bad}"));
        let paths = [chain.write("one", 1, None), chain.write("two", 2, Some(1))];
        damage(&chain.path(bad).join(MEMORY), 3 * 4096);
        let line = line(merge(&paths, &chain.path("all")));
        assert!(
            line.contains(&format!("{bad}\": its memory is damaged")),
            "{line}"
        );
        assert!(!chain.path("all").exists());
    }
}

#[test]
fn the_files_of_disks_are_verified() {
    let chain = Chain::new("disks");
    let path = chain.write("one", 1, None);
    let overlay = path.join("overlay-disk0");
    damage(&overlay, 8192);
    let found = line(verified(&path));
    assert!(
        found.contains("has 3 clusters, and 1 are expected"),
        "{found}"
    );
    fs::write(&overlay, "short").unwrap();
    let found = line(verified(&path));
    assert!(
        found.contains("has 5 bytes, and 8200 are expected"),
        "{found}"
    );
    fs::remove_file(&overlay).unwrap();
    assert!(line(verified(&path)).contains("overlay-disk0"));
    let path = chain.write("two", 2, None);
    fs::write(path.join("disk-disk0"), "short").unwrap();
    let found = line(verified(&path));
    assert!(
        found.contains("is cut short: it has 5 of 8192 bytes"),
        "{found}"
    );
}

/// The machine has another device with the name of its disk.
#[test]
fn a_numbered_disk_is_verified() {
    let mut chain = Chain::new("numbered");
    for section in &mut chain.sections {
        if section.id == "disk0" {
            section.id.push_str("-2");
        }
    }
    let path = chain.write("one", 1, None);
    assert!(verified(&path).unwrap().contains("disk-disk0: "));
    fs::write(path.join("disk-disk0"), "short").unwrap();
    let found = line(verified(&path));
    assert!(found.contains("it has 5 of 8192 bytes"), "{found}");
}

#[test]
fn changes_are_called_so() {
    let chain = Chain::new("changes");
    let path = chain.write("two", 2, Some(1));
    let parent = "01".repeat(16);
    let text = verified(&path).unwrap();
    let expected = format!("not checked: snapshot {parent}");
    assert!(text.starts_with("the changes are whole: 4 KiB"), "{text}");
    assert!(text.contains(&expected), "{text}");
    let shown = Shown::of(&SavedMachine::open(&path).unwrap()).unwrap();
    let text = shown.to_string();
    assert!(
        text.contains(&format!("changes since {parent}\n")),
        "{text}"
    );
    let ram = "RAM: 16 MiB, of which 4 KiB have changed since then\n";
    assert!(text.contains(ram), "{text}");
    let json: Value = serde_json::from_str(&shown.json().unwrap()).unwrap();
    assert_eq!(json["parent"], parent);
    assert_eq!(json["memory"], 4096);
}
