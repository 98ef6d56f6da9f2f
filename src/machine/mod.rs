//! The machine: built by [`builder`], laid out by [`layout`], run here.
//!
//! ```text
//! Machine::build --> Machine::run --> Outcome
//!                      |  the guest ends, a signal comes, the user leaves: the first of them
//!                      v
//!                    vCPUs stopped, console drained, terminal restored
//! ```

pub mod builder;
mod irqchip;
pub mod layout;
mod outcome;
mod signals;
pub mod stats;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use log::{debug, info};

use crate::config::ConsoleConfig;
use crate::devices::console::host::Host;
use crate::hypervisor;
use crate::util::text;
use crate::vcpu::Stop;
use crate::vcpu::stats::ExitStats;
use crate::vcpu::thread::VcpuHandle;
pub use builder::Machine;
pub use outcome::Outcome;
use signals::Signals;
pub use stats::Stats;

/// How long the console's reader may pause once somebody wants the VM gone. Otherwise rvmm waits
/// for it like any program that writes to a pipe.
const DRAIN_PATIENCE: Duration = Duration::from_millis(500);

/// A machine that has run for so long may run for longer.
const SETTLED: Duration = Duration::from_millis(500);

/// What ends a running machine.
enum Event {
    /// A vCPU's thread ended.
    Vcpu(hypervisor::Result<Stop>),
    /// A signal that asks for the end.
    Signal(i32),
    /// Ctrl-A X.
    Left,
}

/// How to run a machine.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// The host's end of the console.
    pub console: &'a ConsoleConfig,
    /// End the machine this long after its start at the latest.
    pub timeout: Option<Duration>,
    /// Keep [`Stats`], and count the time to the guest's start from here.
    pub stats_from: Option<Instant>,
}

impl Machine {
    /// Runs the machine to its end.
    ///
    /// # Errors
    /// The host failed; a guest's failure is an [`Outcome`].
    pub fn run(self, how: &Run) -> Result<(Outcome, Option<Stats>)> {
        let Run {
            console, timeout, ..
        } = *how;
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let (tell, events) = channel();
        let signals = Signals::start(tell.clone()).context("Failed to wait for signals")?;
        let leave = tell.clone();
        let on_leave = Box::new(move || send(&leave, Event::Left));
        let host = Host::start(Arc::clone(&self.console), console, on_leave)?;
        let started = Instant::now();
        let vcpus = self.start_vcpus(&tell, how.stats_from.is_some())?;
        info!("the guest runs");
        let outcome = first_event(&events, timeout);
        let ended = Instant::now();
        if let Ok(outcome) = &outcome {
            info!("{outcome}");
        }
        // After this no guest runs on: what the console holds then is the last of it.
        let exits = vcpus.into_iter().filter_map(VcpuHandle::stop).collect();
        let mut hurried = !matches!(outcome, Ok(Outcome::Guest(_)));
        host.finish(|idle| {
            hurried |= matches!(events.try_recv(), Ok(Event::Signal(_) | Event::Left));
            hurried |= deadline.is_some_and(|deadline| Instant::now() >= deadline);
            !hurried || idle < DRAIN_PATIENCE
        });
        drop(signals);
        let stats = how.stats_from.map(|from| Stats {
            start: started - from,
            run: ended - started,
            end: ended.elapsed(),
            vcpus: exits,
        });
        Ok((outcome?, stats))
    }

    fn start_vcpus(self, tell: &Sender<Event>, count: bool) -> Result<Vec<VcpuHandle>> {
        let mut handles = Vec::new();
        for (id, vcpu) in (0u32..).zip(self.vcpus) {
            let tell = tell.clone();
            let on_stop = Box::new(move |end| send(&tell, Event::Vcpu(end)));
            let exits = Arc::clone(&self.exits);
            let stats = count.then(ExitStats::default);
            handles.push(VcpuHandle::start(id, vcpu, exits, on_stop, stats)?);
        }
        Ok(handles)
    }
}

/// Tells an event. Nobody listens after the first one, and that is fine.
fn send(tell: &Sender<Event>, event: Event) {
    let _ = tell.send(event);
}

/// Waits for what ends the machine. A machine that lives for longer than [`SETTLED`] gives back
/// the code that only starting needed.
fn first_event(events: &Receiver<Event>, timeout: Option<Duration>) -> Result<Outcome> {
    let mut left = timeout.unwrap_or(Duration::MAX);
    if left > SETTLED {
        match events.recv_timeout(SETTLED) {
            Err(RecvTimeoutError::Timeout) => left -= SETTLED,
            event => return Outcome::of(event?),
        }
        if let Err(error) = text::release() {
            debug!("the code that only starting needed stays in memory: {error}");
        }
    }
    match events.recv_timeout(left) {
        Err(RecvTimeoutError::Timeout) => Ok(Outcome::TimedOut),
        event => Outcome::of(event?),
    }
}

#[cfg(test)]
mod tests;
