//! Machines that are saved and restored on a fake hypervisor, also from a snapshot that somebody
//! has changed.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::*;
use crate::config::{DiskConfig, Transport};
use crate::machine::frozen::FrozenTime;
use crate::machine::show::Shown;
use crate::machine::snapshot::{file_inside, of_machine};
use crate::snapshot::directory::{MEMORY, Snapshot};
use crate::snapshot::file::{self, Section};
use crate::snapshot::testing::{Dice, change, collect};
use crate::snapshot::{RamState, Saved};
use crate::util::Hex;
use crate::vcpu::exits::{Exits, Next};
use crate::vcpu::thread::Parked;

pub(super) const RAM: ByteSize = ByteSize::mib(16);

/// The files of a test: a disk, and a directory with the RAM of a snapshot.
pub(super) struct Files {
    disk: PathBuf,
    pub(super) snapshot: PathBuf,
}

impl Files {
    pub(super) fn new(name: &str) -> Self {
        let disk = file(&format!("{name}-disk"), &[0; 8192]);
        let snapshot = disk.with_extension("snapshot");
        std::fs::create_dir_all(&snapshot).unwrap();
        let memory = File::create(snapshot.join(MEMORY)).unwrap();
        memory.set_len(RAM.bytes()).unwrap();
        Self { disk, snapshot }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.disk);
        let _ = std::fs::remove_dir_all(&self.snapshot);
    }
}

fn record(has_aia: bool) -> Record {
    Record {
        has_aia,
        has_guest_files: has_aia,
        ..Record::default()
    }
}

/// What a paused machine saves.
fn save(machine: &mut Machine) -> Vec<Section> {
    let vcpus = machine.take_vcpus().unwrap();
    let parked: Vec<Parked> = (0..)
        .zip(vcpus)
        .map(|(hart, vcpu)| Parked::of_new(vcpu, hart, false, None))
        .collect();
    let time = FrozenTime::read(parked[0].vcpu.as_ref()).unwrap();
    let id = Hex(vec![7; 16]);
    let mut sections = machine.state(&parked, &time, id, None).unwrap();
    let ram = RamState::unsummed(layout::RAM_BASE, RAM.bytes());
    sections.push(of_machine(Saved::of(&ram)).unwrap());
    sections
}

/// A machine with a disk, and what it saves before its guest runs.
pub(super) fn new(files: &Files, has_aia: bool, transport: Transport) -> Vec<Section> {
    let disk = files.disk.to_str().unwrap().parse().unwrap();
    of_disk(files, disk, has_aia, transport)
}

fn of_disk(files: &Files, disk: DiskConfig, has_aia: bool, transport: Transport) -> Vec<Section> {
    let config = VmConfig {
        disk: vec![disk],
        transport,
        virtio_console: Some(ConsoleConfig::None),
        ..VmConfig::default()
    };
    let name = files.snapshot.file_name().unwrap().to_str().unwrap();
    let (_, _, machine) = build_as(name, record(has_aia), config);
    let mut machine = machine.unwrap();
    machine.hardware().unwrap().devices.pause();
    save(&mut machine)
}

pub(super) fn open(files: &Files, sections: &[Section]) -> Result<SavedMachine> {
    let bytes = file::write(sections)?;
    SavedMachine::of(Snapshot::of(&files.snapshot, &bytes)?)
}

fn restore(files: &Files, has_aia: bool, sections: &[Section]) -> Result<Machine> {
    let saved = open(files, sections)?;
    let (vm, registers) = fake(record(has_aia));
    // The registers that rvmm writes for a kernel.
    for id in [regs::PC, regs::A0, regs::A1, regs::SCOUNTEREN] {
        lock(&registers).insert(id, 0);
    }
    Machine::restore(saved.config().clone(), saved, Arc::new(vm))
}

/// Reads the first registers of all devices, and writes back what was read.
fn use_registers(exits: &Exits) {
    let devices = [
        layout::UART,
        layout::RTC,
        layout::PLIC,
        layout::VIRTIO_MMIO,
        layout::VMGENID,
        layout::PCI_ECAM,
        layout::PCI_WINDOW,
    ];
    for range in devices {
        for offset in (0..0x1000).step_by(4) {
            let gpa = range.start + offset;
            let (read, len) = (VmExit::MmioRead { gpa, len: 4 }, 4);
            let Next::Enter(VmEntry::MmioRead(value)) = exits.handle(read) else {
                panic!("{gpa:#x} was not read");
            };
            let data = value.to_le_bytes();
            let _ = exits.handle(VmExit::MmioWrite { gpa, len, data });
        }
    }
}

const ALL: [(bool, Transport); 4] = [
    (false, Transport::Pci),
    (false, Transport::Mmio),
    (true, Transport::Pci),
    (true, Transport::Mmio),
];

#[test]
fn a_restored_machine_saves_what_it_was_restored_from() {
    for (has_aia, transport) in ALL {
        let files = Files::new(&format!("same-{has_aia}-{transport:?}"));
        let sections = new(&files, has_aia, transport);
        let mut machine = restore(&files, has_aia, &sections).unwrap();
        for (before, after) in sections.iter().zip(save(&mut machine)) {
            // "machine" has the time of the snapshot, and each restore renews "vmgenid".
            if !["machine", "vmgenid"].contains(&before.saved.kind.as_str()) {
                assert_eq!(text(before), text(&after));
            }
        }
    }
}

/// A host without an AIA, and without the disk.
#[test]
fn all_that_is_missing_is_named() {
    let files = Files::new("missing");
    let sections = new(&files, true, Transport::Pci);
    restore(&files, true, &sections).unwrap();
    std::fs::remove_file(&files.disk).unwrap();
    let error = restore(&files, false, &sections).map(drop).unwrap_err();
    let Some(Unfit(lines)) = error.downcast_ref() else {
        panic!("{error:#}");
    };
    let parts = ["missing-disk", "this host has none"];
    assert_eq!(lines.len(), parts.len(), "{lines:#?}");
    for (line, part) in lines.iter().zip(parts) {
        assert!(line.contains(part), "{line}");
    }
    let error = restore(&files, true, &sections).map(drop).unwrap_err();
    assert!(!error.is::<Unfit>(), "one reason is one line: {error:#}");
}

#[test]
fn a_disk_may_have_the_name_of_another_part() {
    let files = Files::new("names");
    for name in ["machine", "vcpu0", "console-uart", "overlay-disk0"] {
        let disk = format!("{},id={name}", files.disk.display());
        let sections = of_disk(&files, disk.parse().unwrap(), false, Transport::Pci);
        restore(&files, false, &sections).unwrap();
    }
}

#[test]
fn a_snapshot_does_not_replace_what_the_machine_uses() {
    let files = Files::new("inside");
    let disk = files.snapshot.join("disk-disk0");
    let config = VmConfig {
        disk: vec![disk.to_str().unwrap().parse().unwrap()],
        ..VmConfig::default()
    };
    assert_eq!(file_inside(&config, &files.snapshot), None);
    File::create(&disk).unwrap();
    assert_eq!(file_inside(&config, &files.snapshot), Some(disk));
    assert_eq!(file_inside(&config, &files.snapshot.join("other")), None);
}

fn text(section: &Section) -> String {
    let Saved { kind, json, .. } = &section.saved;
    let json = String::from_utf8_lossy(json);
    format!("{}, {kind}: {json}", section.id)
}

/// A snapshot with another value somewhere is refused, or gives a machine that works.
#[test]
fn a_changed_snapshot_does_no_harm() {
    const ROUNDS: usize = 100;
    for (has_aia, transport) in ALL {
        let files = Files::new(&format!("changed-{has_aia}-{transport:?}"));
        let sections = new(&files, has_aia, transport);
        let mut dice = Dice::new(11);
        let mut restored = 0;
        for _ in 0..ROUNDS {
            let mut changed = sections.clone();
            let one = dice.below(changed.len());
            change_one(&mut changed[one], &mut dice);
            let Ok(machine) = restore(&files, has_aia, &changed) else {
                continue;
            };
            restored += 1;
            let hardware = machine.hardware().unwrap();
            hardware.devices.resume();
            use_registers(&hardware.exits);
            hardware.devices.pause();
            hardware.devices.save().unwrap();
        }
        assert!(
            (ROUNDS / 20..ROUNDS).contains(&restored),
            "{restored} restored"
        );
    }
}

/// Changes one value in the section.
fn change_one(section: &mut Section, dice: &mut Dice) {
    let mut state: Value = serde_json::from_slice(&section.saved.json).unwrap();
    let mut paths = Vec::new();
    collect(&state, String::new(), &mut paths);
    if !paths.is_empty() {
        let path = &paths[dice.below(paths.len())];
        change(state.pointer_mut(path).unwrap(), dice);
    }
    section.saved.json = serde_json::to_vec(&state).unwrap();
}

/// Whoever wrote the snapshot does not get to the terminal of who looks at it.
#[test]
fn what_is_shown_has_no_control_characters() {
    let files = Files::new("shown");
    let mut sections = new(&files, false, Transport::Pci);
    let header = &mut sections[0].saved;
    let mut state: Value = serde_json::from_slice(&header.json).unwrap();
    state["host_kernel"] = "6.12\u{1b}[2J\n".into();
    state["rvmm"] = "\u{7}1".into();
    state["config"]["cmdline"] = "console=\u{1b}c\u{9b}2J\u{202e}".into();
    header.json = serde_json::to_vec(&state).unwrap();
    let shown = Shown::of(&open(&files, &sections).unwrap()).unwrap();
    let text = shown.to_string();
    assert!(
        text.contains(r"by rvmm \u{7}1 on Linux 6.12\u{1b}[2J\n"),
        "{text}"
    );
    for text in [text, shown.json().unwrap()] {
        let bad = |c: &char| (c.is_control() && *c != '\n') || *c == '\u{202e}';
        assert_eq!(text.chars().filter(bad).count(), 0, "{text:?}");
        assert!(text.contains(r"console=\u001bc\u009b2J\u202e"), "{text:?}");
    }
}

#[test]
fn a_pipe_is_no_snapshot() {
    let files = Files::new("pipe");
    let state = files.snapshot.join("state");
    make_pipe(&state);
    let error = Snapshot::open(&files.snapshot).map(drop).unwrap_err();
    let line = format!("{error:#}");
    assert!(line.ends_with("it is not a regular file"), "{line}");
}

fn make_pipe(path: &Path) {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR, 0).unwrap();
}

/// The fuzz target `snapshot` starts with this state. It gets no further than the versions if they
/// are old.
#[test]
fn the_fuzz_corpus_is_a_snapshot() {
    let lines = include_str!("../../../fuzz/corpus/snapshot/plic-lines").lines();
    let sections: Vec<Section> = lines
        .map(|line| {
            let [id, kind, version, json] = line.splitn(4, ' ').collect::<Vec<_>>()[..] else {
                panic!("{line}");
            };
            let (kind, version, json) = (kind.into(), version.parse().unwrap(), json.into());
            let saved = Saved {
                kind,
                version,
                json,
            };
            Section {
                id: id.into(),
                saved,
            }
        })
        .collect();
    let state = file::write(&sections).unwrap();
    let snapshot = Snapshot::of(Path::new("corpus"), &state).unwrap();
    let machine = SavedMachine::of(snapshot).unwrap();
    assert_eq!(machine.vcpus().len(), 1);
}
