//! Takes snapshots: freezes the machine, and writes its state and its RAM to a directory.
//!
//! ```text
//! --live: copy RAM --> pause --> write state and RAM --> resume --> make it durable, name it
//! ```
//!
//! With `--live` most of RAM is copied before the pause, while the guest runs; only what it changes
//! meanwhile is copied in the pause.

use std::fs::File;
use std::path::{Path, PathBuf, absolute};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use log::{info, warn};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::builder::Machine;
use super::frozen::{Clock, FrozenTime};
use super::life::Vcpus;
use super::names::{CONSOLES, overlay_file, vcpu_id};
use super::virtio::{Disks, disk_copy};
use super::{Running, tracking};
use crate::boot::saved::BootState;
use crate::config::{ConsoleConfig, VmConfig};
use crate::control::{Reply, SnapshotOf, State, Taken, What};
use crate::hypervisor::host::kernel_release;
use crate::memory::{GuestMemory, dirty_log, image};
use crate::snapshot::directory::{MEMORY, NewSnapshot, STATE};
use crate::snapshot::file::Section;
use crate::snapshot::{Header, MACHINE, RamState, SaveError, Saved};
use crate::util::{Hex, random};
use crate::vcpu::saved::VcpuState;
use crate::vcpu::settle::settle;
use crate::vcpu::thread::Parked;

/// The most times that vCPUs go through KVM_RUN because their interrupt controller needs it. Once
/// is enough, unless the host takes a guest interrupt file away meanwhile.
const SETTLE_TRIES: u32 = 10;

/// The reply if there is nothing to freeze.
const STOPPED: &str = "the guest has just stopped by itself: it has powered off, wants a reset, or \
                       cannot go on";

/// A snapshot that is being taken.
struct Taking {
    new: NewSnapshot,
    memory: File,
    /// The other files: overlays and copies of disks.
    others: Vec<File>,
    copies_disks: bool,
    id: Hex,
    what: What,
    /// RAM was copied while the guest ran, and what changes since then is tracked.
    is_copied: bool,
    /// How long the guest was frozen for that.
    frozen: Duration,
    sections: Vec<Section>,
    ram: RamState,
}

impl Running<'_> {
    /// Takes a snapshot. Pauses the guest for it, if it runs.
    ///
    /// # Errors
    /// Fails if the machine cannot go on. That there can be no snapshot is a reply.
    pub(super) fn snapshot(&mut self, of: &SnapshotOf, vcpus: &mut Vcpus) -> Result<Reply> {
        let runs = vcpus.state() == State::Running;
        let taking = match self.begin_snapshot(of, vcpus)? {
            Ok(taking) => taking,
            Err(reply) => {
                self.end_tracking(vcpus)?;
                return Ok(reply);
            }
        };
        let frozen_before = taking.frozen;
        let began = Instant::now();
        self.pause(vcpus)?;
        vcpus.freeze()?;
        if self.main.has_vcpu_stopped() {
            // The main loop handles that next. The guest does not go on before.
            drop(taking);
            self.end_tracking(vcpus)?;
            return Ok(Reply::Refused(STOPPED.into()));
        }
        let written = match self.settle(vcpus)? {
            Ok(time) => self.write(taking, vcpus, &time, &of.dir)?,
            Err(error) => Err(error),
        };
        if runs {
            if let Err(error) = self.go_on(vcpus, Clock::Stop)? {
                self.end_tracking(vcpus)?;
                return Ok(super::command::stays_paused(error));
            }
        }
        let frozen = frozen_before + began.elapsed();
        let disks = self.machine.backends.disks.clone();
        let finish = || written.and_then(|taking| finish(taking, &disks, &of.dir));
        let reply = match self.main.while_serving(finish)? {
            Ok((id, memory)) => {
                if of.what != What::All {
                    self.machine.parent = Some(id);
                }
                info!(
                    "snapshot {:?}: the guest was frozen for {frozen:.1?}",
                    of.dir
                );
                Reply::Snapshot(Taken {
                    frozen_us: u64::try_from(frozen.as_micros()).unwrap_or(u64::MAX),
                    memory,
                })
            }
            Err(error) => refused(&error),
        };
        self.end_tracking(vcpus)?;
        Ok(reply)
    }

    /// Ends the tracking of changes that no later snapshot can use.
    fn end_tracking(&mut self, vcpus: &mut Vcpus) -> Result<()> {
        if self.machine.parent.is_some() || !dirty_log(self.machine.ram()).is_on() {
            return Ok(());
        }
        let runs = vcpus.state() == State::Running;
        // Devices use vhost again after the pause.
        self.pause(vcpus)?;
        if let Err(error) = self.track(false) {
            warn!("{error:#}");
        }
        if runs {
            if let Err(error) = self.go_on(vcpus, Clock::Stop)? {
                super::command::stays_paused(error);
            }
        }
        Ok(())
    }

    /// Prepares the directory. With `--live`, also copies RAM while the guest runs. Returns a reply
    /// if there can be no snapshot.
    ///
    /// # Errors
    /// As [`Running::snapshot`].
    fn begin_snapshot(
        &mut self,
        of: &SnapshotOf,
        vcpus: &mut Vcpus,
    ) -> Result<Result<Taking, Reply>> {
        if let Some(reason) = self.refusal(of) {
            return Ok(Err(Reply::Refused(reason)));
        }
        let mut taking = match self.new_snapshot(of) {
            Ok(taking) => taking,
            Err(error) => return Ok(Err(refused(&error))),
        };
        if !of.live || vcpus.state() != State::Running {
            return Ok(Ok(taking));
        }
        // The devices go on without vhost, whose writes are not tracked.
        let began = Instant::now();
        self.pause(vcpus)?;
        let tracked = self.track(true);
        if let Err(error) = self.go_on(vcpus, Clock::Stop)? {
            return Ok(Err(super::command::stays_paused(error)));
        }
        taking.frozen = began.elapsed();
        let ram = self.machine.ram();
        let copy = || tracked.and_then(|()| copy(ram, &taking.memory, &of.dir));
        let copied = self.main.while_serving(copy)?;
        taking.is_copied = true;
        Ok(match copied {
            Ok(()) => Ok(taking),
            Err(error) => Err(refused(&error)),
        })
    }

    /// Why there can be no such snapshot. None if nothing is against it.
    fn refusal(&self, of: &SnapshotOf) -> Option<String> {
        let (dir, is_tracked) = (&of.dir, self.machine.parent.is_some());
        let reason = match of.what {
            What::Diff if !is_tracked => {
                "there is no snapshot to compare with: take one with --track before"
            }
            What::Diff if of.live => "--diff and --live exclude each other: leave one out",
            What::All if of.live && is_tracked => {
                "the changes of RAM are tracked for --diff, and --live and fork need that for \
                 themselves: leave out --live, or begin again with --track"
            }
            What::Diff if dir.join(STATE).exists() => {
                return Some(format!(
                    "snapshot {dir:?} is there already, and --diff replaces none, because the \
                     changes may be those since that one: choose another name"
                ));
            }
            _ => {
                let file = file_inside(&self.machine.config, dir)?;
                return Some(format!(
                    "snapshot {dir:?} would be replaced, but this machine uses {file:?} in it: \
                     choose another name"
                ));
            }
        };
        Some(reason.into())
    }

    fn new_snapshot(&self, of: &SnapshotOf) -> Result<Taking> {
        let new = NewSnapshot::begin(&of.dir)?;
        let region = self.machine.ram().iter().next();
        let region = region.context("the machine has no RAM")?;
        Ok(Taking {
            memory: new.create(MEMORY)?,
            new,
            others: Vec::new(),
            copies_disks: of.disks,
            id: Hex(random::bytes::<16>()?.into()),
            what: of.what,
            is_copied: false,
            frozen: Duration::ZERO,
            sections: Vec::new(),
            ram: RamState::unsummed(region.start_addr().0, region.len()),
        })
    }

    /// Starts or stops to track the changes of RAM. The machine must be paused. After this, there
    /// can be no diff to an earlier snapshot.
    fn track(&mut self, on: bool) -> Result<()> {
        self.machine.parent = None;
        let vm = self.machine.hardware()?.vm.as_ref();
        let ram = self.machine.ram();
        match on {
            true => tracking::start(vm, ram, self.machine.config.mem.hugepages.is_some()),
            false => tracking::stop(vm, ram),
        }
    }

    /// Makes the registers of the parked vCPUs complete, and returns the guest's time.
    fn settle(&mut self, vcpus: &mut Vcpus) -> Result<Result<FrozenTime>> {
        let hardware = self.machine.hardware()?;
        for _ in 0..SETTLE_TRIES {
            let harts = hardware.hart_side.to_settle_before_save()?;
            let is_last = harts.is_empty();
            let (lent, resets_harts) = (vcpus.lend(), hardware.resets_harts);
            let settled = self
                .main
                .while_serving(|| settle(lent, resets_harts, harts))?;
            // Without its vCPUs the machine cannot go on.
            vcpus.take_back(settled.context("Failed to save the state of the vCPUs")?);
            if is_last {
                break;
            }
        }
        Ok(vcpus.frozen().context("the guest's time is unknown"))
    }

    /// Writes the state and the RAM of the paused machine. The inner result is that of the
    /// snapshot, and the outer one that of the machine.
    fn write(
        &mut self,
        mut taking: Taking,
        vcpus: &Vcpus,
        time: &FrozenTime,
        path: &Path,
    ) -> Result<Result<Taking>> {
        let parent = self.machine.parent.clone();
        let parent = parent.filter(|_| taking.what == What::Diff);
        let id = taking.id.clone();
        let sections = self.machine.state(vcpus.parked(), time, id, parent);
        let vm = Arc::clone(&self.machine.hardware()?.vm);
        let ram = Arc::clone(self.machine.ram());
        let changed = match taking.is_copied || taking.what == What::Diff {
            true => {
                // Nobody else gets the marks that this takes.
                self.machine.parent = None;
                tracking::take(vm.as_ref(), &ram).map(Some)
            }
            false => Ok(None),
        };
        let disks = self.machine.backends.disks.clone();
        let write = || -> Result<Taking> {
            taking.sections = sections?;
            write_disks(&disks, &mut taking)?;
            write_ram(&ram, &mut taking, changed?, path)?;
            Ok(taking)
        };
        let written = self.main.while_serving(write)?;
        let of_all = |taking: &Taking| taking.what == What::All;
        Ok(match written {
            Ok(taking) if of_all(&taking) && taking.is_copied => self.track(false).map(|()| taking),
            Ok(taking) if taking.what == What::Track => self.track(true).map(|()| taking),
            written => written,
        })
    }
}

impl Machine {
    /// The state of all parts of the paused machine but RAM. `id` is that of the snapshot, and
    /// `parent` that of the one since which it has the changes, if it is a diff.
    pub(super) fn state(
        &self,
        vcpus: &[Parked],
        time: &FrozenTime,
        id: Hex,
        parent: Option<Hex>,
    ) -> Result<Vec<Section>> {
        let (time, taken_ns) = time.saved();
        let header = Header {
            rvmm: env!("CARGO_PKG_VERSION").into(),
            host_kernel: kernel_release(),
            id,
            taken_ns,
            parent,
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
        for path in paths(&mut config) {
            *path = absolute(&*path).context("Failed to find the working directory")?;
        }
        config.irqchip = self.hardware()?.irqchip;
        self.backends.pin(&mut config);
        Ok(config)
    }
}

/// The reply that there is no snapshot.
fn refused(error: &anyhow::Error) -> Reply {
    Reply::Refused(format!("{error:#}"))
}

/// The paths of files in `config`.
fn paths(config: &mut VmConfig) -> Vec<&mut PathBuf> {
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
    paths
}

/// A file of the machine that is in the directory `dir`, whose content a new snapshot replaces.
pub(super) fn file_inside(config: &VmConfig, dir: &Path) -> Option<PathBuf> {
    let dir = dir.canonicalize().ok()?;
    let mut config = config.clone();
    let mut paths = paths(&mut config).into_iter();
    let is_inside = |path: &&mut PathBuf| path.canonicalize().is_ok_and(|at| at.starts_with(&dir));
    paths.find(is_inside).cloned()
}

/// A section of the whole machine.
pub(super) fn of_machine(saved: Result<Saved, SaveError>) -> Result<Section> {
    Ok(Section {
        id: MACHINE.into(),
        saved: saved?,
    })
}

/// Copies RAM to `memory` while the guest runs. The copy is wrong where the guest writes meanwhile.
fn copy(ram: &GuestMemory, memory: &File, path: &Path) -> Result<()> {
    let copied = image::save(ram, memory).map(drop);
    copied.with_context(|| format!("Failed to write {:?}", path.join(MEMORY)))
}

/// Writes the RAM of the paused machine: all of it, or the pages that have `changed`.
fn write_ram(
    ram: &GuestMemory,
    taking: &mut Taking,
    changed: Option<Vec<u64>>,
    path: &Path,
) -> Result<()> {
    let failed = || format!("Failed to write {:?}", path.join(MEMORY));
    let RamState { base, size, .. } = taking.ram;
    match changed {
        None => {
            let sums = image::save(ram, &taking.memory).with_context(failed)?;
            taking.ram = RamState::new(base, size, &sums);
        }
        Some(pages) => {
            image::save_marked(ram, &taking.memory, &pages).with_context(failed)?;
            if taking.what == What::Diff {
                taking.ram = taking.ram.clone().with_changes(&pages);
            }
        }
    }
    Ok(())
}

/// Writes the overlays of the paused machine's disks, and copies of the others if they are wanted.
fn write_disks(disks: &Disks, taking: &mut Taking) -> Result<()> {
    for (name, overlay) in disks.overlays() {
        let id = overlay_file(name);
        let file = taking.new.create(&id)?;
        let saved = overlay.save_to(&file);
        let saved = saved.with_context(|| format!("Failed to write the overlay of {name}"))?;
        let saved = Saved::of(&saved)?;
        taking.sections.push(Section { id, saved });
        taking.others.push(file);
    }
    if taking.copies_disks {
        let create = |name: &str| taking.new.create(&disk_copy(name));
        let copies = disks.copy(create)?;
        taking.others.extend(copies);
    }
    Ok(())
}

/// Makes a snapshot durable and gives it its name. Returns its id, and the number of bytes in the
/// file `memory` that are not holes.
fn finish(taking: Taking, disks: &Disks, path: &Path) -> Result<(Hex, u64)> {
    let failed = || format!("Failed to write {:?}", path.join(MEMORY));
    let Taking {
        new,
        memory,
        others,
        id,
        mut sections,
        mut ram,
        ..
    } = taking;
    if !ram.is_summed() {
        let sums = image::sums(&memory, ram.size).with_context(failed)?;
        ram.set_sums(&sums);
    }
    sections.insert(1, of_machine(Saved::of(&ram))?);
    let bytes = image::data_bytes(&memory).with_context(failed)?;
    // The disks on stable storage must not be older than the snapshot.
    disks.sync()?;
    let mut files = others;
    files.push(memory);
    new.finish(&sections, &files)?;
    Ok((id, bytes))
}
