//! Builds machines on a fake hypervisor that only records its calls.

mod lives;
mod merged;
mod restored;

use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::config::{IrqchipKind, MemConfig, VmConfig};
use crate::hypervisor::fake::{FakeAia, FakeVcpu, FakeVm, Registers, registers};
use crate::hypervisor::{RegId, SystemEvent, VmEntry, VmExit, regs};
use crate::util::ByteSize;
use crate::util::sync::lock;

/// Properties of a host and its guest.
#[derive(Default)]
struct Record {
    has_aia: bool,
    has_guest_files: bool,
    is_lossy: bool,
    kind: IrqchipKind,
    /// The exits of each life of the guest. After them it requests a reset.
    life: Vec<VmExit>,
    /// Number of resets. The life after them powers off.
    resets: AtomicU32,
}

/// Creates a VM of such a host, and the registers of its vCPUs.
fn fake(record: Record) -> (Arc<FakeVm>, Registers) {
    let registers = registers(&[
        (RegId::isa_ext(5), 1),
        (RegId::isa_ext(14), 1),
        (regs::SATP_MODE, 9),
        (regs::TIMER_FREQUENCY, 10_000_000),
        (regs::SBI_DBCN, 0),
    ]);
    let aia = FakeAia {
        has_guest_files: record.has_guest_files,
        is_lossy: record.is_lossy,
        ..FakeAia::default()
    };
    let (shared, has_aia) = (Arc::clone(&registers), record.has_aia);
    let record = Arc::new(record);
    let vm = FakeVm {
        aia: has_aia.then_some(aia),
        vcpu: Box::new(move |_| FakeVcpu {
            registers: Arc::clone(&shared),
            on_run: live(Arc::clone(&record)),
            ..FakeVcpu::default()
        }),
        ..FakeVm::default()
    };
    (Arc::new(vm), registers)
}

/// Plays one life of the guest.
fn live(record: Arc<Record>) -> Box<dyn FnMut(VmEntry) -> VmExit + Send> {
    let mut done = 0;
    Box::new(move |_| {
        if let Some(exit) = record.life.get(done) {
            done += 1;
            return *exit;
        }
        let left = &record.resets;
        let resets = left.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1));
        VmExit::System(match resets {
            Ok(_) => SystemEvent::Reset { reason: 0 },
            Err(_) => SystemEvent::Shutdown { reason: 0 },
        })
    })
}

/// Creates a file in the temporary directory.
fn file(name: &str, content: &[u8]) -> std::path::PathBuf {
    let path = std::env::temp_dir().join(format!("rvmm-{}-{name}", std::process::id()));
    std::fs::File::create(&path)
        .unwrap()
        .write_all(content)
        .unwrap();
    path
}

fn image() -> Vec<u8> {
    let mut image = vec![0x13; 8192];
    image[..64].fill(0);
    image[8..16].copy_from_slice(&0x20_0000u64.to_le_bytes());
    image[16..24].copy_from_slice(&0x1_0000u64.to_le_bytes());
    image[32..36].copy_from_slice(&2u32.to_le_bytes());
    image[56..60].copy_from_slice(b"RSC\x05");
    image
}

/// The VM, the registers of its vCPUs, and the machine.
type Built = (Arc<FakeVm>, Registers, Result<Machine>);

fn build(name: &str, record: Record) -> Built {
    build_as(name, record, VmConfig::default())
}

/// Like [`build`], with the rest of the configuration from `config`.
fn build_as(name: &str, record: Record, config: VmConfig) -> Built {
    let (kernel, initrd) = (format!("{name}-kernel"), format!("{name}-initrd"));
    let config = VmConfig {
        kernel: Some(file(&kernel, &image())),
        initrd: Some(file(&initrd, b"initrd bytes")),
        mem: MemConfig::new(ByteSize::mib(16)),
        irqchip: record.kind,
        ..config
    };
    let (vm, registers) = fake(record);
    let machine = Machine::build(&config, Arc::new(Arc::clone(&vm)));
    for path in [config.kernel, config.initrd].into_iter().flatten() {
        std::fs::remove_file(path).unwrap();
    }
    (vm, registers, machine)
}

#[test]
fn the_boot_hart_finds_kernel_and_tree() {
    let record = Record {
        has_aia: true,
        has_guest_files: true,
        ..Record::default()
    };
    let (vm, registers, machine) = build("boot", record);
    let machine = machine.unwrap();
    let registers = lock(&registers);
    assert_eq!(registers[&regs::PC], 0x8020_0000);
    assert_eq!(registers[&regs::A0], 0, "hart id");
    assert_eq!(registers[&regs::SCOUNTEREN], 7);
    assert_eq!(registers[&regs::SBI_DBCN], 1);
    assert!(!registers.contains_key(&regs::SBI_VENDOR), "absent here");

    assert_eq!(vm.read(0x8020_0000, 8192), image());
    let tree = vm.read(registers[&regs::A1], machine.device_tree().len());
    assert_eq!(tree, machine.device_tree());
    assert_eq!(tree[..4], [0xd0, 0x0d, 0xfe, 0xed]);
    assert_eq!(vm.read(0x8040_0000, 12), b"initrd bytes");
}

#[test]
fn the_aia_is_set_up_in_kvms_order() {
    let steps = |has_guest_files| {
        let record = Record {
            has_aia: true,
            has_guest_files,
            ..Record::default()
        };
        let (vm, _, machine) = build(&format!("aia-{has_guest_files}"), record);
        machine.unwrap();
        std::mem::take(&mut *lock(&vm.steps))
    };
    let expected = |mode| {
        [
            "AIA",
            "vCPU 0",
            mode,
            "Sources = 63",
            "GuestBits = 0",
            "HartBits = 0",
            "APLIC at 0xd000000",
            "IMSIC 0 at 0x28000000",
            "init",
        ]
    };
    assert_eq!(steps(true), expected("Mode = 2"));
    assert_eq!(steps(false), expected("Mode = 0"));
}

fn contains(tree: &[u8], text: &str) -> bool {
    tree.windows(text.len())
        .any(|bytes| bytes == text.as_bytes())
}

#[test]
fn a_host_without_aia_gets_a_plic() {
    let tree = |name, has_aia, kind| {
        let record = Record {
            has_aia,
            kind,
            ..Record::default()
        };
        build(name, record)
            .2
            .map(|machine| machine.device_tree().to_vec())
    };
    let auto = tree("auto", false, IrqchipKind::Auto).unwrap();
    assert!(contains(&auto, "plic-1.0.0") && !contains(&auto, "imsic"));
    assert!(!contains(&auto, "ssaia"));
    let chosen = tree("plic", true, IrqchipKind::Plic).unwrap();
    assert!(contains(&chosen, "plic-1.0.0") && !contains(&chosen, "ssaia"));
    let aia = tree("aia", true, IrqchipKind::Aia).unwrap();
    assert!(contains(&aia, "imsic") && contains(&aia, "ssaia"));
    // Without Ssaia a guest would not use its AIA.
    for (name, kind, is_built) in [
        ("hidden-aia", IrqchipKind::Auto, false),
        ("hidden-plic", IrqchipKind::Plic, true),
    ] {
        let record = Record {
            has_aia: true,
            kind,
            ..Record::default()
        };
        let config = VmConfig {
            cpu: Some("ssaia=hidden".parse().unwrap()),
            ..VmConfig::default()
        };
        let built = build_as(name, record, config).2;
        assert_eq!(built.is_ok(), is_built, "{name}");
        if let Err(error) = built {
            assert!(format!("{error:#}").contains("--irqchip plic"), "{error:#}");
        }
    }
    for (name, kind) in [
        ("no-aia", IrqchipKind::Aia),
        ("no-emul", IrqchipKind::AiaEmul),
    ] {
        let line = format!("{:#}", tree(name, false, kind).unwrap_err());
        assert!(
            line.contains("no AIA") && line.contains("--irqchip plic"),
            "{line}"
        );
    }
}

/// The interrupt of the generation ID is an edge, where the controller's cells say so.
#[test]
fn the_generation_id_has_an_edge() {
    for (name, has_aia, interrupt) in [
        ("edge-aia", true, &[0x1000u32, 12, 1][..]),
        ("edge-plic", false, &[0x1000, 12]),
    ] {
        let record = Record {
            has_aia,
            ..Record::default()
        };
        let tree = build(name, record).2.unwrap().device_tree().to_vec();
        assert!(contains(&tree, "microsoft,vmgenid"));
        let cells: Vec<u8> = interrupt
            .iter()
            .flat_map(|cell| cell.to_be_bytes())
            .collect();
        let length = u32::try_from(cells.len()).unwrap();
        // A property is its length, the offset of its name, and its value.
        let found = tree.windows(8 + cells.len()).any(|property| {
            property.starts_with(&length.to_be_bytes()) && property.ends_with(&cells)
        });
        assert!(found, "{name}");
    }
}

#[test]
fn a_lossy_imsic_is_offered_fewer_sources() {
    let sources = |name, is_lossy| {
        let record = Record {
            has_aia: true,
            has_guest_files: true,
            is_lossy,
            ..Record::default()
        };
        let (vm, _, machine) = build(name, record);
        let imsics = &vm.aia.as_ref().unwrap().imsics;
        let is_left = lock(imsics).values().any(|value| *value != 0);
        assert!(!is_left, "the probe leaves nothing behind");
        let tree = machine.unwrap().device_tree().to_vec();
        // Only one cell of this tree can have one of these two values.
        let cell = |value: u32| tree.chunks(4).any(|cell| cell == value.to_be_bytes());
        (cell(63), cell(30))
    };
    assert_eq!(sources("whole", false), (true, false));
    assert_eq!(sources("lossy", true), (false, true));
}

#[test]
fn emulation_can_be_asked_for() {
    let record = Record {
        has_aia: true,
        has_guest_files: true,
        kind: IrqchipKind::AiaEmul,
        ..Record::default()
    };
    let (vm, _, machine) = build("emul", record);
    machine.unwrap();
    assert!(lock(&vm.steps).contains(&"Mode = 0".into()));
}
