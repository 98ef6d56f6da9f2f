//! Restores a machine from a snapshot: reads its state, and gives each part its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::mem::take;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use vm_memory::GuestAddress;

use super::devices::Devices;
use super::frozen::FrozenTime;
use super::names::{CONSOLES, overlay_file, overlay_of, vcpu_id};
use super::virtio::Disks;
use crate::boot::placement::Placement;
use crate::boot::saved::{BootState, renew_seed};
use crate::config::{IrqchipKind, MemConfig, VmConfig};
use crate::devices::console::{Console, ConsoleState};
use crate::hypervisor::{Vcpu, regs};
use crate::irqchip::HartSide;
use crate::irqchip::aia::Promise;
use crate::memory::{GuestMemory, image};
use crate::pci::saved_vectors;
use crate::snapshot::directory::{MEMORY, Snapshot};
use crate::snapshot::{Header, MACHINE, Parts, RamState, Saved, TimeState};
use crate::vcpu::first::First;
use crate::vcpu::saved::VcpuState;

/// The name under which an AIA is saved.
const AIA: &str = "aia";
/// The name under which the PCI bridge is saved.
const PCI: &str = "pci";

/// What a guest needs and this host lacks: one line for each.
#[derive(Debug)]
pub struct Unfit(pub Vec<String>);

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("; "))
    }
}

impl std::error::Error for Unfit {}

/// The state of a machine, read from a snapshot and not yet restored.
pub struct SavedMachine {
    snapshot: Snapshot,
    header: Header,
    time: TimeState,
    ram: RamState,
    boot: BootState,
    vcpus: Vec<VcpuState>,
    /// The state of devices and consoles, by name. Each takes its own out.
    parts: BTreeMap<String, Parts>,
}

/// How the guest goes on after a restore.
pub(super) struct Restored {
    /// The first action of each vCPU's thread, in the order of their harts.
    pub(super) firsts: Vec<First>,
    pub(super) time: FrozenTime,
}

impl SavedMachine {
    /// Reads the state of the snapshot at `path`.
    ///
    /// # Errors
    /// Fails if there is no snapshot, if it is damaged, or if this rvmm does not know its format.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of(Snapshot::open(path)?)
    }

    /// Reads the state in `snapshot`.
    ///
    /// # Errors
    /// Fails if something is missing or is not a state, or if this rvmm does not know its format.
    pub fn of(mut snapshot: Snapshot) -> Result<Self> {
        let path = snapshot.path().to_owned();
        let sections = take(&mut snapshot.sections);
        let mut parts = BTreeMap::<String, Parts>::new();
        for section in sections {
            parts.entry(section.id).or_default().add(section.saved);
        }
        let failed = || format!("Failed to read snapshot {path:?}");
        let mut machine = parts.remove(MACHINE).unwrap_or_default();
        let header: Header = machine.take().with_context(failed)?;
        let time = machine.take().with_context(failed)?;
        let ram: RamState = machine.take().with_context(failed)?;
        let boot = machine.take().with_context(failed)?;
        machine.finish().with_context(failed)?;
        let mut vcpus = Vec::new();
        for hart in 0.. {
            let Some(mut saved) = parts.remove(&vcpu_id(hart)) else {
                break;
            };
            vcpus.push(saved.take().with_context(failed)?);
            saved.finish().with_context(failed)?;
        }
        let config = &header.config;
        let valid = config.validate().map_err(|error| anyhow!(error));
        let valid = valid.and_then(|()| super::harts::check(config).map_err(|line| anyhow!(line)));
        valid.with_context(failed)?;
        if usize::try_from(config.cpus) != Ok(vcpus.len()) {
            bail!(
                "{}: it has {} of {} vCPUs",
                failed(),
                vcpus.len(),
                config.cpus
            );
        }
        if ram.size != config.mem.size.bytes() || ram.base != super::layout::RAM_BASE {
            bail!("{}: its RAM is not that of its configuration", failed());
        }
        Ok(Self {
            snapshot,
            header,
            time,
            ram,
            boot,
            vcpus,
            parts,
        })
    }

    /// The configuration of the machine.
    pub fn config(&self) -> &VmConfig {
        &self.header.config
    }

    /// Which machine it is.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Guest RAM.
    pub fn ram(&self) -> &RamState {
        &self.ram
    }

    /// The vCPUs, in the order of their harts.
    pub fn vcpus(&self) -> &[VcpuState] {
        &self.vcpus
    }

    /// Where the snapshot is.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The names of devices and consoles, and the kinds of their state.
    pub fn parts(&self) -> impl Iterator<Item = (&str, impl Iterator<Item = &Saved>)> {
        let parts = self.parts.iter();
        parts.map(|(id, saved)| (id.as_str(), saved.iter()))
    }

    /// Checks that the snapshot has all of RAM.
    ///
    /// # Errors
    /// Fails if it has only the changes since another one.
    pub(super) fn check_whole(&self) -> Result<()> {
        if self.header.parent.is_some() {
            bail!(
                "it has only changes: make it whole with rvmm snapshot merge --into NEW BASE {:?}",
                self.snapshot.path()
            );
        }
        Ok(())
    }

    /// Maps guest RAM copy-on-write from the snapshot, which is whole.
    ///
    /// # Errors
    /// Fails if the file cannot be mapped.
    pub(super) fn open_ram(
        &self,
        base: GuestAddress,
        config: MemConfig,
    ) -> Result<Arc<GuestMemory>> {
        let file = self.snapshot.file(MEMORY)?;
        Ok(image::open(base, config, file)?)
    }

    /// Gives the consoles their queues.
    pub(super) fn load_consoles(&mut self, uart: &Console, virtio: Option<&Console>) -> Result<()> {
        for (console, id) in [Some(uart), virtio].into_iter().zip(CONSOLES) {
            let Some(console) = console else { continue };
            let mut saved = self.parts.remove(id).unwrap_or_default();
            let loaded = saved.take::<ConsoleState>();
            let loaded = loaded.and_then(|state| console.load(state));
            let loaded = loaded.and_then(|()| saved.finish());
            loaded.with_context(|| format!("Failed to restore {id}"))?;
        }
        Ok(())
    }

    /// Gives the vCPUs, which have never run, their registers.
    pub(super) fn load_vcpus(&self, vcpus: &[Box<dyn Vcpu>]) -> Result<()> {
        let lacks = self.lacks(vcpus)?;
        if !lacks.is_empty() {
            return Err(Unfit(lacks).into());
        }
        // Before the timers: KVM may start one of its own for each, for the time that is left.
        if let Some(vcpu) = vcpus.first() {
            vcpu.set_reg(regs::TIMER_TIME, self.time.time)?;
        }
        for ((hart, vcpu), state) in (0u32..).zip(vcpus).zip(&self.vcpus) {
            let loaded = state.load(vcpu.as_ref(), hart);
            loaded.with_context(|| format!("Failed to restore vCPU {hart}"))?;
        }
        Ok(())
    }

    /// What the guest uses and `vcpus`, which have never run, do not have.
    pub(super) fn lacks(&self, vcpus: &[Box<dyn Vcpu>]) -> Result<Vec<String>> {
        // Most harts lack the same.
        let mut lacks = BTreeSet::new();
        for (vcpu, state) in vcpus.iter().zip(&self.vcpus) {
            lacks.extend(state.fit(vcpu.as_ref())?);
        }
        Ok(lacks.into_iter().collect())
    }

    /// What the guest was told of its AIA, if it has one.
    pub(super) fn promise(&mut self) -> Result<Option<Promise>> {
        if self.header.config.irqchip == IrqchipKind::Plic {
            return Ok(None);
        }
        let promise = Promise::of(self.parts.entry(AIA.into()).or_default());
        promise.map(Some).context("Failed to restore aia")
    }

    /// The number of messages of each device on PCI. None if there is no PCI bus.
    pub(super) fn vectors(&mut self) -> Result<Option<Vec<usize>>> {
        let saved = self.parts.get_mut(PCI).map(saved_vectors);
        saved.transpose().context("Failed to restore pci")
    }

    /// Gives the disks with an overlay what their guest has written.
    pub(super) fn load_overlays(&mut self, disks: &Disks) -> Result<()> {
        for (name, overlay) in disks.overlays() {
            let id = overlay_file(name);
            if !self.parts.contains_key(&id) && !self.had_overlay(name) {
                // The overlay is the user's choice for this restore, and new.
                continue;
            }
            let mut saved = self.parts.remove(&id).unwrap_or_default();
            let failed = || format!("Failed to restore {name}");
            let state = saved.take().with_context(failed)?;
            saved.finish().with_context(failed)?;
            let loaded = overlay.load_from(&self.snapshot.file(&id)?, &state);
            loaded.with_context(failed)?;
        }
        Ok(())
    }

    /// Whether the disk had an overlay when the snapshot was taken.
    fn had_overlay(&self, name: &str) -> bool {
        let mut disks = self.header.config.disk.iter().enumerate();
        disks.any(|(index, disk)| disk.snapshot && disk.name(index) == name)
    }

    /// The harts whose vCPUs must go through KVM_RUN before the devices are loaded: see
    /// [`HartSide::to_settle_before_load`].
    pub(super) fn harts_to_settle(&mut self, irqchip: &dyn HartSide) -> Result<Vec<u32>> {
        let Some(aia) = self.parts.get_mut(AIA) else {
            return Ok(Vec::new());
        };
        let harts = irqchip.to_settle_before_load(aia);
        harts.context("Failed to restore aia")
    }

    /// Gives the devices, which are paused, their state.
    pub(super) fn load_devices(&mut self, devices: &Devices) -> Result<()> {
        devices.load(&mut self.parts)
    }

    /// Gives the guest another `rng-seed` if its kernel has not read the old one. Returns the
    /// device tree, and where the boot files were loaded.
    pub(super) fn boot(&self, ram: &GuestMemory) -> Result<(Vec<u8>, Placement)> {
        let (tree, placement) = self.boot.clone().into_parts();
        renew_seed(ram, &tree, placement.fdt.start)?;
        Ok((tree, placement))
    }

    /// Checks that all state was restored. `resets_harts`: see `vcpu::restart`.
    pub(super) fn finish(&self, resets_harts: bool) -> Result<Restored> {
        if let Some((id, _)) = self.parts.first_key_value() {
            if let Some(disk) = overlay_of(id) {
                bail!("{disk} has snapshot=on in the snapshot: add that to its --disk");
            }
            bail!("the snapshot has state of {id}, which this machine does not have");
        }
        let firsts = self.vcpus.iter().map(|vcpu| vcpu.first(resets_harts));
        Ok(Restored {
            firsts: firsts.collect(),
            time: FrozenTime::of(self.time, self.header.taken_ns),
        })
    }
}
