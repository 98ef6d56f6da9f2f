//! The recipe of a machine: what is made once, and what each reset makes anew.

use std::sync::Arc;

use anyhow::{Context, Result};
use vm_memory::GuestAddress;

use super::hardware::{Hardware, Kept};
use super::layout::RAM_BASE;
use super::virtio::{Backends, MakeDevice};
use crate::boot::plan::{BootFiles, Plan};
use crate::config::VmConfig;
use crate::devices::console::Console;
use crate::hypervisor::{Hypervisor, Vm};
use crate::memory::{self, GuestMemory};

/// A machine that is ready to run its first instruction.
pub struct Machine {
    pub(super) config: VmConfig,
    hypervisor: Arc<dyn Hypervisor>,
    files: BootFiles,
    pub(super) backends: Backends,
    ram: Arc<GuestMemory>,
    pub(super) console: Arc<Console>,
    /// Absent only while a reset makes it anew.
    hardware: Option<Hardware>,
}

impl Machine {
    /// Makes the machine that `config` describes.
    ///
    /// # Errors
    /// A file is not what it should be, the host refused something, or lacks what rvmm needs.
    pub fn build(config: &VmConfig, hypervisor: Arc<dyn Hypervisor>) -> Result<Self> {
        Self::make(config, hypervisor, None)
    }

    /// The same with one more virtio device, of the caller's own, made by `device` at the start and
    /// at each reset. It comes behind those of `config`.
    ///
    /// # Errors
    /// As [`Machine::build`], and the device's own.
    pub fn build_with(
        config: &VmConfig,
        hypervisor: Arc<dyn Hypervisor>,
        device: MakeDevice,
    ) -> Result<Self> {
        Self::make(config, hypervisor, Some(device))
    }

    fn make(
        config: &VmConfig,
        hypervisor: Arc<dyn Hypervisor>,
        device: Option<MakeDevice>,
    ) -> Result<Self> {
        let files = BootFiles::open(config)?;
        // Before anything is asked of the host.
        let plan = files.plan(config, RAM_BASE)?;
        plan.warn_of_limits(config);
        let backends = Backends::open(config, device)?;
        let vm = hypervisor.create_vm()?;
        let ram = create_ram(config, vm.as_ref())?;
        let mut machine = Self {
            config: config.clone(),
            hypervisor,
            files,
            backends,
            ram,
            console: Arc::new(Console::default()),
            hardware: None,
        };
        machine.assemble(&vm, &plan)?;
        Ok(machine)
    }

    /// The flattened device tree that the guest gets.
    pub fn device_tree(&self) -> &[u8] {
        let hardware = self.hardware.as_ref();
        hardware.map_or(&[], |hardware| &hardware.device_tree)
    }

    /// Makes the machine anew, as after power was off for a moment: same RAM, zeroed, same console,
    /// everything else as at the start. The vCPUs' threads have ended.
    ///
    /// # Errors
    /// As [`Machine::build`].
    pub(super) fn reset(&mut self) -> Result<()> {
        // First: the host may have guest interrupt files for one VM only.
        self.hardware = None;
        memory::clear(&self.ram, self.config.mem)
            .context("Failed to clear guest RAM for a reset")?;
        let plan = self.files.plan(&self.config, RAM_BASE)?;
        let vm = self.hypervisor.create_vm()?;
        self.assemble(&vm, &plan)
    }

    /// Takes the hardware: dropping it ends the devices, with what they have begun.
    pub(super) fn power_off(&mut self) -> Option<Hardware> {
        self.hardware.take()
    }

    /// What runs now.
    pub(super) fn hardware(&mut self) -> Result<&mut Hardware> {
        self.hardware
            .as_mut()
            .context("the machine has no hardware")
    }

    fn assemble(&mut self, vm: &Arc<dyn Vm>, plan: &Plan) -> Result<()> {
        let kept = Kept {
            config: &self.config,
            files: &self.files,
            backends: &self.backends,
            ram: &self.ram,
            console: &self.console,
        };
        self.hardware = Some(Hardware::assemble(kept, vm, plan)?);
        Ok(())
    }
}

fn create_ram(config: &VmConfig, vm: &dyn Vm) -> Result<Arc<GuestMemory>> {
    let base = GuestAddress(RAM_BASE);
    vm.check_ram(base, config.mem.size)?;
    Ok(memory::create(base, config.mem, memory::Backing::Private)?)
}
