//! The thread that runs a vCPU, and the handle that stops it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{fmt, io};

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

use super::Stop;
use super::exits::{Exits, Next, Rare};
use super::first::{First, Sleeper, Waited};
use super::hart;
use super::nudge::Nudge;
use super::restart::{Call, Restarts, Shared};
use super::stats::ExitStats;
use crate::hypervisor::{Error, Kicker, Result, RunAnd, Serve, Vcpu, VmEntry, VmExit, Waiting};
use crate::trace::{Event, Tracer, Track, What};
use crate::util::cputime::cpu_time;
use crate::util::sync::lock;
use crate::util::thread::{Kind, spawn};

/// Called when a vCPU's thread ends by itself. Not called when the handle stops it.
pub type OnStop = Box<dyn FnOnce(Result<Stop>) + Send>;

/// A running vCPU. Dropping it stops the vCPU and waits for its thread.
pub struct VcpuHandle {
    shared: Arc<Shared>,
    kicker: Box<dyn Kicker>,
    /// Only on a host that resets harts (see [`restart`](super::restart)).
    waiting: Option<Box<dyn Waiting>>,
    thread: Option<JoinHandle<Option<Parked>>>,
}

/// A vCPU without a thread. The result of its last exit is in its registers, and
/// [`VcpuHandle::prepare`] continues from there.
pub struct Parked {
    /// The vCPU.
    pub vcpu: Box<dyn Vcpu>,
    /// The first action of its next thread.
    pub first: First,
    /// The statistics so far, if exits are counted.
    pub stats: Option<ExitStats>,
}

impl Parked {
    /// The vCPU of hart `hart` before it has run. `host_resets_harts`: see
    /// [`restart`](super::restart). Its exits are counted in `stats`, if given.
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

/// A vCPU with a thread that waits for it.
pub struct Ready {
    // Before the handle: dropping this ends the thread, which dropping the handle waits for.
    hand: SyncSender<Parked>,
    handle: VcpuHandle,
    parked: Parked,
}

impl Ready {
    /// Lets the vCPU run.
    pub fn go(self) -> VcpuHandle {
        // This cannot fail: the thread exists, and the channel has room for one vCPU.
        let _ = self.hand.send(self.parked);
        self.handle
    }

    /// Ends the thread. The vCPU has not run.
    pub fn cancel(self) -> Parked {
        self.parked
    }
}

/// A vCPU that could not be started, with the error.
pub struct NotStarted(Box<(Parked, Error)>);

impl NotStarted {
    fn new(parked: Parked, error: Error) -> Self {
        Self(Box::new((parked, error)))
    }

    /// The vCPU, which has not run, and the error.
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
    /// The number of its hart.
    pub id: u32,
    /// Called when the thread ends by itself.
    pub on_stop: OnStop,
    /// Called when the thread wants to be kicked by [`VcpuHandle::kick`].
    pub on_call: Call,
    /// Whether the host resets harts (see [`restart`](super::restart)).
    pub follow_restarts: bool,
    /// If set, exits are recorded.
    pub tracer: Option<Tracer>,
}

/// The signal that interrupts KVM_RUN. Its handler does nothing: the effect is that KVM_RUN returns
/// EINTR.
pub(super) fn kick_signal() -> i32 {
    SIGRTMIN()
}

pub(super) extern "C" fn on_kick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl VcpuHandle {
    /// Makes a thread for the vCPU of `parked`. [`Ready::go`] then runs the vCPU on it until
    /// `exits` ends it or the handle stops it.
    ///
    /// # Errors
    /// Fails if the thread cannot be started, if its signal handler cannot be set, or if the vCPU's
    /// run page cannot be mapped. The error has the vCPU, which has not run.
    pub fn prepare(
        parked: Parked,
        exits: Arc<Exits>,
        how: Start,
    ) -> std::result::Result<Ready, NotStarted> {
        let (hand, take) = sync_channel(1);
        match Self::start_thread(&parked, take, exits, how) {
            Ok(handle) => Ok(Ready {
                hand,
                handle,
                parked,
            }),
            Err(error) => Err(NotStarted::new(parked, error)),
        }
    }

    /// Starts the thread, which first waits for the vCPU from `take`.
    fn start_thread(
        parked: &Parked,
        take: Receiver<Parked>,
        exits: Arc<Exits>,
        how: Start,
    ) -> Result<Self> {
        let id = how.id;
        let refused = |act: &str, e: io::Error| Error::refused(format!("{act} vCPU {id}"), e);
        register_signal_handler(kick_signal(), on_kick)
            .map_err(|e| refused("set the signal handler of", e.into()))?;
        let kicker = parked.vcpu.kicker()?;
        // The previous thread was stopped by this flag.
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
            nudge: Nudge::default(),
            follow_restarts: how.follow_restarts,
            tracer: how.tracer,
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
    /// Stops the vCPU, waits for its thread, and returns the vCPU. None if the thread panicked,
    /// which ends the process.
    pub fn stop(mut self) -> Option<Parked> {
        self.join()
    }

    /// Asks the vCPU to stop, without waiting for it.
    pub fn ask_to_stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        // Set this before the signal: a thread that is about to enter KVM_RUN then returns from it
        // at once.
        self.kicker.set_immediate_exit(true);
        self.kick();
    }

    /// Whether the vCPU wants to be kicked. It must be kicked repeatedly until this is false.
    pub fn wants_kick(&self) -> bool {
        self.shared.wants_kick.load(Ordering::Acquire)
    }

    /// Whether the vCPU must be kicked for regular looks, because the host resets harts.
    pub fn follows_restarts(&self) -> bool {
        self.waiting.is_some()
    }

    /// Whether the vCPU's hart may have stopped inside KVM_RUN, on a host that resets harts.
    pub fn may_have_stopped(&self) -> bool {
        let sleeps = self.shared.sleeps.load(Ordering::Relaxed);
        !sleeps && self.waiting.as_ref().is_some_and(|wait| !wait.waits())
    }

    /// Asks for a sample of the hart's registers. The vCPU takes it soon if it runs in the guest,
    /// and does not if its hart waits or is stopped.
    pub fn ask_for_sample(&self) {
        self.shared.wants_sample.store(true, Ordering::Release);
        self.kick();
    }

    /// The sample that was asked for, if the vCPU has taken it.
    pub fn take_sample(&self) -> Option<hart::Hart> {
        lock(&self.shared.sample).take()
    }

    /// The CPU time that the vCPU's thread has used, in the guest and outside. None if the thread
    /// has ended.
    pub fn cpu_time(&self) -> Option<Duration> {
        cpu_time(self.thread.as_ref()?)
    }

    /// Interrupts the KVM_RUN of the vCPU's thread, or its sleep.
    pub fn kick(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
            // Fails if the thread has ended already.
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

/// The state of a vCPU's thread.
struct Hart {
    id: u32,
    exits: Arc<Exits>,
    restarts: Restarts,
    nudge: Nudge,
    follow_restarts: bool,
    tracer: Option<Tracer>,
}

/// Handles exits without counting them.
struct Plain(Arc<Exits>);

impl Serve for Plain {
    type Next = Next;

    #[inline(always)]
    fn serve(&mut self, exit: VmExit) -> Next {
        self.0.handle(exit)
    }
}

/// Handles exits, and counts or records them.
struct Watched<'a> {
    hart: u32,
    exits: Arc<Exits>,
    stats: Option<&'a mut ExitStats>,
    tracer: Option<Tracer>,
}

impl Serve for Watched<'_> {
    type Next = Next;

    fn serve(&mut self, exit: VmExit) -> Next {
        let at = Instant::now();
        let next = self.exits.handle(exit);
        let time = at.elapsed();
        if let Some(stats) = &mut self.stats {
            stats.add(&exit, time);
        }
        if let Some(tracer) = &self.tracer {
            let entry = match &next {
                Next::Enter(entry) => Some(*entry),
                Next::Rare(_) => None,
            };
            tracer.record(Event {
                track: Track::Vcpu(self.hart),
                at,
                time,
                what: What::Exit(exit, entry),
            });
        }
        next
    }
}

impl Hart {
    /// The body of the thread: runs the vCPU, and returns it.
    fn live(mut self, parked: Parked, on_stop: OnStop) -> Parked {
        let Parked {
            mut vcpu,
            first,
            mut stats,
        } = parked;
        // The signal may be blocked by a mask inherited over exec. This fails only for invalid
        // signal numbers.
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

    /// Runs until the vCPU ends the machine or the handle stops it.
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
        if stats.is_some() || self.tracer.is_some() {
            let mut watched = Watched {
                hart: self.id,
                exits,
                stats,
                tracer: self.tracer.clone(),
            };
            return self.run_loop(&mut { vcpu }, &mut watched, entry);
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
        // Let KVM complete a pending load, SBI call or CSR access.
        vcpu.as_vcpu().complete(entry)?;
        Ok(Leave::Park(self.nudge.first()))
    }

    fn begin(&mut self, vcpu: &mut dyn Vcpu, first: First) -> Result<Settled> {
        let waited = match first {
            First::Enter => Waited::DONE,
            First::EnterNudged => {
                let Restarts { shared, call } = &self.restarts;
                self.nudge.begin(shared, call);
                Waited::DONE
            }
            First::WaitForStart => self.restarts.wait_for_start(vcpu)?,
            First::TakeReset => self.restarts.take_reset(vcpu, VmEntry::Run)?,
            First::Sleep(sleeper) => self.sleep(vcpu, sleeper)?,
        };
        self.after(vcpu, waited)
    }

    /// Does the rare work, and returns how the vCPU goes on.
    #[cold]
    #[inline(never)]
    fn settle(&mut self, vcpu: &mut dyn Vcpu, rare: Rare) -> Result<Settled> {
        let waited = match rare {
            Rare::Look => {
                self.sample(vcpu)?;
                self.nudge.look(vcpu, &self.restarts.shared)?;
                match self.follow_restarts {
                    true => self.restarts.look(vcpu)?,
                    false => Waited::DONE,
                }
            }
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

    /// Takes a sample of the hart if the machine wants one.
    fn sample(&self, vcpu: &dyn Vcpu) -> Result<()> {
        let shared = &self.restarts.shared;
        if shared.wants_sample.swap(false, Ordering::Acquire) {
            *lock(&shared.sample) = Some(hart::Hart::read(self.id, vcpu)?);
        }
        Ok(())
    }

    fn sleep(&mut self, vcpu: &mut dyn Vcpu, sleeper: Sleeper) -> Result<Waited> {
        let suspend = &self.exits.suspend;
        suspend.sleep(self.id, vcpu, &mut self.restarts, sleeper)
    }

    /// Continues after a wait. If an exit came during it, handles that exit.
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

/// How to enter the guest next, or why the thread ends.
type Settled = std::result::Result<VmEntry, Leave>;

/// Why a vCPU's thread ends.
enum Leave {
    /// The machine ends.
    End(Stop),
    /// The handle stopped the thread. The next thread begins with this.
    Park(First),
}

#[cfg(test)]
mod tests;
