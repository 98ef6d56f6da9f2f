//! The thread that runs a vCPU, and the handle with which others stop it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Instant;

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

use super::Stop;
use super::exits::{Exits, Next, Rare};
use super::restart::{Call, Restarts, Shared};
use super::stats::ExitStats;
use crate::hypervisor::{Error, Kicker, Result, RunAnd, Serve, Vcpu, VmEntry, VmExit, Waiting};
use crate::util::thread::{Kind, spawn};

/// How a vCPU's thread ends by itself; nothing is told when it was stopped from outside.
pub type OnStop = Box<dyn FnOnce(Result<Stop>) + Send>;

/// A running vCPU. Dropping it stops the vCPU and waits for its thread.
pub struct VcpuHandle {
    shared: Arc<Shared>,
    kicker: Box<dyn Kicker>,
    /// On a host that resets harts unseen.
    waiting: Option<Box<dyn Waiting>>,
    thread: Option<JoinHandle<Option<ExitStats>>>,
}

/// How to run a vCPU.
pub struct Start {
    /// Its hart.
    pub id: u32,
    /// Called when it ends by itself.
    pub on_stop: OnStop,
    /// Called when it wants to be kicked, by [`VcpuHandle::kick`].
    pub on_call: Call,
    /// Counts its exits for [`VcpuHandle::stop`].
    pub stats: Option<ExitStats>,
    /// The host resets harts as [`restart`](super::restart) tells.
    pub follow_restarts: bool,
}

/// The signal that gets a thread out of KVM_RUN. Its handler does nothing: EINTR is the message.
fn kick_signal() -> i32 {
    SIGRTMIN()
}

extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl VcpuHandle {
    /// Runs `vcpu` on a thread of its own until `exits` ends it or the handle is dropped.
    ///
    /// # Errors
    /// The host refused the thread, its signal, or the vCPU's run page.
    pub fn start(mut vcpu: Box<dyn Vcpu>, exits: Arc<Exits>, how: Start) -> Result<Self> {
        let id = how.id;
        let refused = |act: &str, e: io::Error| Error::refused(format!("{act} vCPU {id}"), e);
        register_signal_handler(kick_signal(), on_kick)
            .map_err(|e| refused("set the signal of", e.into()))?;
        let kicker = vcpu.kicker()?;
        let waiting = match how.follow_restarts {
            true => Some(vcpu.waiting()?),
            false => None,
        };
        let shared = Arc::<Shared>::default();
        let mut hart = Hart {
            id,
            exits,
            restarts: Restarts::new(Arc::clone(&shared), how.on_call),
            follow_restarts: how.follow_restarts,
        };
        let mut stats = how.stats;
        let body = move || {
            // Whatever mask came over exec; it fails for numbers that are no signals.
            let _ = unblock_signal(kick_signal());
            if let Some(end) = hart.run(vcpu.as_mut(), stats.as_mut()).transpose() {
                (how.on_stop)(end);
            }
            if let Some(stats) = &mut stats {
                stats.read_counters(vcpu.as_ref());
            }
            stats
        };
        let thread = spawn(Kind::Vcpu, &id.to_string(), body)
            .map_err(|e| refused("start the thread of", e))?;
        Ok(Self {
            shared,
            kicker,
            waiting,
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
        self.shared.stopping.store(true, Ordering::Release);
        // Set before the signal: a thread that is about to enter KVM_RUN comes back at once.
        self.kicker.set_immediate_exit(true);
        self.kick();
    }

    /// Whether the vCPU wants to be kicked until it does not any more.
    pub fn wants_kick(&self) -> bool {
        self.shared.wants_kick.load(Ordering::Acquire)
    }

    /// Whether the host resets harts, so that they are looked at.
    pub fn follows_restarts(&self) -> bool {
        self.waiting.is_some()
    }

    /// Whether the vCPU's hart may have stopped unseen, on a host that resets harts.
    pub fn may_have_stopped(&self) -> bool {
        let sleeps = self.shared.sleeps.load(Ordering::Relaxed);
        !sleeps && self.waiting.as_ref().is_some_and(|wait| !wait.waits())
    }

    /// Gets the vCPU's thread out of KVM_RUN, or out of its own sleep.
    pub fn kick(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
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

/// What a vCPU's thread works with.
struct Hart {
    id: u32,
    exits: Arc<Exits>,
    restarts: Restarts,
    follow_restarts: bool,
}

/// Serves exits and nothing else.
struct Plain(Arc<Exits>);

impl Serve for Plain {
    type Next = Next;

    #[inline(always)]
    fn serve(&mut self, exit: VmExit) -> Next {
        self.0.handle(exit)
    }
}

/// Counts them too.
struct Counting<'a>(Arc<Exits>, &'a mut ExitStats);

impl Serve for Counting<'_> {
    type Next = Next;

    fn serve(&mut self, exit: VmExit) -> Next {
        let began = Instant::now();
        let next = self.0.handle(exit);
        self.1.add(&exit, began.elapsed());
        next
    }
}

impl Hart {
    /// Runs until the machine ends (`Some`) or the vCPU is stopped from outside (`None`).
    fn run(&mut self, vcpu: &mut dyn Vcpu, stats: Option<&mut ExitStats>) -> Result<Option<Stop>> {
        let entry = match self.begin(vcpu)? {
            Ok(entry) => entry,
            Err(stop) => return Ok(Some(stop)),
        };
        let exits = Arc::clone(&self.exits);
        if let Some(stats) = stats {
            return self.run_loop(&mut { vcpu }, &mut Counting(exits, stats), entry);
        }
        #[cfg(target_arch = "riscv64")]
        if let Some(vcpu) = vcpu.as_kvm() {
            return self.run_loop(vcpu, &mut Plain(exits), entry);
        }
        self.run_loop(&mut { vcpu }, &mut Plain(exits), entry)
    }

    fn run_loop<V: RunAnd, S: Serve<Next = Next>>(
        &mut self,
        vcpu: &mut V,
        server: &mut S,
        mut entry: VmEntry,
    ) -> Result<Option<Stop>> {
        while !self.restarts.shared.is_stopping() {
            entry = match vcpu.run_and(entry, server)? {
                Next::Enter(next) => next,
                Next::Rare(rare) => match self.settle(vcpu.as_vcpu(), rare)? {
                    Ok(entry) => entry,
                    Err(stop) => return Ok(Some(stop)),
                },
            };
        }
        Ok(None)
    }

    /// Where KVM resets harts that are started, all but the one that boots wait for it here.
    fn begin(&mut self, vcpu: &mut dyn Vcpu) -> Result<Settled> {
        if !self.follow_restarts || self.id == BOOT_HART {
            return Ok(Ok(VmEntry::Run));
        }
        let unserved = self.restarts.wait_for_start(vcpu)?;
        self.serve_rest(vcpu, unserved)
    }

    /// What comes of `rare`.
    #[cold]
    #[inline(never)]
    fn settle(&mut self, vcpu: &mut dyn Vcpu, rare: Rare) -> Result<Settled> {
        let unserved = match rare {
            Rare::Look if self.follow_restarts => self.restarts.look(vcpu)?,
            Rare::Look => None,
            Rare::Suspend => {
                let suspend = &self.exits.suspend;
                suspend.sleep(self.id, vcpu, &mut self.restarts)?
            }
            Rare::Stop(stop) => {
                let Stop::Unrunnable { errno, pc } = *stop else {
                    return Ok(Err(*stop));
                };
                if let Some(stop) = self.exits.fetch_faults.answer(vcpu, errno, pc)? {
                    return Ok(Err(stop));
                }
                None
            }
        };
        self.serve_rest(vcpu, unserved)
    }

    /// Serves the exit that something else than the loop brought, if it did.
    fn serve_rest(&mut self, vcpu: &mut dyn Vcpu, unserved: Option<VmExit>) -> Result<Settled> {
        match unserved.map(|exit| self.exits.handle(exit)) {
            None => Ok(Ok(VmEntry::Run)),
            Some(Next::Enter(entry)) => Ok(Ok(entry)),
            Some(Next::Rare(rare)) => self.settle(vcpu, rare),
        }
    }
}

/// How a vCPU runs on, or why it does not.
type Settled = std::result::Result<VmEntry, Stop>;

/// The hart that runs from the start.
const BOOT_HART: u32 = 0;

#[cfg(test)]
mod tests;
