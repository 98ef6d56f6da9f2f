//! GDB: stops the guest, lets it go on, and steps its harts.
//!
//! While GDB has stopped the guest, all vCPUs are parked, and devices run. A hart steps alone: it
//! runs to one of the places where its instruction can lead to, while the others stay parked. What
//! GDB says is parsed by gdbstub, and acts on [`Debugger`].

use std::mem::take;
use std::ops::Range;

use anyhow::{Context, Result};
use gdbstub::common::{Signal, Tid};
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use log::{info, warn};

use super::command::stays_paused;
use super::life::Vcpus;
use super::mainloop::Event;
use super::{End, Outcome, Running};
use crate::config::GdbConfig;
use crate::control::State;
use crate::gdb::link::{Link, Listener, Said, Wire};
use crate::gdb::step::{Plan, is_ebreak, plan};
use crate::gdb::target::{Action, Debugger, Monitor, Resume};
use crate::hypervisor::regs;
use crate::vcpu::cause::Cause;
use crate::vcpu::hart::Hart;
use crate::vcpu::trap;

type Gdb = GdbStubStateMachine<'static, Debugger, Wire>;
type Reason = MultiThreadStopReason<u64>;

/// The debugger of a machine with `--gdb`.
pub(super) struct Debug {
    target: Debugger,
    wire: Wire,
    /// The conversation with GDB. None if no GDB is connected.
    gdb: Option<Gdb>,
    /// A GDB has connected, and has not left.
    is_attached: bool,
    /// The guest is stopped: by GDB, or because it waits for the first GDB.
    is_stopped: bool,
    /// Only this hart runs, and the others stay where they are.
    alone: Option<usize>,
    /// The step of a hart, while it runs.
    step: Option<Step>,
}

/// A step of one hart.
#[derive(Clone)]
struct Step {
    hart: usize,
    /// It goes on as long as `pc` is in this range.
    inside: Range<u64>,
    then: Then,
    /// `sie` before, if all interrupts are off.
    sie: Option<u64>,
}

/// What follows a step.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    /// GDB is told.
    Report,
    /// The guest goes on as it did before. GDB is told only if the hart is at a breakpoint.
    GoOn,
}

impl Step {
    fn of(hart: usize, inside: Range<u64>, then: Then) -> Self {
        Self {
            hart,
            inside,
            then,
            sie: None,
        }
    }
}

fn tid(hart: usize) -> Tid {
    Tid::MIN.saturating_add(hart)
}

fn signal(hart: usize, signal: Signal) -> Reason {
    let tid = tid(hart);
    Reason::SignalWithThread { tid, signal }
}

impl Running<'_> {
    /// Listens for GDB.
    ///
    /// # Errors
    /// Fails if the address is in use, or if this host's KVM cannot debug guests.
    pub(super) fn listen_for_gdb(&mut self, config: &GdbConfig) -> Result<()> {
        let listener = Listener::at(&config.at)?;
        let address = listener.address(&config.at);
        let post = self.post.clone();
        let (link, wire) = Link::new(listener, Box::new(move |said| post.send(Event::Gdb(said))));
        self.main.add(Box::new(link));
        match config.wait {
            true => warn!("the guest waits for GDB: target remote {address}"),
            false => info!("GDB can connect: target remote {address}"),
        }
        let harts = usize::try_from(self.machine.config.cpus)?;
        self.debug = Some(Debug {
            target: Debugger::new(self.machine.shared_ram(), harts, self.how.tracer.cloned()),
            wire,
            gdb: None,
            is_attached: false,
            is_stopped: config.wait,
            alone: None,
            step: None,
        });
        Ok(())
    }

    /// Whether GDB keeps the guest stopped.
    pub(super) fn is_held(&self) -> bool {
        self.debug.as_ref().is_some_and(|debug| debug.is_stopped)
    }

    /// Prepares the new vCPUs of a life that begins, if a GDB is connected.
    pub(super) fn debug_life(&mut self, vcpus: &mut Vcpus) -> Result<()> {
        if let Some(debug) = self.debug.as_mut().filter(|debug| debug.is_attached) {
            debug.step = None;
            debug.alone = None;
            vcpus.run_to(debug.target.breakpoints(), None);
            vcpus.debug(true)?;
        }
        Ok(())
    }

    /// Handles what GDB does. Returns how this life ends, if it does.
    ///
    /// # Errors
    /// Fails if the host fails, so that the machine cannot go on.
    pub(super) fn said(&mut self, said: Said, vcpus: &mut Vcpus) -> Result<Option<End>> {
        match said {
            Said::Hello => self.attach(vcpus)?,
            Said::Bye => self.detach(vcpus)?,
            Said::Bytes(bytes) => {
                for byte in bytes {
                    if let Some(end) = self.hear(byte, vcpus)? {
                        return Ok(Some(end));
                    }
                }
                return self.obey_monitor(vcpus);
            }
        }
        Ok(None)
    }

    /// A GDB has connected: it expects a guest that is stopped.
    fn attach(&mut self, vcpus: &mut Vcpus) -> Result<()> {
        if vcpus.state() == State::Paused && !self.is_held() {
            // From now on GDB decides what runs.
            self.machine.hardware()?.devices.resume();
            self.count_time(State::Paused);
        }
        self.halt(vcpus)?;
        vcpus.debug(true)?;
        let Some(debug) = &mut self.debug else {
            return Ok(());
        };
        let gdb = GdbStub::new(debug.wire.clone()).run_state_machine(&mut debug.target);
        match gdb {
            Ok(gdb) => {
                debug.gdb = Some(gdb);
                debug.is_attached = true;
            }
            Err(error) => {
                warn!("Failed to talk to GDB: {error}");
                self.detach(vcpus)?;
            }
        }
        Ok(())
    }

    /// GDB has gone, or is sent away: the guest runs without it.
    pub(super) fn detach(&mut self, vcpus: &mut Vcpus) -> Result<()> {
        let Some(debug) = &mut self.debug else {
            return Ok(());
        };
        let was_attached = take(&mut debug.is_attached);
        if !was_attached && !debug.is_stopped {
            return Ok(());
        }
        debug.gdb = None;
        debug.wire.close();
        debug.target.forget();
        debug.alone = None;
        self.halt(vcpus)?;
        vcpus.debug(false)?;
        self.let_go(vcpus)
    }

    /// Parks the vCPUs for GDB.
    fn halt(&mut self, vcpus: &mut Vcpus) -> Result<()> {
        vcpus.park(&mut self.main)?;
        self.main.drop_breakpoints();
        let Some(debug) = &mut self.debug else {
            return Ok(());
        };
        debug.is_stopped = true;
        if let Some(step) = debug.step.take() {
            unmask(&step, vcpus)?;
        }
        Ok(())
    }

    /// Lets all harts run, or the one that GDB wants, to GDB's breakpoints.
    fn let_go(&mut self, vcpus: &mut Vcpus) -> Result<()> {
        let Some(debug) = &mut self.debug else {
            return Ok(());
        };
        vcpus.run_to(debug.target.breakpoints(), debug.alone);
        debug.is_stopped = false;
        self.start(vcpus)
    }

    /// Starts the vCPUs as they are to run. If the host cannot, GDB gets a stop.
    fn start(&mut self, vcpus: &mut Vcpus) -> Result<()> {
        if let Err(error) = vcpus.start(self.machine.hardware()?, &self.post) {
            drop(stays_paused(error));
            self.halt(vcpus)?;
            self.report_stop(signal(0, Signal::SIGSTOP), vcpus)?;
        }
        Ok(())
    }

    /// Handles one byte from GDB.
    fn hear(&mut self, byte: u8, vcpus: &mut Vcpus) -> Result<Option<End>> {
        let next = self.with_gdb(vcpus, |gdb, target| match gdb {
            Gdb::Idle(gdb) => gdb.incoming_data(target, byte),
            Gdb::Running(gdb) => gdb.incoming_data(target, byte),
            other => Ok(other),
        });
        match next {
            Some(gdb) => self.act(gdb, vcpus),
            None => Ok(None),
        }
    }

    /// Calls `talk` with the conversation and the target, which has the vCPUs if they are parked.
    /// Returns the new state of the conversation. None if there is none, or not any more.
    fn with_gdb<E: std::fmt::Display>(
        &mut self,
        vcpus: &mut Vcpus,
        talk: impl FnOnce(Gdb, &mut Debugger) -> std::result::Result<Gdb, E>,
    ) -> Option<Gdb> {
        let debug = self.debug.as_mut()?;
        let gdb = debug.gdb.take()?;
        debug.target.lend(vcpus.lend());
        let next = talk(gdb, &mut debug.target);
        vcpus.take_back(debug.target.give_back());
        match next {
            Ok(next) => Some(next),
            Err(error) => {
                warn!("Failed to talk to GDB: {error}");
                // The main loop sees that, and detaches.
                debug.wire.close();
                None
            }
        }
    }

    /// Does what the new state of the conversation asks for, and keeps it.
    fn act(&mut self, gdb: Gdb, vcpus: &mut Vcpus) -> Result<Option<End>> {
        let Some(debug) = &mut self.debug else {
            return Ok(None);
        };
        match gdb {
            Gdb::Disconnected(gone) => {
                let is_kill = gone.get_reason() == DisconnectReason::Kill;
                debug.gdb = Some(Gdb::Disconnected(gone));
                self.detach(vcpus)?;
                return Ok(is_kill.then_some(End::Over(Outcome::Commanded)));
            }
            Gdb::CtrlCInterrupt(interrupted) => {
                debug.gdb = Some(Gdb::CtrlCInterrupt(interrupted));
                self.halt(vcpus)?;
                let next = self.with_gdb(vcpus, |gdb, target| match gdb {
                    Gdb::CtrlCInterrupt(gdb) => {
                        gdb.interrupt_handled(target, Some(signal(0, Signal::SIGINT)))
                    }
                    other => Ok(other),
                });
                if let Some(debug) = &mut self.debug {
                    debug.gdb = next;
                }
            }
            gdb => {
                debug.gdb = Some(gdb);
                if let Some(resume) = debug.target.take_resume() {
                    self.resume_for_gdb(resume, vcpus)?;
                }
            }
        }
        Ok(None)
    }

    /// Lets the guest go on as GDB wants.
    fn resume_for_gdb(&mut self, resume: Resume, vcpus: &mut Vcpus) -> Result<()> {
        let Some(debug) = &mut self.debug else {
            return Ok(());
        };
        debug.alone = match resume {
            Resume::All => None,
            Resume::Alone(hart, _) => Some(hart),
        };
        let step = match resume {
            Resume::All => return self.let_go(vcpus),
            Resume::Alone(hart, Action::Step) => Step::of(hart, 0..0, Then::Report),
            Resume::Alone(hart, Action::StepInside(range)) => Step::of(hart, range, Then::Report),
            // GDB makes most steps itself: it sets breakpoints behind the instruction, and lets the
            // hart run. The first instruction is a step of ours then, so that the hart takes no
            // interrupt whose handler may wait for the other harts.
            Resume::Alone(hart, Action::Run) => Step::of(hart, 0..0, Then::GoOn),
        };
        self.step(step, vcpus)
    }

    /// Tells GDB that the guest has stopped, which runs for GDB.
    fn report_stop(&mut self, reason: Reason, vcpus: &mut Vcpus) -> Result<()> {
        let next = self.with_gdb(vcpus, |gdb, target| match gdb {
            Gdb::Running(gdb) => gdb.report_stop(target, reason),
            other => Ok(other),
        });
        if let Some(debug) = &mut self.debug {
            debug.gdb = next;
        }
        Ok(())
    }

    /// Does what GDB's user has asked for with `monitor`.
    fn obey_monitor(&mut self, vcpus: &mut Vcpus) -> Result<Option<End>> {
        let debug = self.debug.as_mut();
        match debug.and_then(|debug| debug.target.take_asked()) {
            Some(Monitor::Report) => self.report_to_user(vcpus)?,
            Some(Monitor::Reset) => return Ok(Some(End::Reset(None))),
            None => {}
        }
        Ok(None)
    }

    /// The machine has ended: GDB gets the exit status.
    pub(super) fn end_gdb(&mut self, outcome: Outcome, vcpus: &mut Vcpus) -> Result<()> {
        if self.debug.as_ref().is_some_and(|debug| debug.gdb.is_some()) {
            self.report_stop(Reason::Exited(outcome.exit_status()), vcpus)?;
        }
        if let Some(debug) = &mut self.debug {
            debug.gdb = None;
            debug.wire.close();
        }
        Ok(())
    }

    /// The guest cannot go on: GDB gets that as a signal. Returns whether there is a GDB.
    pub(super) fn crash_to_gdb(&mut self, hart: u32, vcpus: &mut Vcpus) -> Result<bool> {
        if self.debug.as_ref().is_none_or(|debug| debug.gdb.is_none()) {
            return Ok(false);
        }
        self.halt(vcpus)?;
        self.report_stop(signal(usize::try_from(hart)?, Signal::SIGSEGV), vcpus)?;
        Ok(true)
    }
}

/// Steps and breakpoints.
impl Running<'_> {
    /// Begins a step of one hart. If the hart need not run for it, ends it too.
    fn step(&mut self, mut step: Step, vcpus: &mut Vcpus) -> Result<()> {
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
    pub(super) fn replant(&mut self, vcpus: &mut Vcpus) -> Result<()> {
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
    pub(super) fn at_breakpoint(&mut self, number: u32, vcpus: &mut Vcpus) -> Result<()> {
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
fn unmask(step: &Step, vcpus: &Vcpus) -> Result<()> {
    if let (Some(sie), Some(parked)) = (step.sie, vcpus.parked().get(step.hart)) {
        parked.vcpu.set_reg(regs::SIE, sie)?;
    }
    Ok(())
}
