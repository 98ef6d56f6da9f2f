//! Signals: what each of them does to rvmm.
//!
//! | signal | rvmm |
//! |---|---|
//! | SIGHUP, SIGINT, SIGQUIT, SIGTERM | ends in order: the terminal restored, status 128+n; SIGTERM may ask the guest first |
//! | SIGALRM, SIGVTALRM, SIGPROF, SIGXCPU | the same: by default they end a process at once |
//! | SIGUSR1, SIGUSR2, SIGIO, SIGPWR, SIGSTKFLT | the same |
//! | SIGTSTP | restores the terminal, then stops |
//! | SIGCONT | goes on, with the terminal where it is in the foreground |
//! | SIGWINCH | tells the guest of the new window |
//! | SIGXFSZ | never comes: the write fails with EFBIG, an error like a full disk |
//! | SIGTTIN, SIGTTOU | never come: a guest runs on in the background, see [`terminal`] |
//! | SIGPIPE | ignored, by Rust's runtime: the write fails with EPIPE |
//! | SIGRTMIN | gets a vCPU's thread out of the guest (`vcpu::thread`) |
//! | other real-time signals | never come: nobody has agreed with rvmm on one |
//! | SIGABRT, SIGBUS, SIGFPE, SIGILL | faults of rvmm's: end it at once, with a core, as by default |
//! | SIGSEGV, SIGSYS, SIGTRAP | the same |
//! | SIGKILL, SIGSTOP | nobody can change them |
//! | SIGCHLD, SIGURG | do nothing, as by default |
//!
//! One that ends or stops rvmm stays ignored where whoever started rvmm ignored it, as nohup does.
//! Once the machine has ended, one that ends rvmm does so at once.

use std::fs;
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
use crate::util::sync::lock;

/// Those that end rvmm in order.
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

/// Those that never come.
const BLOCKED: [i32; 3] = [SIGXFSZ, SIGTTIN, SIGTTOU];

/// Which of SIGTSTP and SIGCONT came last.
const STOPPING: usize = 1;
const GOING: usize = 0;

/// Whether no machine runs, before the first and after the last.
static OVER: Mutex<Option<Arc<AtomicBool>>> = Mutex::new(None);

/// Makes the process's signals as the table says, whatever mask it was started with. Comes before
/// any other thread, which then has the same mask.
pub fn prepare() {
    let real_time = SIGRTMIN() + 1..=SIGRTMAX();
    for signal in BLOCKED.into_iter().chain(real_time) {
        // Fails for one that is blocked.
        let _ = block_signal(signal);
    }
    let heard = [SIGTSTP, SIGCONT, SIGWINCH];
    for signal in ENDS.into_iter().chain(heard) {
        // Fails for numbers that are no signals.
        let _ = unblock_signal(signal);
    }
}

/// What hears signals, on the main loop. Once it is dropped they act as before.
pub(super) struct Signals<F> {
    delivery: SignalDelivery<UnixStream, SignalOnly>,
    ending: Ending,
    /// The first SIGTERM presses the power key.
    presses: bool,
    on_resize: F,
    stopping: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
}

impl<F: Fn()> Signals<F> {
    /// Hears signals from now on: those that end rvmm are passed to `ending`; if `presses`, the first SIGTERM
    /// presses the power key instead. SIGTSTP and SIGCONT give the terminal back and take it again; SIGWINCH calls
    /// `on_resize`.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub(super) fn new(ending: Ending, presses: bool, on_resize: F) -> io::Result<Self> {
        let ignored = ignored_signals();
        let wanted = ENDS.into_iter().chain([SIGTSTP]);
        let wanted = wanted.filter(|signal| !ignored.contains(signal));
        let over = over(wanted.clone())?;
        let stopping = Arc::new(AtomicUsize::new(GOING));
        register_usize(SIGCONT, Arc::clone(&stopping), GOING)?;
        register_usize(SIGTSTP, Arc::clone(&stopping), STOPPING)?;
        let (read, write) = UnixStream::pair()?;
        let wanted = wanted.chain([SIGCONT, SIGWINCH]);
        let delivery = SignalDelivery::with_pipe(read, write, SignalOnly, wanted)?;
        // Somebody listens now.
        over.store(false, Ordering::Release);
        Ok(Self {
            delivery,
            ending,
            presses,
            on_resize,
            stopping,
            over,
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

/// The flag with which `signals` end the process at once, and SIGTSTP stops it: a handler that nobody
/// listens to would swallow them. signal-hook knows no default of SIGPWR and SIGSTKFLT, so that the
/// status is what a shell makes of a signal, 128+n.
fn over(signals: impl Iterator<Item = i32>) -> io::Result<Arc<AtomicBool>> {
    let mut known = lock(&OVER);
    if let Some(over) = &*known {
        return Ok(Arc::clone(over));
    }
    let over = Arc::new(AtomicBool::new(true));
    for signal in signals {
        let over = Arc::clone(&over);
        if signal == SIGTSTP {
            register_conditional_default(signal, over)?;
        } else {
            register_conditional_shutdown(signal, 128 + signal, over)?;
        }
    }
    *known = Some(Arc::clone(&over));
    Ok(over)
}

/// Those that whoever started rvmm wants it to ignore.
fn ignored_signals() -> Vec<i32> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let mask = mask.unwrap_or(0);
    (1..=64)
        .filter(|signal| (mask >> (signal - 1)) & 1 == 1)
        .collect()
}

/// Stops the whole process, vCPUs too, with the terminal as its user knows it. Not if SIGCONT has come
/// since, as Linux does: nobody would send another.
fn suspend(stopping: &AtomicUsize) {
    terminal::restore();
    if stopping.load(Ordering::Acquire) == STOPPING {
        // Fails for signals without a default action only.
        let _ = emulate_default_handler(SIGTSTP);
    } else {
        terminal::resume();
    }
}

impl<F> Drop for Signals<F> {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        self.delivery.handle().close();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::machine::mainloop::{Event, MainLoop, Post};
    use signal_hook::low_level::raise;
    use std::time::Duration;

    /// Held by whoever hears signals: each of them is the whole process's.
    pub(in crate::machine) static ALONE: Mutex<()> = Mutex::new(());

    const LONG: Duration = Duration::from_secs(1000);

    /// Each of them would end this process by default.
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
                panic!("signal {signal}: nothing was told");
            };
            assert_eq!(outcome, Outcome::Signal(signal));
        }
        drop(main);
        ending.came();
    }

    /// Each of them would end or stop this process by default.
    #[test]
    fn what_is_no_request_changes_nothing() {
        prepare();
        for signal in BLOCKED {
            raise(signal).unwrap();
        }
        // qemu-riscv64 keeps the last of them for itself.
        let real_time = SIGRTMIN() + 1..=SIGRTMAX();
        let raised = real_time.filter(|signal| raise(*signal).is_ok()).count();
        assert!(raised >= 20, "{raised} real-time signals");
    }

    /// A mask that blocks everything, as a careless parent leaves it over exec.
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
