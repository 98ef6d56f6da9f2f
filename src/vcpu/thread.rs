//! The thread that runs a vCPU, and the handle with which others stop it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

use super::Stop;
use super::exits::{Exits, Next};
use super::stats::ExitStats;
use crate::hypervisor::{Error, Kicker, Result, Vcpu, VmEntry};
use crate::util::thread::{Kind, spawn};

/// How a vCPU's thread ends by itself; nothing is told when it was stopped from outside.
pub type OnStop = Box<dyn FnOnce(Result<Stop>) + Send>;

/// A running vCPU. Dropping it stops the vCPU and waits for its thread.
pub struct VcpuHandle {
    stopping: Arc<AtomicBool>,
    kicker: Box<dyn Kicker>,
    thread: Option<JoinHandle<Option<ExitStats>>>,
}

/// The signal that gets a thread out of KVM_RUN. Its handler does nothing: EINTR is the message.
fn kick_signal() -> i32 {
    SIGRTMIN()
}

extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl VcpuHandle {
    /// Runs `vcpu`, number `id`, on a thread of its own until `exits` ends it or the handle is
    /// dropped. With `stats`, its exits are counted for [`VcpuHandle::stop`].
    ///
    /// # Errors
    /// The host refused the thread, its signal, or the vCPU's run page.
    pub fn start(
        id: u32,
        mut vcpu: Box<dyn Vcpu>,
        exits: Arc<Exits>,
        on_stop: OnStop,
        mut stats: Option<ExitStats>,
    ) -> Result<Self> {
        let refused = |act: &str, e: io::Error| Error::refused(format!("{act} vCPU {id}"), e);
        register_signal_handler(kick_signal(), on_kick)
            .map_err(|e| refused("set the signal of", e.into()))?;
        let kicker = vcpu.kicker()?;
        let stopping = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stopping);
        let body = move || {
            // Whatever mask came over exec; it fails for numbers that are no signals.
            let _ = unblock_signal(kick_signal());
            if let Some(end) = run(vcpu.as_mut(), &exits, &flag, stats.as_mut()) {
                on_stop(end);
            }
            if let Some(stats) = &mut stats {
                stats.read_counters(vcpu.as_ref());
            }
            stats
        };
        let thread = spawn(Kind::Vcpu, &id.to_string(), body)
            .map_err(|e| refused("start the thread of", e))?;
        Ok(Self {
            stopping,
            kicker,
            thread: Some(thread),
        })
    }
}

impl VcpuHandle {
    /// Stops the vCPU and waits for its thread: what it counted, if it did.
    pub fn stop(mut self) -> Option<ExitStats> {
        self.join()
    }

    /// Asks the vCPU to stop, and does not wait for it.
    pub fn ask_to_stop(&self) {
        self.stopping.store(true, Ordering::Release);
        // Set before the signal: a thread that is about to enter KVM_RUN comes back at once.
        self.kicker.set_immediate_exit(true);
        if let Some(thread) = &self.thread {
            // Fails where the thread has ended already.
            let _ = thread.kill(kick_signal());
        }
    }

    fn join(&mut self) -> Option<ExitStats> {
        self.ask_to_stop();
        self.thread.take()?.join().ok().flatten()
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.join();
    }
}

/// Runs until the machine ends (`Some`) or the vCPU is stopped from outside (`None`).
fn run(
    vcpu: &mut dyn Vcpu,
    exits: &Exits,
    stopping: &AtomicBool,
    mut stats: Option<&mut ExitStats>,
) -> Option<Result<Stop>> {
    let mut entry = VmEntry::Run;
    while !stopping.load(Ordering::Acquire) {
        let ran = vcpu.run(entry);
        // By reference: an exit has 72 bytes, and moving them is a tenth of what serving it takes.
        let exit = match &ran {
            Ok(exit) => exit,
            Err(_) => return ran.err().map(Err),
        };
        let began = stats.is_some().then(Instant::now);
        let next = exits.handle(exit);
        if let (Some(stats), Some(began)) = (&mut stats, began) {
            stats.add(exit, began.elapsed());
        }
        let stop = match next {
            Next::Enter(next) => {
                entry = next;
                continue;
            }
            Next::Stop(stop) => stop,
        };
        let Stop::Unrunnable { errno, pc } = stop else {
            return Some(Ok(stop));
        };
        match exits.fetch_faults.answer(vcpu, errno, pc) {
            Ok(Next::Enter(next)) => entry = next,
            Ok(Next::Stop(stop)) => return Some(Ok(stop)),
            Err(error) => return Some(Err(error)),
        }
    }
    None
}

#[cfg(test)]
mod tests;
