//! Loads a guest: writes kernel, initrd and device tree to RAM, and sets the boot hart's initial
//! registers.

use anyhow::{Context, Result, anyhow, bail};
use vm_memory::{Bytes, GuestAddress};

use super::fdt::{self, RNG_SEED_SIZE};
use super::isa::HartFacts;
use super::placement::Placement;
use super::plan::{BootFiles, Plan};
use crate::bus::Device;
use crate::config::VmConfig;
use crate::hypervisor::{Vcpu, regs};
use crate::memory::GuestMemory;
use crate::util::{RateLimit, guest_info, random};

/// The facts for the device tree that are not in the configuration.
pub(crate) struct Board<'a> {
    /// Path of the console's node in the device tree.
    pub(crate) stdout_path: &'a str,
    /// Features of each hart.
    pub(crate) hart: &'a HartFacts,
    /// Devices in `/soc`, in the order of their nodes.
    pub(crate) devices: &'a [&'a dyn Device],
}

impl BootFiles {
    /// Loads kernel and initrd into `ram`, which must be all zeros. Builds the device tree and
    /// writes it to `ram`. Sets the registers of `boot_hart` so that it starts at the kernel's
    /// entry point. Returns the device tree.
    ///
    /// # Errors
    /// Fails if a file cannot be read or has shrunk, if the device tree cannot be built or does not
    /// fit in its place, if the host has no entropy, or if KVM cannot set a register.
    pub(crate) fn load(
        &self,
        plan: &Plan,
        config: &VmConfig,
        ram: &GuestMemory,
        board: &Board,
        boot_hart: &dyn Vcpu,
    ) -> Result<Vec<u8>> {
        self.load_files(plan, ram)?;
        let tree = build_tree(plan, config, board)?;
        load_tree(ram, &plan.placement, &tree)?;
        set_registers(boot_hart, &plan.placement)?;
        Ok(tree)
    }

    fn load_files(&self, plan: &Plan, ram: &GuestMemory) -> Result<()> {
        self.kernel.load_kernel(&plan.kernel, ram, plan.ram_base)?;
        if let (Some(initrd), Some(range)) = (&self.initrd, &plan.placement.initrd) {
            initrd.load(ram, range)?;
        }
        Ok(())
    }
}

fn build_tree(plan: &Plan, config: &VmConfig, board: &Board) -> Result<Vec<u8>> {
    guest_info!(
        RateLimit::named("harts"),
        "harts: {}, {}",
        board.hart.isa_string(),
        board.hart.mmu_type()
    );
    let tree = fdt::build(&fdt::Machine {
        cmdline: &config.cmdline,
        stdout_path: board.stdout_path,
        initrd: plan.placement.initrd.as_ref(),
        rng_seed: rng_seed()?,
        ram_base: plan.ram_base,
        ram_size: config.mem.size,
        hart: board.hart,
        harts: config.cpus,
        devices: board.devices,
    });
    tree.map_err(|error| anyhow!("Failed to write the device tree: {error}"))
}

pub(super) fn rng_seed() -> Result<[u8; RNG_SEED_SIZE]> {
    random::bytes().context("Failed to read entropy for the guest")
}

fn load_tree(ram: &GuestMemory, placement: &Placement, tree: &[u8]) -> Result<()> {
    let room = placement.fdt.end - placement.fdt.start;
    if tree.len() as u64 > room {
        bail!(
            "the device tree has {} bytes, but only {room} are reserved for it",
            tree.len()
        );
    }
    ram.write_slice(tree, GuestAddress(placement.fdt.start))
        .context("Failed to write the device tree to guest RAM")
}

/// Sets the boot hart's registers as `Documentation/arch/riscv/boot.rst` requires. Also sets
/// `scounteren`, because KVM of Linux 7.x resets it to 0: a Linux guest without an SBI PMU never
/// sets it, although its processes read `time`.
fn set_registers(vcpu: &dyn Vcpu, placement: &Placement) -> Result<()> {
    const HART_ID: u64 = 0;
    for (register, value) in [
        (regs::PC, placement.entry),
        (regs::A0, HART_ID),
        (regs::A1, placement.fdt.start),
        (regs::SCOUNTEREN, regs::CYCLE_TIME_INSTRET),
    ] {
        vcpu.set_reg(register, value)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemConfig;
    use crate::memory;
    use crate::util::ByteSize;

    const BASE: u64 = 0x8000_0000;

    #[test]
    fn a_tree_that_leaves_its_room_is_refused() {
        let ram = memory::create(
            GuestAddress(BASE),
            MemConfig::new(ByteSize::mib(1)),
            memory::Backing::Private,
        )
        .unwrap();
        let placement = Placement {
            kernel: BASE..BASE + 0x1000,
            entry: BASE,
            initrd: None,
            fdt: BASE + 0x1000..BASE + 0x1004,
        };
        load_tree(&ram, &placement, b"tree").unwrap();
        let mut loaded = [0; 4];
        ram.read_slice(&mut loaded, GuestAddress(placement.fdt.start))
            .unwrap();
        assert_eq!(&loaded, b"tree");
        let error = load_tree(&ram, &placement, b"trees").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the device tree has 5 bytes, but only 4 are reserved for it"
        );
    }

    #[test]
    fn each_seed_is_another() {
        assert_ne!(rng_seed().unwrap(), rng_seed().unwrap());
    }
}
