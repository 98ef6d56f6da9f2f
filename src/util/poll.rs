//! Waiting for descriptors.

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use vmm_sys_util::eventfd::EventFd;

/// Which of `wanted`, or hang-up and error, hold for `fd` now; nothing where it cannot be asked.
pub fn poll_now(fd: impl AsFd, wanted: PollFlags) -> PollFlags {
    let mut fds = [PollFd::new(&fd, wanted)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match poll(&mut fds, Some(&now)) {
        Ok(_) => fds[0].revents(),
        Err(_) => PollFlags::empty(),
    }
}

/// Whether a read of `fd` would give something now, or the news that nothing comes any more.
pub fn readable_now(fd: impl AsFd) -> bool {
    !poll_now(fd, PollFlags::IN).is_empty()
}

/// An EventFd's descriptor in the form that polls take.
#[allow(unsafe_code)]
pub fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the EventFd, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// Several descriptors that one thread waits for, each of them with a number below 64.
pub struct Events(OwnedFd);

/// The numbers of those that have something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready(u64);

impl Ready {
    /// Whether number `number` is among them.
    pub fn has(self, number: u8) -> bool {
        self.0 & (1 << number) != 0
    }

    /// Whether none is: the time was over, or there was a signal.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl Events {
    /// None yet.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// From now on tells of each signal of `fd` once, and of one that came before. Nobody needs to
    /// take the signals.
    ///
    /// # Errors
    /// The host's.
    pub fn add_signal(&self, number: u8, fd: &EventFd) -> io::Result<()> {
        self.add(number, borrow(fd), EventFlags::IN | EventFlags::ET)
    }

    /// From now on tells whenever `fd` is readable, or in a state that only a read tells.
    ///
    /// # Errors
    /// The host's.
    pub fn add_readable(&self, number: u8, fd: impl AsFd) -> io::Result<()> {
        self.add(number, fd, EventFlags::IN)
    }

    fn add(&self, number: u8, fd: impl AsFd, flags: EventFlags) -> io::Result<()> {
        let number = EventData::new_u64(number.into());
        Ok(epoll::add(&self.0, fd, number, flags)?)
    }

    /// Tells nothing of `fd` any more.
    ///
    /// # Errors
    /// It was not added.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.0, fd)?)
    }

    /// Waits until there is something to tell, for `time` at most where that is given.
    pub fn wait(&self, time: Option<Duration>) -> Ready {
        let mut buffer = [MaybeUninit::uninit(); 8];
        let time = time.and_then(|time| Timespec::try_from(time).ok());
        let told = epoll::wait(&self.0, &mut buffer, time.as_ref());
        let (told, _) = told.unwrap_or_default();
        let numbers = told.iter().map(|event| 1 << event.data.u64());
        Ready(numbers.fold(0, std::ops::BitOr::bitor))
    }
}

/// Waits until `fd` is readable, for `time` at most, and says whether it is.
pub fn wait_readable_for(fd: BorrowedFd, time: Duration) -> bool {
    let mut polled = [PollFd::new(&fd, PollFlags::IN)];
    let time = Timespec::try_from(time).ok();
    matches!(poll(&mut polled, time.as_ref()), Ok(1..))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    const NOW: Option<Duration> = Some(Duration::ZERO);

    #[test]
    fn a_signal_is_told_once_and_what_is_readable_until_it_is_read() {
        let events = Events::new().unwrap();
        let signal = EventFd::new(0).unwrap();
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        signal.write(1).unwrap();
        events.add_signal(3, &signal).unwrap();
        events.add_readable(5, &ours).unwrap();
        let ready = events.wait(None);
        assert!(ready.has(3) && !ready.has(5), "one that came before");
        assert!(events.wait(NOW).is_empty());
        signal.write(1).unwrap();
        theirs.write_all(b"x").unwrap();
        let ready = events.wait(None);
        assert!(ready.has(3) && ready.has(5));
        for _ in 0..2 {
            let ready = events.wait(NOW);
            assert!(!ready.has(3) && ready.has(5));
        }
        events.remove(&ours).unwrap();
        assert!(events.wait(NOW).is_empty());
        events.add_readable(5, &ours).unwrap();
        assert!(events.wait(NOW).has(5));
        ours.read_exact(&mut [0]).unwrap();
        assert!(events.wait(NOW).is_empty());
    }
}
