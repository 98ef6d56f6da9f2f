//! Builds a machine: what is created once, and what each reset creates again.

use std::mem::take;
use std::sync::Arc;

use anyhow::{Context, Result};
use vm_memory::GuestAddress;

use super::hardware::{Content, Hardware, Kept};
use super::layout::RAM_BASE;
use super::requirements;
use super::restore::{Restored, SavedMachine};
use super::virtio::{Backends, MakeDevice};
use super::watcher::Watcher;
use crate::boot::plan::BootFiles;
use crate::config::VmConfig;
use crate::devices::console::Console;
use crate::hypervisor::{Hypervisor, Vcpu, Vm};
use crate::memory::{self, GuestMemory};
use crate::report::symbols::{Function, Symbols};
use crate::util::Hex;

const NO_HARDWARE: &str = "the machine has no hardware";

/// A machine that is ready to run its first instruction.
pub struct Machine {
    pub(super) config: VmConfig,
    hypervisor: Arc<dyn Hypervisor>,
    /// None before the first reset of a restored machine: a restore needs no boot files.
    files: Option<BootFiles>,
    pub(super) backends: Backends,
    ram: Arc<GuestMemory>,
    pub(super) console: Arc<Console>,
    /// The kernel's panic(), with `--symbols`.
    panic: Option<Function>,
    /// None only while a reset creates it again, and after power-off.
    hardware: Option<Hardware>,
    /// How the vCPUs of a restored guest go on. None once its first life has begun.
    restored: Option<Restored>,
    /// The id of the snapshot since which the changes of RAM are tracked, if they are.
    pub(super) parent: Option<Hex>,
}

impl Machine {
    /// Builds the machine that `config` describes.
    ///
    /// # Errors
    /// Fails if a file cannot be used, if the host lacks a feature that rvmm needs, or if a call to
    /// KVM or to the host fails.
    pub fn build(config: &VmConfig, hypervisor: Arc<dyn Hypervisor>) -> Result<Self> {
        Self::make(config, hypervisor, None)
    }

    /// Like [`Machine::build`], with one more virtio device of the caller. `device` creates it at
    /// the start and at each reset. It is attached after the devices of `config`.
    ///
    /// # Errors
    /// As [`Machine::build`]. Also fails if `device` fails.
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
        // Before the host's KVM is used.
        let plan = files.plan(config, RAM_BASE)?;
        plan.warn_of_limits(config);
        let backends = Backends::open(config, device)?;
        let vm = hypervisor.create_vm()?;
        let ram = create_ram(config, vm.as_ref())?;
        let mut machine = Self {
            config: config.clone(),
            hypervisor,
            files: None,
            backends,
            ram,
            console: Arc::new(Console::default()),
            panic: None,
            hardware: None,
            restored: None,
            parent: None,
        };
        machine.assemble(&vm, Content::Boot(&files, &plan))?;
        machine.files = Some(files);
        machine.find_panic()?;
        Ok(machine)
    }

    /// Builds the machine that `saved` is the state of. `config` is [`SavedMachine::config`], with
    /// the user's changes: other files for disks, other taps, other consoles.
    ///
    /// # Errors
    /// As [`Machine::build`]. Also fails if this host lacks something that the guest uses
    /// ([`Unfit`](super::Unfit)), or if a part of the machine cannot take its state over.
    pub fn restore(
        config: VmConfig,
        mut saved: SavedMachine,
        hypervisor: Arc<dyn Hypervisor>,
    ) -> Result<Self> {
        let path = saved.snapshot().path().to_owned();
        let failed = || format!("Failed to restore snapshot {path:?}");
        saved.check_whole().with_context(failed)?;
        let machine = Self::of_snapshot(config.clone(), &mut saved, Arc::clone(&hypervisor));
        let machine = machine.map_err(|e| requirements::complete(e, &config, &saved, &hypervisor));
        machine.with_context(failed)
    }

    fn of_snapshot(
        config: VmConfig,
        saved: &mut SavedMachine,
        hypervisor: Arc<dyn Hypervisor>,
    ) -> Result<Self> {
        let backends = Backends::open(&config, None)?;
        saved.load_overlays(&backends.disks)?;
        let vm = hypervisor.create_vm()?;
        let base = GuestAddress(RAM_BASE);
        vm.check_ram(base, config.mem.size)?;
        let ram = saved.open_ram(base, config.mem)?;
        let mut machine = Self {
            config,
            hypervisor,
            files: None,
            backends,
            ram,
            console: Arc::new(Console::default()),
            panic: None,
            hardware: None,
            restored: None,
            parent: None,
        };
        saved.load_consoles(&machine.console, machine.backends.console.as_deref())?;
        machine.assemble(&vm, Content::Snapshot(saved))?;
        let resets_harts = machine.hardware()?.resets_harts;
        machine.restored = Some(saved.finish(resets_harts)?);
        machine.find_panic()?;
        Ok(machine)
    }

    /// Finds the kernel's panic(), if there is `--symbols`.
    fn find_panic(&mut self) -> Result<()> {
        if self.config.symbols.is_some() {
            // They take much memory, so they are read again for each report.
            let symbols = self.symbols()?;
            self.panic = symbols.and_then(|symbols| symbols.function("panic"));
        }
        Ok(())
    }

    /// The flattened device tree that the guest gets. Empty after power-off.
    pub fn device_tree(&self) -> &[u8] {
        let hardware = self.hardware.as_ref();
        hardware.map_or(&[], |hardware| &hardware.device_tree)
    }

    /// Resets the machine, as if power was off for a moment. RAM is zeroed, the console stays, and
    /// all hardware is created again. The vCPUs' threads must have ended.
    ///
    /// # Errors
    /// As [`Machine::build`].
    pub(super) fn reset(&mut self) -> Result<()> {
        // Drop the old VM first: the host may have guest interrupt files for one VM only.
        self.hardware = None;
        // The new VM does not log what its guest writes.
        self.parent = None;
        memory::dirty_log(&self.ram).stop()?;
        memory::clear(&self.ram, self.config.mem)
            .context("Failed to clear guest RAM for a reset")?;
        let files = match self.files.take() {
            Some(files) => files,
            None => BootFiles::open(&self.config).context("Failed to reset a restored guest")?,
        };
        let plan = files.plan(&self.config, RAM_BASE)?;
        let vm = self.hypervisor.create_vm()?;
        self.assemble(&vm, Content::Boot(&files, &plan))?;
        self.files = Some(files);
        Ok(())
    }

    /// Takes the hardware out of the machine. Dropping it ends the devices, after they have
    /// finished the requests that they have begun.
    pub(super) fn power_off(&mut self) -> Option<Hardware> {
        self.hardware.take()
    }

    /// The current hardware.
    ///
    /// # Errors
    /// Fails if the machine is powered off.
    pub(super) fn hardware(&self) -> Result<&Hardware> {
        self.hardware.as_ref().context(NO_HARDWARE)
    }

    /// Takes the vCPUs out of the current hardware, which must be new.
    ///
    /// # Errors
    /// Fails if the machine is powered off.
    pub(super) fn take_vcpus(&mut self) -> Result<Vec<Box<dyn Vcpu>>> {
        let hardware = self.hardware.as_mut().context(NO_HARDWARE)?;
        Ok(take(&mut hardware.vcpus))
    }

    /// How the vCPUs of a restored guest go on, if this is the first life after the restore.
    pub(super) fn take_restored(&mut self) -> Option<Restored> {
        self.restored.take()
    }

    /// Guest RAM.
    pub(super) fn ram(&self) -> &Arc<GuestMemory> {
        &self.ram
    }

    /// The watcher of a life that begins now. None if rvmm is not to look for harts that hang.
    pub(super) fn watcher(&self) -> Option<Watcher> {
        let pause = self.config.on_crash.watch.0?;
        Some(Watcher::new(&self.ram, self.panic.clone(), pause))
    }

    /// The symbols of the kernel: of `--symbols`, or of the kernel's own ELF file. None if there
    /// are none.
    ///
    /// # Errors
    /// Fails if the file of `--symbols` cannot be read or has no symbols.
    pub(super) fn symbols(&self) -> Result<Option<Symbols>> {
        let opened;
        let files = match &self.files {
            Some(files) => files,
            None => {
                opened = BootFiles::open(&self.config)?;
                &opened
            }
        };
        let (path, file) = files.symbols()?;
        if self.config.symbols.is_none() {
            // Only a file that the user has named must have symbols.
            return Ok(Symbols::read_elf(file).ok());
        }
        let symbols = Symbols::read(file).map(Some);
        symbols.with_context(|| format!("Failed to load symbols {path:?}"))
    }

    fn assemble(&mut self, vm: &Arc<dyn Vm>, content: Content) -> Result<()> {
        let kept = Kept {
            config: &self.config,
            backends: &self.backends,
            ram: &self.ram,
            console: &self.console,
        };
        self.hardware = Some(Hardware::assemble(kept, vm, content)?);
        Ok(())
    }
}

fn create_ram(config: &VmConfig, vm: &dyn Vm) -> Result<Arc<GuestMemory>> {
    let base = GuestAddress(RAM_BASE);
    vm.check_ram(base, config.mem.size)?;
    Ok(memory::create(base, config.mem, memory::Backing::Private)?)
}
