//! Signals of this process: which are ignored, which are blocked, and a descriptor to read them
//! from.
#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::null;

use libc::{SIG_BLOCK, SIG_SETMASK, signalfd_siginfo, sigset_t};

/// Signals that Linux or the C library sends to a thread for what it does.
const FAULTS: [i32; 7] = [
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGILL,
    libc::SIGSEGV,
    libc::SIGSYS,
    libc::SIGTRAP,
];

/// Whether this process ignores the signal: by itself, or because it was started so, as by nohup.
pub fn is_ignored(signal: i32) -> bool {
    // SAFETY: all fields are integers, and zeros are a value of each.
    let mut action: libc::sigaction = unsafe { zeroed() };
    // SAFETY: changes nothing, because there is no new action. `action` takes the present one.
    let found = unsafe { libc::sigaction(signal, null(), &raw mut action) };
    found == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// The set of `signals`. Numbers that are no signals are left out.
fn set_of(signals: impl IntoIterator<Item = i32>) -> sigset_t {
    // SAFETY: the type has only integers, and sigemptyset makes it a set.
    let mut set = unsafe { zeroed() };
    // SAFETY: `set` is valid for writing.
    unsafe { libc::sigemptyset(&raw mut set) };
    for signal in signals {
        // SAFETY: `set` is a set. A wrong number is an error and changes nothing.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    set
}

/// Changes the mask of this thread, and returns the one before.
fn change_mask(how: i32, set: &sigset_t) -> sigset_t {
    let mut before = set_of([]);
    // SAFETY: both are sets, and `how` is one of the three ways.
    unsafe { libc::pthread_sigmask(how, set, &raw mut before) };
    before
}

/// Blocks `signals` in this thread and in those that it starts later, and no others.
pub fn set_mask(signals: impl IntoIterator<Item = i32>) {
    change_mask(SIG_SETMASK, &set_of(signals));
}

/// Blocks signals in the thread that made it, until it is dropped. They wait meanwhile, even those
/// that are ignored by default.
#[derive(Debug)]
pub struct Blocked {
    before: sigset_t,
    /// A mask is that of one thread.
    not_send: PhantomData<*const ()>,
}

impl Blocked {
    /// Blocks `signals` in this thread, and in those that it starts meanwhile.
    pub fn new(signals: impl IntoIterator<Item = i32>) -> Self {
        Self::set(&set_of(signals))
    }

    /// Blocks all signals but those that a fault of the thread itself sends.
    pub fn all() -> Self {
        let mut set = set_of([]);
        // SAFETY: `set` is a set, and so are all that follow.
        unsafe { libc::sigfillset(&raw mut set) };
        for fault in FAULTS {
            // SAFETY: as above, and the number is that of a signal.
            unsafe { libc::sigdelset(&raw mut set, fault) };
        }
        Self::set(&set)
    }

    fn set(set: &sigset_t) -> Self {
        Self {
            before: change_mask(SIG_BLOCK, set),
            not_send: PhantomData,
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        change_mask(SIG_SETMASK, &self.before);
    }
}

/// A descriptor from which blocked signals are read: signalfd(2).
#[derive(Debug)]
pub struct SignalFd(OwnedFd);

impl SignalFd {
    /// Opens one for `signals`. It is readable while one of them waits, for the process or for the
    /// thread that reads.
    ///
    /// # Errors
    /// Fails if the host has no descriptors left.
    pub fn new(signals: impl IntoIterator<Item = i32>) -> io::Result<Self> {
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        let set = set_of(signals);
        // SAFETY: `set` is a set, and -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, so nothing else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Takes the next signal that waits. None if none does.
    pub fn take(&self) -> Option<i32> {
        let mut info = MaybeUninit::<signalfd_siginfo>::uninit();
        let len = size_of::<signalfd_siginfo>();
        // SAFETY: `info` is valid for writing `len` bytes.
        let read = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), len) };
        if usize::try_from(read) != Ok(len) {
            return None;
        }
        // SAFETY: all of it was written, and its fields are integers.
        let info = unsafe { info.assume_init() };
        i32::try_from(info.ssi_signo).ok()
    }
}

impl AsRawFd for SignalFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Sends `signal` to this thread.
#[cfg(test)]
pub fn raise(signal: i32) -> bool {
    // SAFETY: if it has a handler, the handler was made to be called at any moment.
    unsafe { libc::raise(signal) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libc::{SIGUSR1, SIGUSR2, SIGWINCH};
    use vmm_sys_util::signal::get_blocked_signals;

    #[test]
    fn only_an_ignored_signal() {
        // Rust's runtime ignores it.
        assert!(is_ignored(libc::SIGPIPE));
        assert!(!is_ignored(libc::SIGURG));
        assert!(!is_ignored(-1));
    }

    /// SIGUSR1 would end this process, and SIGWINCH is ignored by default.
    #[test]
    fn what_is_blocked_waits_to_be_read() {
        let signals = [SIGUSR1, SIGWINCH];
        let blocked = Blocked::new(signals);
        let waiting = SignalFd::new(signals).unwrap();
        assert_eq!(waiting.take(), None);
        for signal in signals {
            assert!(raise(signal));
            assert_eq!(waiting.take(), Some(signal));
        }
        assert_eq!(waiting.take(), None);
        drop(blocked);
        assert!(!get_blocked_signals().unwrap().contains(&SIGUSR1));
    }

    #[test]
    fn a_fault_is_never_blocked() {
        let _all = Blocked::all();
        let blocked = get_blocked_signals().unwrap();
        assert!(blocked.contains(&SIGUSR1) && blocked.contains(&SIGWINCH));
        assert!(FAULTS.iter().all(|fault| !blocked.contains(fault)));
    }

    #[test]
    fn the_mask_from_before_comes_back() {
        set_mask([SIGUSR2]);
        let outer = Blocked::new([SIGUSR1]);
        drop(Blocked::new([SIGUSR1, SIGUSR2, -1]));
        let blocked = get_blocked_signals().unwrap();
        assert!(blocked.contains(&SIGUSR1) && blocked.contains(&SIGUSR2));
        drop(outer);
        assert_eq!(get_blocked_signals().unwrap(), [SIGUSR2]);
    }
}
