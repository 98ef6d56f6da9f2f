//! Snapshots that cannot be restored. Each is one line.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::common::disk::{MIB, disk};
use crate::common::freezing::*;
use crate::common::{Rvmm, Shell};

/// Size of the head of `state`, and of the head of each section.
const HEAD: usize = 28;
const SECTION: usize = 80;

/// The sections of a file `state`: id, kind, and where the section is.
fn sections(bytes: &[u8]) -> Vec<(String, String, std::ops::Range<usize>)> {
    let text = |bytes: &[u8]| {
        let end = bytes.iter().position(|byte| *byte == 0).expect("a 0");
        String::from_utf8(bytes[..end].to_vec()).expect("UTF-8")
    };
    let (mut sections, mut at) = (Vec::new(), HEAD);
    while at < bytes.len() {
        let length = bytes[at + 68..at + 76].try_into().expect("8 bytes");
        let length = usize::try_from(u64::from_le_bytes(length)).expect("a size");
        let end = at + SECTION + length;
        let [id, kind] = [0, 32].map(|from| text(&bytes[at + from..at + from + 32]));
        sections.push((id, kind, at..end));
        at = end;
    }
    sections
}

fn frozen() -> (Freezer, std::path::PathBuf) {
    let freezer = Freezer::new();
    let image = freezer.scratch.file("image", vec![0; 4 * MIB]);
    let [flag, value] = disk(&image, "");
    let rvmm = Rvmm::virtio("console=ttyS0 quiet panic=-1 rvmm.action=sh");
    let rvmm = rvmm.args([&flag, &value]).args(freezer.ctl("ctl"));
    let guest = Shell::of(rvmm);
    freezer.freeze("ctl", "snap", &[]);
    kill(guest.vm);
    (freezer, image)
}

#[test]
fn what_cannot_be_restored_is_one_line() {
    let (freezer, image) = frozen();
    let snap = freezer.path("snap");
    let (dir, state) = (text(&snap), snap.join("state"));
    let good = fs::read(&state).expect("the state");
    let says = |what: &str, expected: &str| {
        for words in [["restore", &dir].as_slice(), &["snapshot", "show", &dir]] {
            let lines = refused(words);
            assert_eq!(lines.len(), 1, "{what}: {lines:?}");
            assert!(lines[0].ends_with(expected), "{what}: {lines:?}");
        }
    };
    for (id, kind, place) in sections(&good) {
        let number = 1 + sections(&good)
            .iter()
            .position(|s| s.2 == place)
            .expect("one");
        let mut bad = good.clone();
        // A bit of the section's last byte, which is of its JSON.
        bad[place.end - 1] ^= 0x10;
        fs::write(&state, bad).expect("write");
        let expected = format!("section {number} ({id}, {kind}) is damaged: the checksum is wrong");
        says(&kind, &expected);
    }
    for length in [HEAD, good.len() / 2, good.len() - 1] {
        fs::write(&state, &good[..length]).expect("write");
        let all = good.len();
        says(
            "cut short",
            &format!("it is cut short: it has {length} of {all} bytes"),
        );
    }
    let mut newer = good.clone();
    newer[8] += 1;
    fs::write(&state, newer).expect("write");
    says(
        "newer",
        "it has format version 2, and this rvmm knows only version 1",
    );
    fs::write(&state, b"#!/bin/sh\n").expect("write");
    says("other", "it is not a snapshot of rvmm");
    fs::write(&state, &good).expect("write");

    let restore = |more: &[&str]| refused([&["restore", &dir], more].concat());
    let missing = text(&freezer.path("none.img"));
    let lines = restore(&["--disk", &format!("{missing},id=disk0")]);
    assert!(
        lines[0].contains("none.img") && lines[0].contains("No such file"),
        "{lines:?}"
    );
    let small = freezer.scratch.file("small", vec![0; 2 * MIB]);
    let lines = restore(&["--disk", &format!("{},id=disk0", small.display())]);
    assert!(
        lines[0].contains("disk0") && lines[0].contains("2 MiB"),
        "{lines:?}"
    );
    fs::remove_file(&image).expect("remove");
    let lines = restore(&[]);
    assert!(
        lines[0].contains("image") && lines[0].contains("No such file"),
        "{lines:?}"
    );
    fs::write(&image, vec![0; 4 * MIB]).expect("write");

    damaged_memory(&snap);
    // All files are as they were, and the guest goes on.
    let mut guest = Shell::restored(freezer.thaw("snap").spawn());
    guest.ok("true");
    guest.power_off();
}

/// Bits of RAM are not checked by a restore, only by `verify`. Its size is.
fn damaged_memory(snap: &Path) {
    let (dir, memory) = (text(snap), snap.join("memory"));
    let good = fs::read(&memory).expect("the memory");
    let mut bad = good.clone();
    // The kernel's code.
    bad[(2 << 20) + 4096] ^= 1;
    fs::write(&memory, bad).expect("write");
    let lines = refused(["snapshot", "verify", &dir]);
    assert!(
        lines[0]
            .ends_with("its memory is damaged: the checksum is wrong for the 2 MiB at 0x200000"),
        "{lines:?}"
    );
    fs::write(&memory, &good[..good.len() - 4096]).expect("write");
    for words in [["restore", &dir].as_slice(), &["snapshot", "verify", &dir]] {
        let lines = refused(words);
        assert!(lines[0].contains("bytes, and not "), "{lines:?}");
    }
    fs::remove_file(&memory).expect("remove");
    let lines = refused(["restore", &dir]);
    assert!(
        lines[0].contains("memory") && lines[0].contains("No such file"),
        "{lines:?}"
    );
    fs::write(&memory, good).expect("write");
    printed(["snapshot", "verify", &dir]);
    let shown = printed(["snapshot", "show", "--json", &dir]);
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!(shown["config"]["cpus"], 1);
    assert_eq!(shown["vcpus"][0]["started"], true);
}
