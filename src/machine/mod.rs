//! The machine: built by `builder`, laid out by [`layout`], run here.
//!
//! ```text
//! Machine::build --> live --> a signal, Ctrl-A X, --timeout,      --> console drained,
//!                    ^   |    power-off, or what cannot go on         terminal restored
//!                    |   v
//!                    reset: the guest asked for one
//! ```

mod builder;
mod ending;
mod hardware;
pub(crate) mod harts;
mod irqchip;
pub mod layout;
mod meantime;
mod outcome;
pub mod signals;
mod stats;
pub mod status;
mod virtio;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use log::info;
use signal_hook::consts::SIGTERM;

use crate::config::ConsoleConfig;
use crate::devices::console::host::Host;
use crate::hypervisor;
use crate::util::{RateLimit, guest_info};
use crate::vcpu::Stop;
use crate::vcpu::stats::ExitStats;
use crate::vcpu::thread::{Start, VcpuHandle};
pub use builder::Machine;
use ending::Ending;
use meantime::Meantime;
pub use outcome::Outcome;
use signals::Signals;
pub use stats::Stats;
pub use virtio::MakeDevice;

/// How long the console's reader may pause once somebody wants the VM gone. Otherwise rvmm waits
/// for it like any program that writes to a pipe.
const DRAIN_PATIENCE: Duration = Duration::from_millis(500);

/// What ends a running machine.
enum Event {
    /// A vCPU's thread ended.
    Vcpu(hypervisor::Result<Stop>),
    /// Somebody asked for the end.
    Asked(Outcome),
    /// Somebody asked the guest for its end.
    Pressed,
    /// A vCPU wants to be kicked.
    Called,
}

/// When a machine ends at the latest, and how.
#[derive(Clone, Copy)]
struct Deadline {
    at: Option<Instant>,
    outcome: Outcome,
}

impl Deadline {
    /// After `time`, if any is given.
    fn after(time: Option<Duration>) -> Self {
        Self {
            at: time.and_then(|time| Instant::now().checked_add(time)),
            outcome: Outcome::TimedOut,
        }
    }

    /// How much time is left.
    fn left(&self) -> Duration {
        let left = |at: Instant| at.saturating_duration_since(Instant::now());
        self.at.map_or(Duration::MAX, left)
    }

    /// The earlier of both.
    fn or(self, other: Self) -> Self {
        if other.left() < self.left() {
            other
        } else {
            self
        }
    }
}

/// How to run a machine.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// The host's end of the console.
    pub console: &'a ConsoleConfig,
    /// End the machine this long after its start at the latest.
    pub timeout: Option<Duration>,
    /// Make the machine anew when the guest asks for a reset; else that is its end.
    pub reboot: bool,
    /// Keep [`Stats`], and count the time to the guest's start from here.
    pub stats_from: Option<Instant>,
}

impl Machine {
    /// Runs the machine to its end, through as many resets as the guest asks for. Where somebody
    /// asks for the end and it does not come within five seconds, the process ends. Signals are as
    /// [`signals::prepare`] leaves them.
    ///
    /// # Errors
    /// The host failed; a guest's failure is an [`Outcome`].
    pub fn run(self, how: &Run) -> Result<(Outcome, Option<Stats>)> {
        let (tell, events) = channel();
        let ending = Ending::new(tell);
        let result = self.run_until(how, &ending, &events);
        ending.came();
        result
    }

    fn run_until(
        mut self,
        how: &Run,
        ending: &Ending,
        events: &Receiver<Event>,
    ) -> Result<(Outcome, Option<Stats>)> {
        let mut deadline = Deadline::after(how.timeout);
        if let Some(at) = deadline.at {
            ending.expect(deadline.outcome, at);
        }
        let resized = self.backends.console.clone();
        let on_resize = move || resized.iter().for_each(|console| console.resized());
        let presses = self.backends.button.is_some();
        let signals = Signals::start(ending.clone(), presses, on_resize);
        let signals = signals.context("Failed to wait for signals")?;
        let hosts = self.connect_consoles(how.console, ending)?;
        let mut stats = how.stats_from.map(Stats::since);
        let outcome = loop {
            match self.live(ending, events, &mut deadline, stats.as_mut()) {
                Ok(Outcome::Guest(Stop::Reset)) if how.reboot => match self.reset() {
                    Ok(()) => {}
                    Err(error) => break Err(error),
                },
                outcome => break outcome,
            }
        };
        if let Ok(outcome) = outcome {
            ending.settle(outcome);
        }
        // Whatever happened: what the guest wrote is written. Devices first, whose threads may still
        // have it.
        self.power_off();
        let mut hurried = !matches!(outcome, Ok(Outcome::Guest(_)));
        for host in hosts {
            host.finish(|idle| {
                hurried |= meanwhile(events).is_some();
                hurried |= deadline.left().is_zero();
                !hurried || idle < DRAIN_PATIENCE
            });
        }
        drop(signals);
        if let Some(stats) = &mut stats {
            stats.put_away();
        }
        Ok((outcome?, stats))
    }

    /// Connects the console, and the second one where there is one, to the host.
    fn connect_consoles(&self, console: &ConsoleConfig, ending: &Ending) -> Result<Vec<Host>> {
        let mut consoles = vec![("the console", Arc::clone(&self.console), console)];
        let second = (&self.backends.console, &self.config.virtio_console);
        if let (Some(console), Some(config)) = second {
            consoles.push(("the second console (hvc0)", Arc::clone(console), config));
        }
        let connect = |(name, console, config)| {
            let ending = ending.clone();
            let on_leave = Box::new(move || ending.ask(Outcome::Left));
            Host::start(name, console, config, on_leave)
        };
        consoles.into_iter().map(connect).collect()
    }

    /// One life: from the first instruction to what ends it. No vCPU runs any more then: what the
    /// console holds is the last of it.
    fn live(
        &mut self,
        ending: &Ending,
        events: &Receiver<Event>,
        deadline: &mut Deadline,
        mut stats: Option<&mut Stats>,
    ) -> Result<Outcome> {
        if let Some(stats) = &mut stats {
            stats.guest_starts();
        }
        let vcpus = self.start_vcpus(&ending.sender(), stats.is_some())?;
        guest_info!(RateLimit::named("lives"), "the guest runs");
        let mut meantime = Meantime::of(&vcpus);
        let outcome = loop {
            match meantime.next_event(events, deadline) {
                Some(Event::Called) => {}
                Some(Event::Pressed) => self.press(ending, deadline)?,
                Some(Event::Vcpu(end)) => break end.map(Outcome::Guest),
                Some(Event::Asked(outcome)) => break Ok(outcome),
                None => break Ok(deadline.outcome),
            }
        };
        if let Some(stats) = &mut stats {
            stats.guest_ended();
        }
        // All of them at once: none shall run on while another's thread ends.
        vcpus.iter().for_each(VcpuHandle::ask_to_stop);
        let exits: Vec<_> = vcpus.into_iter().map(VcpuHandle::stop).collect();
        if let Some(stats) = &mut stats {
            let hardware = self.hardware()?;
            stats.add(exits, |gpa| hardware.registers_at(gpa));
        }
        let outcome = match meanwhile(events) {
            Some(Event::Asked(asked)) => asked,
            Some(_) => {
                self.press(ending, deadline)?;
                outcome?
            }
            None => outcome?,
        };
        match outcome {
            Outcome::Guest(Stop::Reset) => guest_info!(RateLimit::named("resets"), "{outcome}"),
            // Before the console is drained, which may take its time.
            _ => info!("{outcome}"),
        }
        Ok(outcome)
    }

    /// Asks the guest to power off, which it has to do before a new `deadline`.
    fn press(&mut self, ending: &Ending, deadline: &mut Deadline) -> Result<()> {
        let Some(patience) = self.config.on_sigterm.patience() else {
            return Ok(());
        };
        let last = Deadline {
            outcome: Outcome::Overdue(SIGTERM),
            ..Deadline::after(Some(patience))
        };
        *deadline = deadline.or(last);
        if let Some(at) = deadline.at {
            ending.expect(deadline.outcome, at);
        }
        if self.backends.button.iter().any(|button| button.press()) {
            info!("SIGTERM: the guest's power key is pressed");
        } else {
            info!("SIGTERM: the guest has no power key: SysRq on its UART");
            self.hardware()?.sysrq_power_off();
        }
        Ok(())
    }

    fn start_vcpus(&mut self, tell: &Sender<Event>, count: bool) -> Result<Vec<VcpuHandle>> {
        let hardware = self.hardware()?;
        let mut handles = Vec::new();
        for (id, vcpu) in (0u32..).zip(std::mem::take(&mut hardware.vcpus)) {
            let (stopped, called) = (tell.clone(), tell.clone());
            let exits = Arc::clone(&hardware.exits);
            let registers = layout::PCI_ECAM.start..layout::PCI_WINDOW.end;
            let start = Start {
                id,
                on_stop: Box::new(move |end| send(&stopped, Event::Vcpu(end))),
                on_call: Box::new(move || send(&called, Event::Called)),
                stats: count.then(|| ExitStats::by_page(registers)),
                follow_restarts: hardware.resets_harts,
            };
            handles.push(VcpuHandle::start(vcpu, exits, start)?);
        }
        Ok(handles)
    }
}

/// What a person asked for while the vCPUs were stopped: the end, or else the guest's. What other vCPUs
/// told is dropped: they stopped because the first one did.
fn meanwhile(events: &Receiver<Event>) -> Option<Event> {
    let asked = events
        .try_iter()
        .filter(|event| !matches!(event, Event::Vcpu(_) | Event::Called));
    asked.min_by_key(|event| matches!(event, Event::Pressed))
}

/// Tells an event. Nobody listens after the first one, and that is fine.
fn send(tell: &Sender<Event>, event: Event) {
    let _ = tell.send(event);
}

#[cfg(test)]
mod tests;
