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

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use anyhow::{Context, Result};
use log::info;

use crate::devices::console::stdio::Stdio;
use crate::hypervisor;
use crate::vcpu::Stop;
use crate::vcpu::thread::VcpuHandle;
pub use builder::Machine;
pub use outcome::Outcome;
use signals::Signals;

/// How long a reader of the console may pause before the guest's last output is given up.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);
/// The same when somebody wants the VM gone.
const DRAIN_PATIENCE_STOPPED: Duration = Duration::from_millis(500);

/// What ends a running machine.
enum Event {
    /// A vCPU's thread ended.
    Vcpu(hypervisor::Result<Stop>),
    /// A signal that asks for the end.
    Signal(i32),
    /// Ctrl-A X.
    Left,
}

impl Machine {
    /// Runs the machine to its end.
    ///
    /// # Errors
    /// The host failed; a guest's failure is an [`Outcome`].
    pub fn run(self) -> Result<Outcome> {
        let (tell, events) = channel();
        let signals = Signals::start(tell.clone()).context("Failed to wait for signals")?;
        let leave = tell.clone();
        let on_leave = Box::new(move || send(&leave, Event::Left));
        let stdio = Stdio::start(Arc::clone(&self.console), on_leave)
            .context("Failed to start the console")?;
        let vcpus = self.start_vcpus(&tell)?;
        info!("the guest runs");
        let event = events.recv().context("every vCPU has gone")?;
        let outcome = Outcome::of(event);
        // No guest runs on: what the console holds now is the last of it.
        drop(vcpus);
        stdio.finish(patience(&outcome));
        drop(signals);
        outcome
    }

    fn start_vcpus(self, tell: &Sender<Event>) -> Result<Vec<VcpuHandle>> {
        let mut handles = Vec::new();
        for (id, vcpu) in (0u32..).zip(self.vcpus) {
            let tell = tell.clone();
            let on_stop = Box::new(move |end| send(&tell, Event::Vcpu(end)));
            let exits = Arc::clone(&self.exits);
            handles.push(VcpuHandle::start(id, vcpu, exits, on_stop)?);
        }
        Ok(handles)
    }
}

/// Tells an event. Nobody listens after the first one, and that is fine.
fn send(tell: &Sender<Event>, event: Event) {
    let _ = tell.send(event);
}

fn patience(outcome: &Result<Outcome>) -> Duration {
    match outcome {
        Ok(Outcome::Signal(_) | Outcome::Left) => DRAIN_PATIENCE_STOPPED,
        _ => DRAIN_PATIENCE,
    }
}

#[cfg(test)]
mod tests;
