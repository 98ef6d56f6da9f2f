//! Takes snapshots: freezes the machine, and writes its state and its RAM to a directory.

use std::path::{Path, absolute};
use std::time::Instant;

use anyhow::{Context, Result};
use log::info;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Running;
use super::builder::Machine;
use super::frozen::{Clock, FrozenTime};
use super::life::Vcpus;
use super::restore::{CONSOLES, vcpu_id};
use crate::boot::saved::BootState;
use crate::config::{ConsoleConfig, VmConfig};
use crate::control::{Reply, State, Taken};
use crate::hypervisor::host::kernel_release;
use crate::memory::{GuestMemory, image};
use crate::snapshot::directory::{MEMORY, NewSnapshot};
use crate::snapshot::file::Section;
use crate::snapshot::{Header, MACHINE, RamState, SaveError, Saved};
use crate::util::{Hex, random};
use crate::vcpu::saved::VcpuState;
use crate::vcpu::thread::Parked;

impl Running<'_> {
    /// Takes a snapshot in the directory `path`. Pauses the guest meanwhile, if it runs.
    ///
    /// # Errors
    /// Fails if the machine cannot go on. That there can be no snapshot is a reply.
    pub(super) fn snapshot(&mut self, path: &Path, vcpus: &mut Vcpus) -> Result<Reply> {
        let before = vcpus.state();
        let began = Instant::now();
        self.pause(vcpus)?;
        vcpus.freeze()?;
        let settled = self.settle(vcpus)?;
        let state = settled.and_then(|time| self.machine.state(vcpus.parked(), &time));
        let ram = self.machine.ram();
        let write = || state.and_then(|sections| write(path, ram, sections));
        let written = self.main.while_serving(write)?;
        if before == State::Running {
            if let Err(error) = self.go_on(vcpus, Clock::Stop)? {
                return Ok(super::command::stays_paused(error));
            }
        }
        Ok(match written {
            Ok(memory) => {
                let frozen = began.elapsed();
                info!("snapshot {path:?}: the guest was frozen for {frozen:.1?}");
                Reply::Snapshot(Taken {
                    frozen_us: u64::try_from(frozen.as_micros()).unwrap_or(u64::MAX),
                    memory,
                })
            }
            Err(error) => Reply::Refused(format!("{error:#}")),
        })
    }

    /// Makes the registers of the parked vCPUs complete, and returns the guest's time.
    fn settle(&mut self, vcpus: &mut Vcpus) -> Result<Result<FrozenTime>> {
        let resets_harts = self.machine.hardware()?.resets_harts;
        let lent = vcpus.lend();
        let settled = self
            .main
            .while_serving(|| crate::vcpu::settle::settle(lent, resets_harts))?;
        // Without its vCPUs the machine cannot go on.
        vcpus.take_back(settled.context("Failed to save the state of the vCPUs")?);
        Ok(vcpus.frozen().context("the guest's time is unknown"))
    }
}

impl Machine {
    /// The state of all parts of the paused machine but RAM.
    fn state(&self, vcpus: &[Parked], time: &FrozenTime) -> Result<Vec<Section>> {
        let (time, taken_ns) = time.saved();
        let header = Header {
            rvmm: env!("CARGO_PKG_VERSION").into(),
            host_kernel: kernel_release(),
            id: Hex(random::bytes::<16>()?.into()),
            taken_ns,
            config: self.pinned_config()?,
        };
        let mut sections = vec![
            of_machine(Saved::of(&header))?,
            of_machine(Saved::of(&time))?,
        ];
        let hardware = self.hardware()?;
        let boot = BootState::of(&hardware.device_tree, &hardware.placement);
        sections.push(of_machine(Saved::of(&boot))?);
        for (hart, parked) in vcpus.iter().enumerate() {
            let saved = VcpuState::save(parked).map_err(SaveError::from);
            let saved = saved.and_then(|state| Saved::of(&state));
            let saved = saved.with_context(|| format!("Failed to save vCPU {hart}"))?;
            let id = vcpu_id(hart);
            sections.push(Section { id, saved });
        }
        let consoles = [Some(&self.console), self.backends.console.as_ref()];
        for (console, id) in consoles.into_iter().zip(CONSOLES) {
            let Some(console) = console else { continue };
            let (id, saved) = (id.to_owned(), Saved::of(&console.save())?);
            sections.push(Section { id, saved });
        }
        sections.extend(hardware.devices.save()?);
        Ok(sections)
    }

    /// The configuration for a restore: paths do not depend on the working directory, and what rvmm
    /// has chosen by itself is filled in.
    fn pinned_config(&self) -> Result<VmConfig> {
        let mut config = self.config.clone();
        let files = [&mut config.kernel, &mut config.initrd, &mut config.symbols];
        let mut paths: Vec<_> = files.into_iter().flatten().collect();
        for disk in &mut config.disk {
            paths.push(&mut disk.path);
            paths.extend(&mut disk.snapshot_dir);
        }
        let consoles = [Some(&mut config.console), config.virtio_console.as_mut()];
        for console in consoles.into_iter().flatten() {
            if let ConsoleConfig::File(path) | ConsoleConfig::Socket(path) = console {
                paths.push(path);
            }
        }
        for path in paths {
            *path = absolute(&*path).context("Failed to find the working directory")?;
        }
        config.irqchip = self.hardware()?.irqchip;
        Ok(config)
    }
}

/// A section of the whole machine.
fn of_machine(saved: Result<Saved, SaveError>) -> Result<Section> {
    Ok(Section {
        id: MACHINE.into(),
        saved: saved?,
    })
}

/// Writes the snapshot of a paused machine, of which `sections` are the state. Returns the number
/// of bytes in the file `memory` that are not holes.
fn write(path: &Path, ram: &GuestMemory, mut sections: Vec<Section>) -> Result<u64> {
    let new = NewSnapshot::begin(path)?;
    let memory = new.create(MEMORY)?;
    let failed = || format!("Failed to write {:?}", path.join(MEMORY));
    let region = ram.iter().next().context("the machine has no RAM")?;
    let (base, size) = (region.start_addr().0, region.len());
    let sums = image::save(ram, &memory).with_context(failed)?;
    let ram = RamState::new(base, size, &sums);
    sections.insert(1, of_machine(Saved::of(&ram))?);
    let bytes = image::data_bytes(&memory).with_context(failed)?;
    new.finish(&sections, &[memory])?;
    Ok(bytes)
}
