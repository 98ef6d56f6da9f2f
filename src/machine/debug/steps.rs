//! Steps of one hart, and what a hart at a breakpoint means.

use std::ops::Range;

use anyhow::{Context, Result};
use gdbstub::common::Signal;

use super::{Reason, signal, tid};
use crate::control::State;
use crate::gdb::step::{Plan, is_ebreak, plan};
use crate::hypervisor::regs;
use crate::machine::Running;
use crate::machine::life::Vcpus;
use crate::vcpu::cause::Cause;
use crate::vcpu::hart::Hart;
use crate::vcpu::trap;

/// A step of one hart.
#[derive(Clone)]
pub(super) struct Step {
    pub(super) hart: usize,
    /// It goes on as long as `pc` is in this range.
    inside: Range<u64>,
    then: Then,
    /// `sie` before, if all interrupts are off.
    sie: Option<u64>,
}

/// What follows a step.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// GDB is told.
    Report,
    /// The guest goes on as it did before. GDB is told only if the hart is at a breakpoint.
    GoOn,
}

impl Step {
    pub(super) fn of(hart: usize, inside: Range<u64>, then: Then) -> Self {
        Self {
            hart,
            inside,
            then,
            sie: None,
        }
    }
}

impl Running<'_> {
    /// Begins a step of one hart. If the hart need not run for it, ends it too.
    pub(super) fn step(&mut self, mut step: Step, vcpus: &mut Vcpus) -> Result<()> {
        let ram = self.machine.ram();
        let hart = read(step.hart, vcpus)?;
        let parked = vcpus.parked().get(step.hart);
        let vcpu = parked.context("there is no such hart")?.vcpu.as_ref();
        match plan(&hart, ram) {
            // A hart that is stopped executes nothing.
            _ if hart.is_stopped => {}
            Plan::At(pc) => vcpu.set_reg(regs::PC, pc)?,
            Plan::Trap => trap::enter(vcpu, Cause::BREAKPOINT, hart.pc)?,
            Plan::Run { places, masks } => {
                if masks {
                    step.sie = Some(hart.sie);
                    vcpu.set_reg(regs::SIE, 0)?;
                }
                vcpus.step_to(step.hart, places);
                if let Some(debug) = &mut self.debug {
                    debug.step = Some(step);
                    debug.is_stopped = false;
                }
                return self.start(vcpus);
            }
        }
        self.stepped(&step, vcpus)
    }

    /// A step has ended.
    fn stepped(&mut self, step: &Step, vcpus: &mut Vcpus) -> Result<()> {
        let pc = read(step.hart, vcpus)?.pc;
        let debug = self.debug.as_ref();
        let is_break = debug.is_some_and(|debug| debug.target.breakpoints().contains(&pc));
        if step.then == Then::GoOn && !is_break {
            return self.let_go(vcpus);
        }
        self.halt(vcpus)?;
        let reason = match step.then {
            Then::Report => signal(step.hart, Signal::SIGTRAP),
            Then::GoOn => Reason::SwBreak(tid(step.hart)),
        };
        self.report_stop(reason, vcpus)
    }

    /// Plants breakpoints again whose address no hart had mapped. Starting the vCPUs does that.
    pub(in crate::machine) fn replant(&mut self, vcpus: &mut Vcpus) -> Result<()> {
        if vcpus.state() == State::Paused {
            return Ok(());
        }
        vcpus.park(&mut self.main)?;
        self.start(vcpus)
    }

    /// Hart `number` has reached a breakpoint.
    ///
    /// # Errors
    /// Fails if the host fails, so that the machine cannot go on.
    pub(in crate::machine) fn at_breakpoint(
        &mut self,
        number: u32,
        vcpus: &mut Vcpus,
    ) -> Result<()> {
        if vcpus.state() == State::Paused {
            // The machine was paused meanwhile. The hart reaches the breakpoint again.
            return Ok(());
        }
        vcpus.park(&mut self.main)?;
        self.main.drop_breakpoints();
        let number = usize::try_from(number)?;
        let hart = read(number, vcpus)?;
        let Some(debug) = &mut self.debug else {
            return Ok(());
        };
        let is_wanted = debug.target.breakpoints().contains(&hart.pc);
        if let Some(step) = debug.step.take() {
            unmask(&step, vcpus)?;
            return match step.inside.contains(&hart.pc) && !is_wanted {
                true => self.step(Step { sie: None, ..step }, vcpus),
                false => self.stepped(&step, vcpus),
            };
        }
        if is_wanted && debug.gdb.is_some() {
            self.halt(vcpus)?;
            return self.report_stop(Reason::SwBreak(tid(number)), vcpus);
        }
        // The breakpoints are not in RAM any more.
        let instruction = hart.instruction(self.machine.ram(), hart.pc);
        if instruction.is_some_and(|(instruction, _)| is_ebreak(instruction)) {
            // The guest's own.
            if let Some(parked) = vcpus.parked().get(number) {
                trap::enter(parked.vcpu.as_ref(), Cause::BREAKPOINT, hart.pc)?;
            }
            return self.start(vcpus);
        }
        // A breakpoint at another virtual address of the same code.
        self.step(Step::of(number, 0..0, Then::GoOn), vcpus)
    }
}

fn read(hart: usize, vcpus: &Vcpus) -> Result<Hart> {
    let parked = vcpus.parked().get(hart).context("there is no such hart")?;
    let number = u32::try_from(hart)?;
    Ok(Hart::read(number, parked.vcpu.as_ref())?)
}

/// Turns the interrupts on again that were off during a step.
pub(super) fn unmask(step: &Step, vcpus: &Vcpus) -> Result<()> {
    if let (Some(sie), Some(parked)) = (step.sie, vcpus.parked().get(step.hart)) {
        parked.vcpu.set_reg(regs::SIE, sie)?;
    }
    Ok(())
}
