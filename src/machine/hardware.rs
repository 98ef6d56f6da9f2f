//! What a reset makes anew: vCPUs, interrupt controller, devices, and what the guest finds in RAM.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use super::builder::{BootFiles, LoadPlan};
use super::harts;
use super::irqchip;
use super::layout::{self, RAM_BASE};
use super::virtio::{self, Backends};
use crate::boot::fdt::{self, RNG_SEED_SIZE};
use crate::boot::isa::HartFacts;
use crate::boot::placement::Placement;
use crate::bus::{Bus, Device};
use crate::config::VmConfig;
use crate::devices::console::Console;
use crate::devices::goldfish_rtc::GoldfishRtc;
use crate::devices::sifive_test::{PowerSwitch, SifiveTest};
use crate::devices::uart16550::Uart;
use crate::hypervisor::{Vcpu, Vm, regs};
use crate::irqchip::hart_intc_phandle;
use crate::memory::GuestMemory;
use crate::util::{RateLimit, guest_info};
use crate::vcpu::exits::Exits;
use crate::vcpu::restart::CYCLE_TIME_INSTRET;
use crate::vcpu::sbi::Sbi;

/// What outlives a reset.
pub(super) struct Kept<'a> {
    pub(super) config: &'a VmConfig,
    pub(super) files: &'a BootFiles,
    pub(super) backends: &'a Backends,
    pub(super) ram: &'a Arc<GuestMemory>,
    pub(super) console: &'a Arc<Console>,
}

/// The rest of a machine, about to run its first instruction.
pub(super) struct Hardware {
    pub(super) vcpus: Vec<Box<dyn Vcpu>>,
    pub(super) exits: Arc<Exits>,
    /// KVM resets harts so that they lose `scounteren`.
    pub(super) resets_harts: bool,
    pub(super) device_tree: Vec<u8>,
    virtio: Vec<Arc<dyn Device>>,
    uart: Arc<Uart>,
}

impl Hardware {
    /// Puts together a machine on `vm`, which has nothing yet, and loads the guest.
    ///
    /// # Errors
    /// A file is not what it should be, the host refused something, or lacks what rvmm needs.
    pub(super) fn assemble(kept: Kept, vm: &Arc<dyn Vm>, plan: &LoadPlan) -> Result<Self> {
        let Kept {
            config,
            files,
            backends,
            ram,
            console,
        } = kept;
        let placement = &plan.placement;
        vm.map_ram(ram)?;
        let choice = irqchip::choose(config.irqchip, vm.as_ref())?;
        let vcpus = harts::create(config, vm.as_ref())?;
        let resets_harts = harts::first(&vcpus)?.reg(regs::SCOUNTEREN)? == Some(0);
        let facts = harts::facts(config, &vcpus, &choice)?;
        let irqchip = choice.start(vm, &vcpus)?;
        let uart_line = irqchip.line(layout::UART_IRQ);
        let uart = Uart::new(layout::UART.start, uart_line, Arc::clone(console));
        let rtc_line = irqchip.line(layout::RTC_IRQ);
        let rtc = Arc::new(GoldfishRtc::new(layout::RTC.start, rtc_line));
        let power = Arc::new(PowerSwitch::default());
        let finisher = SifiveTest::new(layout::SIFIVE_TEST.start, Arc::clone(&power));
        let finisher = Arc::new(finisher);
        let mut bus = Bus::default();
        bus.insert(layout::SIFIVE_TEST, Arc::clone(&finisher) as _)?;
        bus.insert(layout::RTC, Arc::clone(&rtc) as _)?;
        bus.insert(layout::UART, Arc::clone(&uart) as _)?;
        if let Some(registers) = irqchip.mmio() {
            bus.insert(layout::PLIC, registers)?;
        }
        let virtio = virtio::attach(backends, config, vm, ram, &irqchip, &mut bus)?;
        files.load(ram, plan)?;
        let mut devices: Vec<&dyn Device> = vec![
            irqchip.device(),
            uart.as_ref(),
            rtc.as_ref(),
            finisher.as_ref(),
        ];
        devices.extend(virtio.iter().map(Arc::as_ref));
        let device_tree = build_tree(config, &facts, placement, &devices)?;
        load_tree(ram, placement, &device_tree)?;
        boot_hart(harts::first(&vcpus)?, placement)?;
        let sbi = Sbi::new(Arc::clone(ram), Arc::clone(console));
        let exits = Exits::new(Arc::new(bus), sbi, power, irqchip.hart_side());
        let exits = Arc::new(exits);
        Ok(Self {
            vcpus,
            resets_harts,
            exits,
            device_tree,
            virtio,
            uart,
        })
    }

    /// Asks a Linux without a power key to power off: its disks synced, and read-only from then on.
    pub(super) fn sysrq_power_off(&self) {
        self.uart.sysrq(b"suo");
    }

    /// What people call the registers at `gpa` just now.
    pub(super) fn registers_at(&self, gpa: u64) -> Option<String> {
        let mut devices = self.virtio.iter();
        let by_device = devices.find_map(|device| device.registers_at(gpa));
        by_device.or_else(|| layout::owner(gpa).map(Into::into))
    }
}

fn build_tree(
    config: &VmConfig,
    facts: &HartFacts,
    placement: &Placement,
    devices: &[&dyn Device],
) -> Result<Vec<u8>> {
    guest_info!(
        RateLimit::named("harts"),
        "harts: {}, {}",
        facts.isa_string(),
        facts.mmu_type()
    );
    let tree = fdt::build(&fdt::Machine {
        cmdline: &config.cmdline,
        stdout_path: layout::UART_PATH,
        initrd: placement.initrd.as_ref(),
        rng_seed: rng_seed()?,
        ram_base: RAM_BASE,
        ram_size: config.mem.size,
        hart: facts,
        harts: config.cpus,
        hart_intc_phandle,
        devices,
    });
    tree.map_err(|error| anyhow!("Failed to write the device tree: {error}"))
}

fn rng_seed() -> Result<[u8; RNG_SEED_SIZE]> {
    let mut seed = [0; RNG_SEED_SIZE];
    // Up to 256 bytes come whole once the host's pool is ready (getrandom(2)).
    let count = getrandom(&mut seed, GetRandomFlags::empty());
    match count.context("Failed to read entropy for the guest")? {
        RNG_SEED_SIZE => Ok(seed),
        short => bail!("Failed to read entropy for the guest: {short} bytes came"),
    }
}

fn load_tree(ram: &GuestMemory, placement: &Placement, tree: &[u8]) -> Result<()> {
    let room = placement.fdt.end - placement.fdt.start;
    if tree.len() as u64 > room {
        bail!("the device tree has {} bytes, its room {room}", tree.len());
    }
    ram.write_slice(tree, GuestAddress(placement.fdt.start))
        .context("Failed to write the device tree to guest RAM")
}

/// Sets the boot hart's registers: `Documentation/arch/riscv/boot.rst`, and `scounteren`, which
/// Linux 7.x hosts reset to 0, and which a guest without an SBI PMU never sets although its
/// processes read `time`.
fn boot_hart(vcpu: &dyn Vcpu, placement: &Placement) -> Result<()> {
    const HART_ID: u64 = 0;
    for (register, value) in [
        (regs::PC, placement.entry),
        (regs::A0, HART_ID),
        (regs::A1, placement.fdt.start),
        (regs::SCOUNTEREN, CYCLE_TIME_INSTRET),
    ] {
        vcpu.set_reg(register, value)?;
    }
    Ok(())
}
