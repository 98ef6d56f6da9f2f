//! The recipe, on a hypervisor that only keeps what it was told.

mod lives;

use std::collections::HashMap;
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::config::{IrqchipKind, MemConfig, VmConfig};
use crate::hypervisor::{
    self, Aia, AiaConfig, Counter, Doorbell, ExternalIrq, HartState, Hypervisor, Kicker,
    MsiMessage, RegId, Result as HvResult, SystemEvent, Vcpu, Vm, VmEntry, VmExit, Waiting, regs,
};
use crate::memory::GuestMemory;
use crate::util::ByteSize;
use crate::util::sync::lock;

/// What the fakes were told, shared by all of them.
#[derive(Default)]
struct Record {
    ram: Mutex<Option<Arc<GuestMemory>>>,
    registers: Mutex<HashMap<RegId, u64>>,
    steps: Mutex<Vec<String>>,
    has_aia: bool,
    has_guest_files: bool,
    is_lossy: bool,
    kind: IrqchipKind,
    eie0: Mutex<u64>,
    /// The exits of each life of the guest's, which then asks for a reset,
    life: Vec<VmExit>,
    /// so often; the next life powers off.
    resets: AtomicU32,
}

impl Record {
    fn step(&self, step: impl Into<String>) -> HvResult<()> {
        lock(&self.steps).push(step.into());
        Ok(())
    }
}

#[derive(Clone)]
struct Fake(Arc<Record>);

impl Hypervisor for Fake {
    fn capabilities(&self) -> Vec<(&'static str, i32)> {
        Vec::new()
    }
    fn create_vm(&self) -> HvResult<Arc<dyn Vm>> {
        Ok(Arc::new(self.clone()))
    }
}

impl Vm for Fake {
    fn check_ram(&self, _: GuestAddress, _: ByteSize) -> HvResult<()> {
        Ok(())
    }
    fn gpa_bits(&self) -> u32 {
        59
    }
    fn max_vcpus(&self) -> u32 {
        8
    }
    fn map_ram(&self, ram: Arc<GuestMemory>) -> HvResult<()> {
        *lock(&self.0.ram) = Some(ram);
        Ok(())
    }
    fn create_vcpu(&self, id: u32) -> HvResult<Box<dyn Vcpu>> {
        self.0.step(format!("vCPU {id}"))?;
        Ok(Box::new(FakeVcpu {
            record: Arc::clone(&self.0),
            done: 0,
        }))
    }
    fn create_aia(&self) -> HvResult<Option<Box<dyn Aia>>> {
        self.0.step("AIA")?;
        Ok(self.0.has_aia.then(|| Box::new(self.clone()) as _))
    }
    fn set_irq_line(&self, _: u32, _: bool) -> HvResult<()> {
        Ok(())
    }
    fn connect_doorbell(&self, _: Doorbell, _: &EventFd) -> HvResult<()> {
        Ok(())
    }
    fn disconnect_doorbell(&self, _: Doorbell, _: &EventFd) -> HvResult<()> {
        Ok(())
    }
    fn connect_irqfd(&self, _: u32, _: &EventFd) -> HvResult<()> {
        Ok(())
    }
    fn disconnect_irqfd(&self, _: u32, _: &EventFd) -> HvResult<()> {
        Ok(())
    }
    fn set_msi_routes(&self, _: &[(u32, MsiMessage)]) -> HvResult<()> {
        Ok(())
    }
}

impl Aia for Fake {
    fn set_config(&self, attr: AiaConfig, value: u32) -> HvResult<()> {
        if attr == AiaConfig::Mode && value == 2 && !self.0.has_guest_files {
            let invalid = std::io::Error::from_raw_os_error(22);
            return Err(hypervisor::Error::refused("set the mode", invalid));
        }
        self.0.step(format!("{attr:?} = {value}"))
    }
    fn config(&self, _: AiaConfig) -> HvResult<u32> {
        Ok(255)
    }
    fn place_aplic(&self, base: GuestAddress) -> HvResult<()> {
        self.0.step(format!("APLIC at {:#x}", base.0))
    }
    fn place_imsic(&self, index: u32, base: GuestAddress) -> HvResult<()> {
        self.0.step(format!("IMSIC {index} at {:#x}", base.0))
    }
    fn init(&self) -> HvResult<()> {
        self.0.step("init")
    }
    fn imsic(&self, _: u32, _: u64) -> HvResult<u64> {
        Ok(*lock(&self.0.eie0))
    }
    fn set_imsic(&self, _: u32, _: u64, value: u64) -> HvResult<()> {
        let kept = if self.0.is_lossy {
            value & 0xffff_ffff
        } else {
            value
        };
        *lock(&self.0.eie0) = kept;
        Ok(())
    }
}

/// A hart's external interrupt, to nowhere.
struct Wire;

impl ExternalIrq for Wire {
    fn set_external(&self, _: bool) -> HvResult<()> {
        Ok(())
    }
}

struct FakeVcpu {
    record: Arc<Record>,
    /// Exits of its life that are over.
    done: usize,
}

struct Unkicked;

impl Kicker for Unkicked {
    fn set_immediate_exit(&self, _: bool) {}
}

impl Vcpu for FakeVcpu {
    fn run(&mut self, _: VmEntry) -> HvResult<VmExit> {
        if let Some(exit) = self.record.life.get(self.done) {
            self.done += 1;
            return Ok(*exit);
        }
        let left = &self.record.resets;
        let resets = left.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1));
        Ok(VmExit::System(match resets {
            Ok(_) => SystemEvent::Reset { reason: 0 },
            Err(_) => SystemEvent::Shutdown { reason: 0 },
        }))
    }
    fn complete(&mut self, _: VmEntry) -> HvResult<()> {
        Ok(())
    }
    fn reg(&self, id: RegId) -> HvResult<Option<u64>> {
        let isa_i = RegId::isa_ext(5);
        let known = HashMap::from([
            (isa_i, 1),
            (RegId::isa_ext(14), 1),
            (regs::SATP_MODE, 9),
            (regs::TIMER_FREQUENCY, 10_000_000),
            (regs::SBI_DBCN, 0),
        ]);
        Ok(known.get(&id).copied())
    }
    fn set_reg(&self, id: RegId, value: u64) -> HvResult<()> {
        lock(&self.record.registers).insert(id, value);
        Ok(())
    }
    fn external_irq(&self) -> HvResult<Arc<dyn ExternalIrq>> {
        Ok(Arc::new(Wire))
    }
    fn hart_state(&self) -> HvResult<HartState> {
        Ok(HartState::Started)
    }
    fn set_hart_state(&self, _: HartState) -> HvResult<()> {
        Ok(())
    }
    fn waiting(&self) -> HvResult<Box<dyn Waiting>> {
        unreachable!("is not looked at")
    }
    fn counters(&self) -> HvResult<Vec<Counter>> {
        Ok(Vec::new())
    }
    fn kicker(&self) -> HvResult<Box<dyn Kicker>> {
        Ok(Box::new(Unkicked))
    }
}

/// A file below the test's own directory.
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

fn build(name: &str, record: Record) -> (Arc<Record>, Result<Machine>) {
    build_as(name, record, VmConfig::default())
}

/// The same with what else `config` asks for.
fn build_as(name: &str, record: Record, config: VmConfig) -> (Arc<Record>, Result<Machine>) {
    let (kernel, initrd) = (format!("{name}-kernel"), format!("{name}-initrd"));
    let config = VmConfig {
        kernel: Some(file(&kernel, &image())),
        initrd: Some(file(&initrd, b"initrd bytes")),
        mem: MemConfig::new(ByteSize::mib(16)),
        irqchip: record.kind,
        ..config
    };
    let fake = Fake(Arc::new(record));
    let machine = Machine::build(&config, Arc::new(fake.clone()));
    for path in [config.kernel, config.initrd].into_iter().flatten() {
        std::fs::remove_file(path).unwrap();
    }
    (fake.0, machine)
}

#[test]
fn the_boot_hart_finds_kernel_and_tree() {
    let record = Record {
        has_aia: true,
        has_guest_files: true,
        ..Record::default()
    };
    let (record, machine) = build("boot", record);
    let machine = machine.unwrap();
    let registers = lock(&record.registers);
    let ram = lock(&record.ram).clone().unwrap();
    assert_eq!(registers[&regs::PC], 0x8020_0000);
    assert_eq!(registers[&regs::A0], 0, "hart id");
    assert_eq!(registers[&regs::SCOUNTEREN], 7);
    assert_eq!(registers[&regs::SBI_DBCN], 1);
    assert!(!registers.contains_key(&regs::SBI_VENDOR), "absent here");

    let mut kernel = vec![0; 8192];
    ram.read_slice(&mut kernel, GuestAddress(0x8020_0000))
        .unwrap();
    assert_eq!(kernel, image());
    let mut tree = vec![0; machine.device_tree().len()];
    ram.read_slice(&mut tree, GuestAddress(registers[&regs::A1]))
        .unwrap();
    assert_eq!(tree, machine.device_tree());
    assert_eq!(tree[..4], [0xd0, 0x0d, 0xfe, 0xed]);
    let mut initrd = [0; 12];
    ram.read_slice(&mut initrd, GuestAddress(0x8040_0000))
        .unwrap();
    assert_eq!(&initrd, b"initrd bytes");
}

#[test]
fn the_aia_is_set_up_in_kvms_order() {
    let steps = |has_guest_files| {
        let record = Record {
            has_aia: true,
            has_guest_files,
            ..Record::default()
        };
        let (record, machine) = build(&format!("aia-{has_guest_files}"), record);
        machine.unwrap();
        std::mem::take(&mut *lock(&record.steps))
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
            .1
            .map(|machine| machine.device_tree().to_vec())
    };
    let auto = tree("auto", false, IrqchipKind::Auto).unwrap();
    assert!(contains(&auto, "plic-1.0.0") && !contains(&auto, "imsic"));
    assert!(!contains(&auto, "ssaia"));
    let chosen = tree("plic", true, IrqchipKind::Plic).unwrap();
    assert!(contains(&chosen, "plic-1.0.0") && !contains(&chosen, "ssaia"));
    let aia = tree("aia", true, IrqchipKind::Aia).unwrap();
    assert!(contains(&aia, "imsic") && contains(&aia, "ssaia"));
    // Without ssaia a guest would not find the AIA that it has.
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
        let built = build_as(name, record, config).1;
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

#[test]
fn a_lossy_imsic_is_offered_fewer_sources() {
    let sources = |name, is_lossy| {
        let record = Record {
            has_aia: true,
            has_guest_files: true,
            is_lossy,
            ..Record::default()
        };
        let (record, machine) = build(name, record);
        assert_eq!(*lock(&record.eie0), 0, "the probe leaves nothing behind");
        let tree = machine.unwrap().device_tree().to_vec();
        // No other cell of this tree has one of these two values.
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
    let (record, machine) = build("emul", record);
    machine.unwrap();
    assert!(lock(&record.steps).contains(&"Mode = 0".into()));
}
