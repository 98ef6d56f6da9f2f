//! The vCPUs of one life of a machine, running or paused. A life goes from the first instruction to
//! a reset or the end.

use std::collections::BTreeSet;
use std::iter::once;
use std::mem::take;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::frozen::{Clock, FrozenTime};
use super::hardware::Hardware;
use super::layout;
use super::mainloop::{Event, MainLoop, Post};
use super::restore::Restored;
use crate::control::State;
use crate::gdb::plants::Plants;
use crate::gdb::step::Place;
use crate::hypervisor::{self, Vcpu};
use crate::memory::GuestMemory;
use crate::vcpu::stats::ExitStats;
use crate::vcpu::thread::{Parked, Ready, Start, VcpuHandle};

/// The vCPUs of a life, in the order of their harts.
pub(super) struct Vcpus {
    state: State,
    /// Those that have a thread: none if the vCPUs are paused.
    running: Vec<VcpuHandle>,
    /// Those that have no thread.
    parked: Vec<Parked>,
    /// Only this hart runs, and the others wait: a debugger wants it.
    alone: Option<usize>,
    /// Breakpoints, in RAM while vCPUs run.
    plants: Plants,
    /// The guest's time, if the machine is paused.
    frozen: Option<FrozenTime>,
}

impl Vcpus {
    /// Parks `vcpus`, which have not run yet. `resets_harts`: see `vcpu::restart`. If `count`,
    /// their exits are counted.
    pub(super) fn of_new(
        vcpus: Vec<Box<dyn Vcpu>>,
        ram: &Arc<GuestMemory>,
        resets_harts: bool,
        count: bool,
    ) -> Self {
        let registers = layout::PCI_ECAM.start..layout::PCI_WINDOW.end;
        let park = |(hart, vcpu)| {
            let stats = count.then(|| ExitStats::by_page(registers.clone()));
            Parked::of_new(vcpu, hart, resets_harts, stats)
        };
        Self {
            state: State::Paused,
            running: Vec::new(),
            parked: (0u32..).zip(vcpus).map(park).collect(),
            alone: None,
            plants: Plants::new(ram),
            frozen: None,
        }
    }

    /// Lets the vCPUs, which are new, go on as after a restore from a snapshot.
    pub(super) fn restore(&mut self, restored: Restored) {
        for (parked, first) in self.parked.iter_mut().zip(restored.firsts) {
            parked.first = first;
        }
        self.frozen = Some(restored.time);
    }

    /// Stops the guest's time until [`Vcpus::resume`]. The vCPUs must be parked.
    ///
    /// # Errors
    /// Fails if KVM cannot read a register.
    pub(super) fn freeze(&mut self) -> hypervisor::Result<()> {
        let first = self.parked.first().filter(|_| self.frozen.is_none());
        if let Some(parked) = first {
            self.frozen = Some(FrozenTime::read(parked.vcpu.as_ref())?);
        }
        Ok(())
    }

    /// The guest's time, if it is frozen.
    pub(super) fn frozen(&self) -> Option<FrozenTime> {
        self.frozen
    }

    /// Whether the vCPUs run.
    pub(super) fn state(&self) -> State {
        self.state
    }

    /// The handles of running vCPUs; empty if they are paused.
    pub(super) fn running(&self) -> &[VcpuHandle] {
        &self.running
    }

    /// Lets all vCPUs run at the next start, or only that of hart `alone`, with these breakpoints.
    /// The vCPUs must be parked.
    pub(super) fn run_to(&mut self, breakpoints: &BTreeSet<u64>, alone: Option<usize>) {
        debug_assert_eq!(self.state, State::Paused);
        self.alone = alone;
        self.plants.want_everywhere(breakpoints);
    }

    /// Lets only hart `hart` run at the next start, to one of `places`. The vCPUs must be parked.
    pub(super) fn step_to(&mut self, hart: usize, places: Vec<Place>) {
        debug_assert_eq!(self.state, State::Paused);
        self.alone = Some(hart);
        self.plants.want(places);
    }

    /// Whether breakpoints wait for their address to be mapped.
    pub(super) fn wants_plants(&self) -> bool {
        self.state == State::Running && self.plants.are_missing()
    }

    /// Starts a thread for each vCPU of `hardware`. Its devices must be running.
    ///
    /// # Errors
    /// Fails if a thread cannot be started, such as if the host has no resources left. No vCPU has
    /// run then, and all can be started later.
    pub(super) fn start(&mut self, hardware: &Hardware, post: &Post) -> hypervisor::Result<()> {
        self.start_after(hardware, post, || ())
    }

    /// Resumes the devices, then the vCPUs. `clock` says what the guest's time does, if it was
    /// frozen.
    ///
    /// # Errors
    /// As [`Vcpus::start`]. On an error the devices stay paused.
    pub(super) fn resume(
        &mut self,
        hardware: &Hardware,
        post: &Post,
        clock: Clock,
    ) -> hypervisor::Result<()> {
        // The threads are not there yet, so the time goes on a little before a vCPU runs. But only
        // here can the resume still fail.
        self.set_time(clock)?;
        self.start_after(hardware, post, || hardware.devices.resume())?;
        self.frozen = None;
        Ok(())
    }

    /// Lets the guest's time go on, if it was frozen, while the vCPUs stay parked.
    ///
    /// # Errors
    /// Fails if KVM cannot write a register.
    pub(super) fn thaw(&mut self, clock: Clock) -> hypervisor::Result<()> {
        self.set_time(clock)?;
        self.frozen = None;
        Ok(())
    }

    fn set_time(&self, clock: Clock) -> hypervisor::Result<()> {
        match (self.frozen, self.parked.first()) {
            (Some(time), Some(parked)) => time.thaw(parked.vcpu.as_ref(), clock),
            _ => Ok(()),
        }
    }

    /// Makes a thread for each vCPU, calls `first`, and then lets the vCPUs run.
    fn start_after(
        &mut self,
        hardware: &Hardware,
        post: &Post,
        first: impl FnOnce(),
    ) -> hypervisor::Result<()> {
        if self.state == State::Running {
            return Ok(());
        }
        let harts = self.harts_to_run();
        self.plants.plant(&self.parked)?;
        let mut parked = self
            .parked
            .drain(harts.clone())
            .collect::<Vec<_>>()
            .into_iter();
        let mut ready = Vec::new();
        let prepared = harts
            .clone()
            .zip(parked.by_ref())
            .try_for_each(|(hart, vcpu)| {
                // The number of harts is limited to 512.
                let id = u32::try_from(hart).unwrap_or(u32::MAX);
                let (stopped, called) = (post.clone(), post.clone());
                let start = Start {
                    id,
                    on_stop: Box::new(move |end| stopped.send(Event::Vcpu(id, end))),
                    on_call: Box::new(move || called.send(Event::Called)),
                    follow_restarts: hardware.resets_harts,
                    tracer: hardware.tracer.get().cloned(),
                };
                let vcpu = VcpuHandle::prepare(vcpu, Arc::clone(&hardware.exits), start);
                vcpu.map(|vcpu| ready.push(vcpu))
            });
        let Err(failed) = prepared else {
            first();
            self.running = ready.into_iter().map(Ready::go).collect();
            self.state = State::Running;
            return Ok(());
        };
        let (vcpu, error) = failed.into_parts();
        let before = ready.into_iter().map(Ready::cancel);
        let all = before.chain(once(vcpu)).chain(parked);
        self.put_back(all);
        Err(error)
    }

    /// The harts that run at the next start, or run now.
    fn harts_to_run(&self) -> Range<usize> {
        match self.alone {
            Some(hart) => hart..hart + 1,
            None => 0..self.parked.len() + self.running.len(),
        }
    }

    /// Puts vCPUs that have no thread any more in their places.
    fn put_back(&mut self, vcpus: impl Iterator<Item = Parked>) {
        let place = self.alone.unwrap_or(0);
        self.parked.splice(place..place, vcpus);
        self.plants.remove();
    }

    /// Stops all vCPUs. They run no instruction any more, and the results of their last exits are
    /// in their registers. Devices keep running. The main loop handles signals meanwhile, because
    /// this may take long: a vCPU may wait for a device that it resets, and the device for the
    /// host's disk.
    ///
    /// # Errors
    /// Fails if the main loop cannot wait for events, or if a vCPU's thread panicked, which ends
    /// the process.
    pub(super) fn park(&mut self, main: &mut MainLoop) -> Result<()> {
        if self.state() == State::Paused {
            return Ok(());
        }
        main.while_serving(|| self.park_now())?
    }

    fn park_now(&mut self) -> Result<()> {
        let running = take(&mut self.running);
        // Ask all of them first: none should run on while another one's thread ends.
        running.iter().for_each(VcpuHandle::ask_to_stop);
        let parked = running.into_iter().map(VcpuHandle::stop);
        let parked: Option<Vec<_>> = parked.collect();
        self.put_back(parked.context("a vCPU's thread panicked")?.into_iter());
        self.state = State::Paused;
        Ok(())
    }

    /// Lets each `ebreak` of the guest end KVM_RUN, or not. The vCPUs must be parked.
    ///
    /// # Errors
    /// Fails if this host's KVM cannot debug guests.
    pub(super) fn debug(&self, on: bool) -> hypervisor::Result<()> {
        let mut vcpus = self.parked.iter();
        vcpus.try_for_each(|parked| parked.vcpu.set_guest_debug(on))
    }

    /// The vCPUs if they are parked; empty if they run.
    pub(super) fn parked(&self) -> &[Parked] {
        match self.state {
            State::Running => &[],
            State::Paused => &self.parked,
        }
    }

    /// Takes the vCPUs out, for a moment, if they are parked. The result is
    /// empty if they run.
    pub(super) fn lend(&mut self) -> Vec<Parked> {
        match self.state {
            State::Running => Vec::new(),
            State::Paused => take(&mut self.parked),
        }
    }

    /// Takes back what [`Vcpus::lend`] has returned.
    pub(super) fn take_back(&mut self, lent: Vec<Parked>) {
        if self.state == State::Paused {
            self.parked = lent;
        }
    }

    /// The statistics of the vCPUs, which must be parked. Otherwise the result is empty.
    pub(super) fn counted(&self) -> Vec<Option<ExitStats>> {
        self.parked()
            .iter()
            .map(|vcpu| vcpu.stats.clone())
            .collect()
    }
}
