//! The thread that runs a vCPU, and the handle with which others stop it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;
use std::{fmt, io};

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

use super::Stop;
use super::exits::{Exits, Next, Rare};
use super::first::{First, Sleeper, Waited};
use super::restart::{Call, Restarts, Shared};
use super::stats::ExitStats;
use crate::hypervisor::{Error, Kicker, Result, RunAnd, Serve, Vcpu, VmEntry, VmExit, Waiting};
use crate::util::thread::{Kind, spawn};

/// How a vCPU's thread ends by itself; it is not called when the thread was stopped from outside.
pub type OnStop = Box<dyn FnOnce(Result<Stop>) + Send>;

/// A running vCPU. Dropping it stops the vCPU and waits for its thread.
pub struct VcpuHandle {
    shared: Arc<Shared>,
    kicker: Box<dyn Kicker>,
    /// On a host that resets harts unseen.
    waiting: Option<Box<dyn Waiting>>,
    thread: Option<JoinHandle<Option<Parked>>>,
}

/// A vCPU without a thread. What its last exit was to give the guest is in its registers, and
/// [`VcpuHandle::start`] goes on from there.
pub struct Parked {
    /// The vCPU.
    pub vcpu: Box<dyn Vcpu>,
    /// What its next thread does first.
    pub first: First,
    /// The exits counted so far, if they are.
    pub stats: Option<ExitStats>,
}

impl Parked {
    /// The vCPU of hart `hart` before it ran, on a host that resets harts or not. Its exits are counted in
    /// `stats`, if given.
    pub fn of_new(
        vcpu: Box<dyn Vcpu>,
        hart: u32,
        host_resets_harts: bool,
        stats: Option<ExitStats>,
    ) -> Self {
        let first = First::of_new(hart, host_resets_harts);
        Self { vcpu, first, stats }
    }
}

/// A vCPU that could not be started, and why.
pub struct NotStarted(Box<(Parked, Error)>);

impl NotStarted {
    fn new(parked: Parked, error: Error) -> Self {
        Self(Box::new((parked, error)))
    }

    /// The vCPU as it was, and what failed.
    pub fn into_parts(self) -> (Parked, Error) {
        *self.0
    }
}

impl fmt::Debug for NotStarted {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.1.fmt(f)
    }
}

/// How to run a vCPU.
pub struct Start {
    /// Its hart.
    pub id: u32,
    /// Called when it ends by itself.
    pub on_stop: OnStop,
    /// Called when it wants to be kicked, by [`VcpuHandle::kick`].
    pub on_call: Call,
    /// The host resets harts as [`restart`](super::restart) tells.
    pub follow_restarts: bool,
}

/// The signal that gets a thread out of KVM_RUN. Its handler does nothing: EINTR is the message.
fn kick_signal() -> i32 {
    SIGRTMIN()
}

extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl VcpuHandle {
    /// Runs the vCPU of `parked` on a thread of its own until `exits` ends it or the handle stops it.
    ///
    /// # Errors
    /// The thread cannot be started, its signal not be set, or the vCPU's run page not be had. The vCPU is
    /// given back as it was.
    pub fn start(
        parked: Parked,
        exits: Arc<Exits>,
        how: Start,
    ) -> std::result::Result<Self, NotStarted> {
        // The vCPU follows when there is a thread: a thread that cannot be started would take it along.
        let (hand, take) = sync_channel(1);
        match Self::start_thread(&parked, take, exits, how) {
            Ok(handle) => {
                // The thread waits for nothing else.
                let _ = hand.send(parked);
                Ok(handle)
            }
            Err(error) => Err(NotStarted::new(parked, error)),
        }
    }

    /// Starts the thread, which waits for the vCPU.
    fn start_thread(
        parked: &Parked,
        take: Receiver<Parked>,
        exits: Arc<Exits>,
        how: Start,
    ) -> Result<Self> {
        let id = how.id;
        let refused = |act: &str, e: io::Error| Error::refused(format!("{act} vCPU {id}"), e);
        register_signal_handler(kick_signal(), on_kick)
            .map_err(|e| refused("set the signal of", e.into()))?;
        let kicker = parked.vcpu.kicker()?;
        // The thread before was stopped by it.
        kicker.set_immediate_exit(false);
        let waiting = match how.follow_restarts {
            true => Some(parked.vcpu.waiting()?),
            false => None,
        };
        let shared = Arc::<Shared>::default();
        let hart = Hart {
            id,
            exits,
            restarts: Restarts::new(Arc::clone(&shared), how.on_call),
            follow_restarts: how.follow_restarts,
        };
        let thread = spawn(Kind::Vcpu, &id.to_string(), move || {
            let parked = take.recv().ok()?;
            Some(hart.live(parked, how.on_stop))
        })
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
    /// Stops the vCPU, waits for its thread, and takes the vCPU back. None where the thread panicked, which
    /// ends the process.
    pub fn stop(mut self) -> Option<Parked> {
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

    fn join(&mut self) -> Option<Parked> {
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
    /// The life of the thread: runs the vCPU, and hands it back.
    fn live(mut self, parked: Parked, on_stop: OnStop) -> Parked {
        let Parked {
            mut vcpu,
            first,
            mut stats,
        } = parked;
        // Whatever mask came over exec; it fails for numbers that are no signals.
        let _ = unblock_signal(kick_signal());
        let first = match self.run(vcpu.as_mut(), stats.as_mut(), first) {
            Ok(Leave::Park(first)) => first,
            Ok(Leave::End(stop)) => {
                on_stop(Ok(stop));
                First::Enter
            }
            Err(error) => {
                on_stop(Err(error));
                First::Enter
            }
        };
        if let Some(stats) = &mut stats {
            stats.read_counters(vcpu.as_ref());
        }
        Parked { vcpu, first, stats }
    }

    /// Runs until the vCPU ends the machine, or is stopped from outside.
    fn run(
        &mut self,
        vcpu: &mut dyn Vcpu,
        stats: Option<&mut ExitStats>,
        first: First,
    ) -> Result<Leave> {
        let entry = match self.begin(vcpu, first)? {
            Ok(entry) => entry,
            Err(leave) => return Ok(leave),
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
    ) -> Result<Leave> {
        while !self.restarts.shared.is_stopping() {
            entry = match vcpu.run_and(entry, server)? {
                Next::Enter(next) => next,
                Next::Rare(rare) => match self.settle(vcpu.as_vcpu(), rare)? {
                    Ok(entry) => entry,
                    Err(leave) => return Ok(leave),
                },
            };
        }
        // A load, an SBI call or a CSR access may still wait for its result.
        vcpu.as_vcpu().complete(entry)?;
        Ok(Leave::Park(First::Enter))
    }

    fn begin(&mut self, vcpu: &mut dyn Vcpu, first: First) -> Result<Settled> {
        let waited = match first {
            First::Enter => Waited::DONE,
            First::WaitForStart => self.restarts.wait_for_start(vcpu)?,
            First::TakeReset => self.restarts.take_reset(vcpu, VmEntry::Run)?,
            First::Sleep(sleeper) => self.sleep(vcpu, sleeper)?,
        };
        self.after(vcpu, waited)
    }

    /// What comes of `rare`.
    #[cold]
    #[inline(never)]
    fn settle(&mut self, vcpu: &mut dyn Vcpu, rare: Rare) -> Result<Settled> {
        let waited = match rare {
            Rare::Look if self.follow_restarts => self.restarts.look(vcpu)?,
            Rare::Look => Waited::DONE,
            Rare::Suspend => {
                let sleeper = self.exits.suspend.begin(self.id, vcpu)?;
                self.sleep(vcpu, sleeper)?
            }
            Rare::Stop(stop) => {
                let Stop::Unrunnable { errno, pc } = *stop else {
                    return Ok(Err(Leave::End(*stop)));
                };
                if let Some(stop) = self.exits.fetch_faults.answer(vcpu, errno, pc)? {
                    return Ok(Err(Leave::End(stop)));
                }
                Waited::DONE
            }
        };
        self.after(vcpu, waited)
    }

    fn sleep(&mut self, vcpu: &mut dyn Vcpu, sleeper: Sleeper) -> Result<Waited> {
        let suspend = &self.exits.suspend;
        suspend.sleep(self.id, vcpu, &mut self.restarts, sleeper)
    }

    /// What comes after a wait: the exit that it brought, if it did, is served.
    fn after(&mut self, vcpu: &mut dyn Vcpu, waited: Waited) -> Result<Settled> {
        let unserved = match waited {
            Waited::Over(unserved) => unserved,
            Waited::Asked(first) => return Ok(Err(Leave::Park(first))),
        };
        match unserved.map(|exit| self.exits.handle(exit)) {
            None => Ok(Ok(VmEntry::Run)),
            Some(Next::Enter(entry)) => Ok(Ok(entry)),
            Some(Next::Rare(rare)) => self.settle(vcpu, rare),
        }
    }
}

/// How a vCPU runs on, or why it does not.
type Settled = std::result::Result<VmEntry, Leave>;

/// Why a vCPU's thread ends.
enum Leave {
    /// The machine ends.
    End(Stop),
    /// The thread was stopped from outside; the next one begins with this.
    Park(First),
}

#[cfg(test)]
mod tests;
