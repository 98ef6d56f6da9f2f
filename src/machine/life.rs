//! The vCPUs of one life of a machine, running or paused. A life goes from the first instruction to
//! a reset or the end.

use std::iter::once;
use std::mem::take;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::hardware::Hardware;
use super::layout;
use super::mainloop::{Event, MainLoop, Post};
use crate::control::State;
use crate::hypervisor::{self, Vcpu};
use crate::vcpu::stats::ExitStats;
use crate::vcpu::thread::{Parked, Ready, Start, VcpuHandle};

/// The vCPUs of a life, in the order of their harts.
pub(super) enum Vcpus {
    /// Each vCPU has a thread.
    Running(Vec<VcpuHandle>),
    /// No vCPU has a thread.
    Paused(Vec<Parked>),
}

impl Vcpus {
    /// Parks `vcpus`, which have not run yet. `resets_harts`: see `vcpu::restart`. If `count`,
    /// their exits are counted.
    pub(super) fn of_new(vcpus: Vec<Box<dyn Vcpu>>, resets_harts: bool, count: bool) -> Self {
        let registers = layout::PCI_ECAM.start..layout::PCI_WINDOW.end;
        let park = |(hart, vcpu)| {
            let stats = count.then(|| ExitStats::by_page(registers.clone()));
            Parked::of_new(vcpu, hart, resets_harts, stats)
        };
        Vcpus::Paused((0u32..).zip(vcpus).map(park).collect())
    }

    /// Whether the vCPUs run.
    pub(super) fn state(&self) -> State {
        match self {
            Vcpus::Running(_) => State::Running,
            Vcpus::Paused(_) => State::Paused,
        }
    }

    /// The handles of running vCPUs; empty if they are paused.
    pub(super) fn running(&self) -> &[VcpuHandle] {
        match self {
            Vcpus::Running(vcpus) => vcpus,
            Vcpus::Paused(_) => &[],
        }
    }

    /// Starts a thread for each vCPU of `hardware`. Its devices must be running.
    ///
    /// # Errors
    /// Fails if a thread cannot be started, such as if the host has no resources left. No vCPU has
    /// run then, and all can be started later.
    pub(super) fn start(&mut self, hardware: &Hardware, post: &Post) -> hypervisor::Result<()> {
        self.start_after(hardware, post, || ())
    }

    /// Resumes the devices, then the vCPUs.
    ///
    /// # Errors
    /// As [`Vcpus::start`]. On an error the devices stay paused.
    pub(super) fn resume(&mut self, hardware: &Hardware, post: &Post) -> hypervisor::Result<()> {
        self.start_after(hardware, post, || hardware.devices.resume())
    }

    /// Makes a thread for each vCPU, calls `first`, and then lets the vCPUs run.
    fn start_after(
        &mut self,
        hardware: &Hardware,
        post: &Post,
        first: impl FnOnce(),
    ) -> hypervisor::Result<()> {
        let Vcpus::Paused(parked) = self else {
            return Ok(());
        };
        let mut parked = take(parked).into_iter();
        let mut ready = Vec::new();
        let prepared = (0u32..).zip(parked.by_ref()).try_for_each(|(id, vcpu)| {
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
            *self = Vcpus::Running(ready.into_iter().map(Ready::go).collect());
            return Ok(());
        };
        let (vcpu, error) = failed.into_parts();
        let before = ready.into_iter().map(Ready::cancel);
        *self = Vcpus::Paused(before.chain(once(vcpu)).chain(parked).collect());
        Err(error)
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
        let Vcpus::Running(running) = self else {
            return Ok(());
        };
        let running = take(running);
        // Ask all of them first: none should run on while another one's thread ends.
        running.iter().for_each(VcpuHandle::ask_to_stop);
        let parked = running.into_iter().map(VcpuHandle::stop);
        let parked = parked.collect::<Option<_>>();
        *self = Vcpus::Paused(parked.context("a vCPU's thread panicked")?);
        Ok(())
    }

    /// The vCPUs if they are parked; empty if they run.
    pub(super) fn parked(&self) -> &[Parked] {
        match self {
            Vcpus::Running(_) => &[],
            Vcpus::Paused(vcpus) => vcpus,
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
