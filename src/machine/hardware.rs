//! The part of a machine that a reset creates again: vCPUs, interrupt controller, devices, and the
//! content of RAM.

use std::sync::Arc;

use anyhow::{Context, Result};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::devices::Devices;
use super::harts;
use super::irqchip;
use super::layout;
use super::restore::SavedMachine;
use super::virtio::{self, Backends};
use crate::boot::load;
use crate::boot::placement::Placement;
use crate::boot::plan::{BootFiles, Plan};
use crate::bus::{Bus, Device};
use crate::config::{IrqchipKind, VmConfig};
use crate::devices::console::Console;
use crate::devices::goldfish_rtc::GoldfishRtc;
use crate::devices::sifive_test::{PowerSwitch, SifiveTest};
use crate::devices::uart16550::Uart;
use crate::devices::vmgenid::VmGenId;
use crate::hypervisor::{Vcpu, Vm, regs};
use crate::irqchip::{HartSide, IrqChip};
use crate::memory::GuestMemory;
use crate::trace::Slot;
use crate::vcpu::exits::Exits;
use crate::vcpu::kicked::enter_stopped;
use crate::vcpu::sbi::Sbi;

/// The parts of a machine that survive a reset.
pub(super) struct Kept<'a> {
    pub(super) config: &'a VmConfig,
    pub(super) backends: &'a Backends,
    pub(super) ram: &'a Arc<GuestMemory>,
    pub(super) console: &'a Arc<Console>,
}

/// What the guest finds in RAM and in registers at first.
pub(super) enum Content<'a> {
    /// A kernel that starts.
    Boot(&'a BootFiles, &'a Plan),
    /// What it had when the snapshot was taken. RAM has its content already.
    Snapshot(&'a mut SavedMachine),
}

impl Content<'_> {
    fn is_saved(&self) -> bool {
        matches!(self, Content::Snapshot(_))
    }
}

/// The parts of a machine that each reset creates again, ready to run the first instruction.
pub(super) struct Hardware {
    pub(super) vcpus: Vec<Box<dyn Vcpu>>,
    pub(super) exits: Arc<Exits>,
    /// Whether this host's KVM resets harts and clears their `scounteren` (`vcpu::restart`).
    pub(super) resets_harts: bool,
    pub(super) device_tree: Vec<u8>,
    pub(super) devices: Devices,
    /// Where the boot files were loaded.
    pub(super) placement: Placement,
    pub(super) vm: Arc<dyn Vm>,
    pub(super) hart_side: Arc<dyn HartSide>,
    /// The interrupt controller that the guest has: never `Auto`.
    pub(super) irqchip: IrqchipKind,
    /// Exits are recorded once this has a tracer.
    pub(super) tracer: Slot,
    uart: Arc<Uart>,
    pub(super) rtc: Arc<GoldfishRtc>,
}

impl Hardware {
    /// Creates vCPUs and devices on `vm`, which must be new, and gives them and RAM their content.
    /// After a restore, the devices are paused.
    ///
    /// # Errors
    /// Fails if a file cannot be used, if the host lacks a feature that rvmm or the guest needs, or
    /// if a call to KVM or to the host fails.
    pub(super) fn assemble(kept: Kept, vm: &Arc<dyn Vm>, mut content: Content) -> Result<Self> {
        let Kept {
            config,
            backends,
            ram,
            console,
        } = kept;
        vm.map_ram(ram)?;
        let choice = irqchip::choose(config.irqchip, vm.as_ref(), content.is_saved())?;
        let (kind, is_aia) = (choice.kind(), choice.is_aia());
        let mut vcpus = harts::create(config, vm.as_ref())?;
        let resets_harts = harts::first(&vcpus)?.reg(regs::SCOUNTEREN)? == Some(0);
        harts::check_for_aia(config, is_aia)?;
        let (promise, vectors) = match &mut content {
            Content::Snapshot(saved) => {
                saved.load_vcpus(&vcpus)?;
                (saved.promise()?, saved.vectors()?)
            }
            Content::Boot(..) => (None, None),
        };
        let irqchip = choice.start(vm, &vcpus, promise)?;
        let mut board = Board::new(&irqchip, console)?;
        let place = virtio::Place {
            vm,
            ram,
            irqchip: &irqchip,
            bus: &mut board.bus,
        };
        for device in virtio::attach(backends, config, place, vectors.as_deref())? {
            board.devices.add(device);
        }
        let (device_tree, placement) = match content {
            Content::Boot(files, plan) => {
                let facts = harts::facts(config, &vcpus, is_aia)?;
                let nodes: Vec<&dyn Device> = board.devices.iter().collect();
                let board = load::Board {
                    stdout_path: layout::UART_PATH,
                    hart: &facts,
                    devices: &nodes,
                };
                let tree = files.load(plan, config, ram, &board, harts::first(&vcpus)?)?;
                (tree, plan.placement().clone())
            }
            Content::Snapshot(saved) => {
                board.devices.pause();
                let harts = saved.harts_to_settle(irqchip.hart_side().as_ref())?;
                if !harts.is_empty() {
                    vcpus = enter_stopped(vcpus, harts)?;
                }
                saved.load_devices(&board.devices)?;
                saved.boot(ram)?
            }
        };
        let sbi = Sbi::new(Arc::clone(ram), Arc::clone(console));
        let exits = Exits::new(Arc::new(board.bus), sbi, board.power, irqchip.hart_side());
        Ok(Self {
            vcpus,
            resets_harts,
            exits: Arc::new(exits),
            device_tree,
            devices: board.devices,
            placement,
            vm: Arc::clone(vm),
            hart_side: irqchip.hart_side(),
            irqchip: kind,
            tracer: Arc::clone(&backends.tracer),
            uart: board.uart,
            rtc: board.rtc,
        })
    }

    /// Asks a Linux without a power key to power off, by SysRq on its UART: sync, remount
    /// read-only, power off.
    pub(super) fn sysrq_power_off(&self) {
        self.uart.sysrq(b"suo");
    }

    /// What is at the guest-physical address `gpa`, in words: RAM, registers, or nothing.
    pub(super) fn place(&self, ram: &GuestMemory, gpa: u64) -> String {
        if ram.address_in_range(GuestAddress(gpa)) {
            return match self.placement.file_at(gpa) {
                Some(file) => format!("RAM, where the {file} was loaded"),
                None => "RAM".into(),
            };
        }
        let registers = self.registers_at(gpa);
        registers.map_or_else(|| "nothing".into(), |name| format!("registers of {name}"))
    }

    /// A readable name for the registers that are at `gpa` now.
    pub(super) fn registers_at(&self, gpa: u64) -> Option<String> {
        let by_device = self.devices.registers_at(gpa);
        by_device.or_else(|| layout::owner(gpa).map(Into::into))
    }
}

/// The devices that every machine has.
struct Board {
    bus: Bus,
    devices: Devices,
    power: Arc<PowerSwitch>,
    uart: Arc<Uart>,
    rtc: Arc<GoldfishRtc>,
}

impl Board {
    fn new(irqchip: &IrqChip, console: &Arc<Console>) -> Result<Self> {
        let uart_line = irqchip.line(layout::UART_IRQ);
        let uart = Uart::new(layout::UART.start, uart_line, Arc::clone(console));
        let rtc_line = irqchip.line(layout::RTC_IRQ);
        let rtc = GoldfishRtc::new(layout::RTC.start, rtc_line);
        let rtc = Arc::new(rtc.context("Failed to create the clock's timer")?);
        let vmgenid = VmGenId::new(layout::VMGENID.start, irqchip.line(layout::VMGENID_IRQ));
        let vmgenid = Arc::new(vmgenid.context("Failed to choose a generation ID")?);
        let power = Arc::new(PowerSwitch::default());
        let finisher = SifiveTest::new(layout::SIFIVE_TEST.start, Arc::clone(&power));
        let finisher = Arc::new(finisher);
        let mut bus = Bus::default();
        bus.insert(layout::SIFIVE_TEST, Arc::clone(&finisher) as _)?;
        bus.insert(layout::RTC, Arc::clone(&rtc) as _)?;
        bus.insert(layout::VMGENID, Arc::clone(&vmgenid) as _)?;
        bus.insert(layout::UART, Arc::clone(&uart) as _)?;
        if let Some(registers) = irqchip.mmio() {
            bus.insert(layout::PLIC, registers)?;
        }
        let mut devices = Devices::default();
        devices.add(irqchip.device());
        devices.add(Arc::clone(&uart) as _);
        devices.add(Arc::clone(&rtc) as _);
        devices.add(vmgenid);
        devices.add(finisher);
        Ok(Self {
            bus,
            devices,
            power,
            uart,
            rtc,
        })
    }
}
