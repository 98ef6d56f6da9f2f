//! Signal handling. This table has the effect of each signal on rvmm:
//!
//! | signal | rvmm |
//! |---|---|
//! | SIGHUP, SIGINT, SIGQUIT, SIGTERM | end it in order: the terminal is restored, status 128+n |
//! | SIGTERM with `--on-sigterm poweroff` | asks the guest to power off first |
//! | SIGALRM, SIGVTALRM, SIGPROF, SIGXCPU | end it in order; the default is at once |
//! | SIGUSR1, SIGUSR2, SIGIO, SIGPWR, SIGSTKFLT | as the line above |
//! | SIGTSTP | restores the terminal, then stops the process |
//! | SIGCONT | goes on; sets the terminal to raw mode again if rvmm is in the foreground |
//! | SIGWINCH | the guest gets the new size of the terminal window |
//! | SIGXFSZ | blocked: the write fails with EFBIG, and is handled like a full disk |
//! | SIGTTIN, SIGTTOU | blocked: a guest keeps running in the background, see [`terminal`] |
//! | SIGPIPE | ignored by Rust's runtime: the write fails with EPIPE |
//! | SIGRTMIN | interrupts the KVM_RUN of a vCPU's thread (`vcpu::thread`) |
//! | other real-time signals | blocked: rvmm does not use them |
//! | SIGABRT, SIGBUS, SIGFPE, SIGILL | bugs in rvmm: default action, with a core dump |
//! | SIGSEGV, SIGSYS, SIGTRAP | as the line above |
//! | SIGKILL, SIGSTOP | default action; a process cannot change it |
//! | SIGCHLD, SIGURG | do nothing, as by default |
//!
//! A signal that would end or stop rvmm stays ignored if rvmm was started with it ignored, as by
//! nohup. Once the machine has ended, a signal that ends rvmm does so at once.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, Events, MutEventSubscriber};
use signal_hook::consts::{
    SIGALRM, SIGCONT, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGQUIT, SIGTERM, SIGTSTP, SIGTTIN, SIGTTOU,
    SIGUSR1, SIGUSR2, SIGVTALRM, SIGWINCH, SIGXCPU, SIGXFSZ,
};
use signal_hook::flag::{
    register_conditional_default, register_conditional_shutdown, register_usize,
};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;
use signal_hook::low_level::emulate_default_handler;
use vmm_sys_util::signal::{SIGRTMAX, SIGRTMIN, block_signal, unblock_signal};

use super::Outcome;
use super::ending::Ending;
use super::mainloop::watch;
use crate::devices::console::terminal;
use crate::util::signal::is_ignored;
use crate::util::sync::lock;

/// Signals that end rvmm in order.
const ENDS: [i32; 13] = [
    SIGHUP,
    SIGINT,
    SIGQUIT,
    SIGTERM,
    SIGALRM,
    SIGVTALRM,
    SIGPROF,
    SIGUSR1,
    SIGUSR2,
    SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
    SIGXCPU,
];

/// Signals that are blocked. All real-time signals but the first are blocked too.
const BLOCKED: [i32; 3] = [SIGXFSZ, SIGTTIN, SIGTTOU];

/// Values of a flag that has which of SIGTSTP and SIGCONT came last.
const STOPPING: usize = 1;
const GOING: usize = 0;

/// A flag that is true while no machine runs. Signals end the process at once then. None before the
/// first machine has ended: until one runs, signals have their default actions.
static OVER: Mutex<Option<Arc<AtomicBool>>> = Mutex::new(None);

/// Sets the process's signal mask according to the table, whatever mask it was started with. Must
/// be called before other threads start, because they inherit the mask.
pub fn prepare() {
    let real_time = SIGRTMIN() + 1..=SIGRTMAX();
    for signal in BLOCKED.into_iter().chain(real_time) {
        // Fails if the signal is blocked already.
        let _ = block_signal(signal);
    }
    let heard = [SIGTSTP, SIGCONT, SIGWINCH];
    for signal in ENDS.into_iter().chain(heard) {
        // Fails only for invalid signal numbers.
        let _ = unblock_signal(signal);
    }
}

/// Handles signals on the main loop. After it is dropped, signals end the process at once.
pub(super) struct Signals<F> {
    delivery: SignalDelivery<UnixStream, SignalOnly>,
    ending: Ending,
    /// The first SIGTERM presses the power key.
    presses: bool,
    on_resize: F,
    stopping: Arc<AtomicUsize>,
    /// The signals that end or stop rvmm.
    wanted: Vec<i32>,
}

impl<F: Fn()> Signals<F> {
    /// Starts to handle signals. Signals that end rvmm are passed to `ending`; if `presses`, the
    /// first SIGTERM presses the power key instead. SIGTSTP restores the terminal's mode, SIGCONT
    /// sets raw mode again, and SIGWINCH calls `on_resize`.
    ///
    /// # Errors
    /// Fails if the host has no descriptors left, or if a handler cannot be set.
    pub(super) fn new(ending: Ending, presses: bool, on_resize: F) -> io::Result<Self> {
        let wanted = ENDS.into_iter().chain([SIGTSTP]);
        let wanted: Vec<i32> = wanted.filter(|signal| !is_ignored(*signal)).collect();
        let stopping = Arc::new(AtomicUsize::new(GOING));
        register_usize(SIGCONT, Arc::clone(&stopping), GOING)?;
        register_usize(SIGTSTP, Arc::clone(&stopping), STOPPING)?;
        let (read, write) = UnixStream::pair()?;
        let heard = wanted.iter().copied().chain([SIGCONT, SIGWINCH]);
        let delivery = SignalDelivery::with_pipe(read, write, SignalOnly, heard)?;
        // From here on the main loop handles signals.
        if let Some(over) = &*lock(&OVER) {
            over.store(false, Ordering::Release);
        }
        Ok(Self {
            delivery,
            ending,
            presses,
            on_resize,
            stopping,
            wanted,
        })
    }
}

impl<F: Fn()> MutEventSubscriber for Signals<F> {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, self.delivery.get_read(), "signals");
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        for signal in self.delivery.pending() {
            match signal {
                SIGTSTP => suspend(&self.stopping),
                SIGCONT => terminal::resume(),
                SIGWINCH => (self.on_resize)(),
                SIGTERM if std::mem::take(&mut self.presses) => self.ending.press(),
                _ => self.ending.ask(Outcome::Signal(signal)),
            }
        }
    }
}

/// Makes `signals` end the process at once, and SIGTSTP stop it. Without that, signals would be
/// lost while no main loop handles them. The process exits with the status that a shell shows for a
/// signal, 128+n, because signal-hook does not know the default actions of SIGPWR and SIGSTKFLT.
fn end_at_once(signals: &[i32]) -> io::Result<()> {
    let mut known = lock(&OVER);
    if let Some(over) = &*known {
        over.store(true, Ordering::Release);
        return Ok(());
    }
    let over = Arc::new(AtomicBool::new(true));
    for signal in signals.iter().copied() {
        let over = Arc::clone(&over);
        if signal == SIGTSTP {
            register_conditional_default(signal, over)?;
        } else {
            register_conditional_shutdown(signal, 128 + signal, over)?;
        }
    }
    *known = Some(over);
    Ok(())
}

/// Stops the whole process, vCPUs too, after restoring the terminal's mode. Does nothing if SIGCONT
/// has come since, as Linux does: nobody would send another one.
fn suspend(stopping: &AtomicUsize) {
    terminal::restore();
    if stopping.load(Ordering::Acquire) == STOPPING {
        // Fails only for signals without a default action.
        let _ = emulate_default_handler(SIGTSTP);
    } else {
        terminal::resume();
    }
}

impl<F> Drop for Signals<F> {
    fn drop(&mut self) {
        // Not at the start, where it would delay the guest. It fails only for invalid signals:
        // their handlers are set already.
        let _ = end_at_once(&self.wanted);
        self.delivery.handle().close();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::machine::mainloop::{Event, MainLoop, Post};
    use signal_hook::low_level::raise;
    use std::time::Duration;

    /// Held by tests that handle signals, because signals go to the whole process.
    pub(in crate::machine) static ALONE: Mutex<()> = Mutex::new(());

    const LONG: Duration = Duration::from_secs(1000);

    /// Each of these signals would end this process by default.
    #[test]
    fn what_ends_a_process_ends_the_machine_in_order() {
        let _alone = lock(&ALONE);
        let (post, arrived) = Post::new().unwrap();
        let mut main = MainLoop::new(&post, arrived).unwrap();
        let ending = Ending::with(post, LONG, |_| ());
        main.add(Box::new(
            Signals::new(ending.clone(), false, || ()).unwrap(),
        ));
        for signal in ENDS {
            raise(signal).unwrap();
            let Ok(Some(Event::Asked(outcome))) = main.next(LONG) else {
                panic!("signal {signal}: no event");
            };
            assert_eq!(outcome, Outcome::Signal(signal));
        }
        drop(main);
        ending.came();
    }

    /// Each of these signals would end or stop this process by default.
    #[test]
    fn what_is_no_request_changes_nothing() {
        prepare();
        for signal in BLOCKED {
            raise(signal).unwrap();
        }
        // qemu-riscv64 uses the last ones itself.
        let real_time = SIGRTMIN() + 1..=SIGRTMAX();
        let raised = real_time.filter(|signal| raise(*signal).is_ok()).count();
        assert!(raised >= 20, "{raised} real-time signals");
    }

    /// A mask that blocks everything, as a careless parent may leave it over exec.
    #[test]
    fn an_inherited_mask_keeps_no_signal_out() {
        for signal in ENDS {
            let _ = block_signal(signal);
        }
        prepare();
        let blocked = vmm_sys_util::signal::get_blocked_signals().unwrap();
        assert!(blocked.contains(&SIGXFSZ));
        for signal in ENDS {
            assert!(!blocked.contains(&signal), "signal {signal}");
        }
    }
}
