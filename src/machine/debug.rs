//! GDB: stops the guest, lets it go on, and steps its harts.
//!
//! While GDB has stopped the guest, all vCPUs are parked, and devices run. A hart steps alone: it
//! runs to one of the places where its instruction can lead to, while the others stay parked. What
//! GDB says is parsed by gdbstub, and acts on [`Debugger`].

mod steps;

use std::collections::BTreeSet;
use std::mem::take;

use anyhow::{Context, Result};
use gdbstub::common::{Signal, Tid};
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use log::{info, warn};

use super::command::stays_paused;
use super::frozen::Clock;
use super::life::Vcpus;
use super::mainloop::Event;
use super::{End, Outcome, Running};
use crate::config::GdbConfig;
use crate::control::State;
use crate::gdb::link::{Link, Listener, Number, Said, Wire};
use crate::gdb::target::{Action, Debugger, Monitor, Resume};

use steps::{Step, Then, unmask};

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
    /// Fails if the address is in use, or if the host has no descriptors left.
    pub(super) fn listen_for_gdb(&mut self, config: &GdbConfig) -> Result<()> {
        let listener = Listener::at(&config.at)?;
        let address = listener.address(&config.at);
        let post = self.post.clone();
        let on_said = move |number, said| post.send(Event::Gdb(number, said));
        let link = Link::new(listener, Box::new(on_said));
        let (link, wire) = link.context("Failed to listen for GDB")?;
        self.main.add(Box::new(link));
        match config {
            GdbConfig { wait: true, .. } => {
                warn!("the guest waits for GDB: target remote {address}");
            }
            // The user does not know it yet.
            GdbConfig { at, .. } if *at != address => {
                warn!("GDB can connect: target remote {address}");
            }
            _ => info!("GDB can connect: target remote {address}"),
        }
        let harts = usize::try_from(self.machine.config.cpus)?;
        self.debug = Some(Debug {
            target: Debugger::new(self.machine.ram(), harts, self.how.tracer.cloned()),
            wire,
            gdb: None,
            is_attached: false,
            is_stopped: config.wait,
            alone: None,
            step: None,
        });
        Ok(())
    }

    /// Whether GDB keeps some harts stopped.
    pub(super) fn is_partly_held(&self) -> bool {
        let is_alone = |debug: &Debug| debug.alone.is_some() || debug.step.is_some();
        self.is_held() || self.debug.as_ref().is_some_and(is_alone)
    }

    /// Whether GDB keeps the guest stopped.
    pub(super) fn is_held(&self) -> bool {
        self.debug.as_ref().is_some_and(|debug| debug.is_stopped)
    }

    /// Prepares the new vCPUs of a life that begins, with `--gdb`.
    ///
    /// # Errors
    /// Fails if this host's KVM cannot debug guests.
    pub(super) fn debug_life(&mut self, vcpus: &mut Vcpus) -> Result<()> {
        let Some(debug) = &mut self.debug else {
            return Ok(());
        };
        debug.step = None;
        debug.alone = None;
        vcpus.run_to(debug.target.breakpoints(), None);
        let debugs = vcpus.debug(debug.is_attached);
        debugs.context("--gdb needs a host whose KVM can debug guests, such as Linux 6.12")
    }

    /// Handles what the GDB of this number does. Returns how this life ends, if it does.
    ///
    /// # Errors
    /// Fails if the host fails, so that the machine cannot go on.
    pub(super) fn said(
        &mut self,
        number: Number,
        said: Said,
        vcpus: &mut Vcpus,
    ) -> Result<Option<End>> {
        let Some(debug) = &self.debug else {
            return Ok(None);
        };
        let is_current = debug.wire.is_of(number);
        match said {
            Said::Hello => self.attach(number, vcpus)?,
            Said::Bye if is_current => self.detach(vcpus)?,
            Said::Bye => {}
            Said::Bytes(bytes) => {
                debug.wire.heard(bytes.len());
                for byte in bytes.into_iter().filter(|_| is_current) {
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
    fn attach(&mut self, number: Number, vcpus: &mut Vcpus) -> Result<()> {
        if self.debug.as_ref().is_some_and(|debug| debug.is_attached) {
            // The one before has gone.
            self.detach(vcpus)?;
        }
        self.halt(vcpus)?;
        vcpus.debug(true)?;
        let Some(debug) = &mut self.debug else {
            return Ok(());
        };
        debug.wire = debug.wire.of(number);
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

    /// GDB has gone, or is sent away: the guest runs without it, or stays paused.
    pub(super) fn detach(&mut self, vcpus: &mut Vcpus) -> Result<()> {
        let is_held = self.is_held();
        let Some(debug) = &mut self.debug else {
            return Ok(());
        };
        if !take(&mut debug.is_attached) && !is_held {
            return Ok(());
        }
        debug.gdb = None;
        debug.wire.close();
        debug.target.forget();
        debug.alone = None;
        // Somebody else has paused the machine.
        let stays = vcpus.state() == State::Paused && !is_held;
        self.stop_vcpus(vcpus)?;
        vcpus.debug(false)?;
        match stays {
            true => vcpus.run_to(&BTreeSet::new(), None),
            false => self.let_go(vcpus)?,
        }
        Ok(())
    }

    /// Stops the guest for GDB. If it is paused, only GDB keeps it stopped from now on.
    fn halt(&mut self, vcpus: &mut Vcpus) -> Result<()> {
        if vcpus.state() == State::Paused && !self.is_held() {
            vcpus.thaw(Clock::Stop)?;
            self.machine.hardware()?.devices.resume();
            self.count_time(State::Paused);
        }
        self.stop_vcpus(vcpus)?;
        if let Some(debug) = &mut self.debug {
            debug.is_stopped = true;
        }
        Ok(())
    }

    /// Parks the vCPUs, and ends a step.
    fn stop_vcpus(&mut self, vcpus: &mut Vcpus) -> Result<()> {
        vcpus.park(&mut self.main)?;
        self.main.drop_breakpoints();
        let debug = self.debug.as_mut();
        if let Some(step) = debug.and_then(|debug| debug.step.take()) {
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
                let hart = debug.alone.unwrap_or(0);
                // The guest may have stopped at a breakpoint a moment ago, which GDB is told.
                let reason = (!debug.is_stopped).then(|| signal(hart, Signal::SIGINT));
                self.halt(vcpus)?;
                let next = self.with_gdb(vcpus, |gdb, target| match gdb {
                    Gdb::CtrlCInterrupt(gdb) => gdb.interrupt_handled(target, reason),
                    other => Ok(other),
                });
                if let Some(debug) = &mut self.debug {
                    debug.gdb = next;
                }
            }
            gdb => {
                let runs = matches!(gdb, Gdb::Running(_));
                debug.gdb = Some(gdb);
                if let Some(resume) = debug.target.take_resume().filter(|_| runs) {
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
