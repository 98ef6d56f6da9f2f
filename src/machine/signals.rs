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
//! nohup. The main thread handles signals, and all others block them. Before the machine runs, and
//! once it has ended, a signal that ends rvmm does so at once: its action is the default one.

use std::io;

use event_manager::{EventOps, Events, MutEventSubscriber};
use libc::{
    SIGALRM, SIGCONT, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGPWR, SIGQUIT, SIGSTKFLT, SIGTERM, SIGTSTP,
    SIGTTIN, SIGTTOU, SIGUSR1, SIGUSR2, SIGVTALRM, SIGWINCH, SIGXCPU, SIGXFSZ,
};
use rustix::process::{Signal, getpid, kill_process};
use vmm_sys_util::signal::{SIGRTMAX, SIGRTMIN};

use super::Outcome;
use super::ending::Ending;
use super::mainloop::watch;
use crate::devices::console::terminal;
use crate::util::signal::{Blocked, SignalFd, is_ignored, set_mask};

/// Signals that end rvmm in order.
const ENDS: [i32; 13] = [
    SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGALRM, SIGVTALRM, SIGPROF, SIGUSR1, SIGUSR2, SIGIO, SIGPWR,
    SIGSTKFLT, SIGXCPU,
];

/// Signals that are blocked. All real-time signals but the first are blocked too.
const BLOCKED: [i32; 3] = [SIGXFSZ, SIGTTIN, SIGTTOU];

/// Sets the process's signal mask according to the table, whatever mask it was started with. Must
/// be called before other threads start, because they inherit the mask.
pub fn prepare() {
    let real_time = SIGRTMIN() + 1..=SIGRTMAX();
    set_mask(BLOCKED.into_iter().chain(real_time));
}

/// Handles signals on the main loop. After it is dropped, signals have their default actions.
pub(super) struct Signals<F> {
    arrived: SignalFd,
    ending: Ending,
    /// The first SIGTERM presses the power key.
    presses: bool,
    on_resize: F,
    /// Signals arrive at `arrived` while they are blocked.
    _blocked: Blocked,
}

impl<F: Fn()> Signals<F> {
    /// Starts to handle signals. Signals that end rvmm are passed to `ending`; if `presses`, the
    /// first SIGTERM presses the power key instead. SIGTSTP restores the terminal's mode, SIGCONT
    /// sets raw mode again, and SIGWINCH calls `on_resize`.
    ///
    /// # Errors
    /// Fails if the host has no descriptors left.
    pub(super) fn new(ending: Ending, presses: bool, on_resize: F) -> io::Result<Self> {
        let wanted = ENDS.into_iter().chain([SIGTSTP]);
        let wanted = wanted.filter(|signal| !is_ignored(*signal));
        let wanted: Vec<i32> = wanted.chain([SIGCONT, SIGWINCH]).collect();
        Ok(Self {
            arrived: SignalFd::new(wanted.iter().copied())?,
            ending,
            presses,
            on_resize,
            _blocked: Blocked::new(wanted),
        })
    }
}

impl<F: Fn()> MutEventSubscriber for Signals<F> {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.arrived, "signals");
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let mut stops = false;
        while let Some(signal) = self.arrived.take() {
            match signal {
                SIGTSTP => {
                    terminal::restore();
                    stops = true;
                }
                SIGCONT => {
                    terminal::resume();
                    stops = false;
                }
                SIGWINCH => (self.on_resize)(),
                SIGTERM if std::mem::take(&mut self.presses) => self.ending.press(),
                _ => self.ending.ask(Outcome::Signal(signal)),
            }
        }
        // Not if SIGCONT has come since: nobody would send another one.
        if stops {
            // Stops all threads. A process may always do this to itself.
            let _ = kill_process(getpid(), Signal::STOP);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::mainloop::{Event, MainLoop, Post};
    use crate::util::signal::raise;
    use std::time::Duration;
    use vmm_sys_util::signal::{block_signal, get_blocked_signals};

    const LONG: Duration = Duration::from_secs(1000);

    /// Each of these signals would end this process by default.
    #[test]
    fn what_ends_a_process_ends_the_machine_in_order() {
        let (post, arrived) = Post::new().unwrap();
        let mut main = MainLoop::new(&post, arrived).unwrap();
        let ending = Ending::with(post, LONG, |_| ());
        main.add(Box::new(
            Signals::new(ending.clone(), false, || ()).unwrap(),
        ));
        for signal in ENDS {
            assert!(raise(signal));
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
            assert!(raise(signal));
        }
        // qemu-riscv64 uses the last ones itself.
        let real_time = SIGRTMIN() + 1..=SIGRTMAX();
        let raised = real_time.filter(|signal| raise(*signal)).count();
        assert!(raised >= 20, "{raised} real-time signals");
    }

    /// A mask that blocks everything, as a careless parent may leave it over exec.
    #[test]
    fn an_inherited_mask_keeps_no_signal_out() {
        for signal in ENDS {
            let _ = block_signal(signal);
        }
        prepare();
        let blocked = get_blocked_signals().unwrap();
        assert!(blocked.contains(&SIGXFSZ));
        for signal in ENDS {
            assert!(!blocked.contains(&signal), "signal {signal}");
        }
    }
}
