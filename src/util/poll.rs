//! Waiting for descriptors.

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use vmm_sys_util::eventfd::EventFd;

/// The events of `wanted` that `fd` has now, and POLLHUP and POLLERR if it has those. Empty if
/// poll(2) fails. Does not wait.
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

/// Whether a read of `fd` would return at once: with data, the end of the input, or an error.
pub fn readable_now(fd: impl AsFd) -> bool {
    !poll_now(fd, PollFlags::IN).is_empty()
}

/// Borrows the descriptor of an EventFd, for calls to poll and epoll.
#[allow(unsafe_code)]
pub fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the EventFd, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// Descriptors that one thread waits for (epoll(7)). The caller gives each of them a number from 0
/// to 63.
pub struct Events(OwnedFd);

/// The numbers of the descriptors that have an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready(u64);

impl Ready {
    /// Whether the descriptor with this number has an event.
    pub fn has(self, number: u8) -> bool {
        self.0 & (1 << number) != 0
    }

    /// Whether no descriptor has an event: the time was over, or a signal ended the wait.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl Events {
    /// Creates an empty set.
    ///
    /// # Errors
    /// Fails if epoll_create1(2) fails, for example without free descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// Adds `fd`, edge-triggered: [`Events::wait`] reports each signal once, also one from before
    /// this call. The thread does not have to read the eventfd.
    ///
    /// # Errors
    /// Fails if epoll_ctl(2) fails.
    pub fn add_signal(&self, number: u8, fd: &EventFd) -> io::Result<()> {
        self.add(number, borrow(fd), EventFlags::IN | EventFlags::ET)
    }

    /// Adds `fd`, level-triggered: [`Events::wait`] reports it as long as it is readable, or has a
    /// hang-up or an error.
    ///
    /// # Errors
    /// Fails if epoll_ctl(2) fails.
    pub fn add_readable(&self, number: u8, fd: impl AsFd) -> io::Result<()> {
        self.add(number, fd, EventFlags::IN)
    }

    fn add(&self, number: u8, fd: impl AsFd, flags: EventFlags) -> io::Result<()> {
        let number = EventData::new_u64(number.into());
        Ok(epoll::add(&self.0, fd, number, flags)?)
    }

    /// Removes `fd`.
    ///
    /// # Errors
    /// Fails if `fd` was not added.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.0, fd)?)
    }

    /// Waits until a descriptor has an event, and returns the numbers of those that have one. With
    /// `time`, waits at most that long.
    pub fn wait(&self, time: Option<Duration>) -> Ready {
        let mut buffer = [MaybeUninit::uninit(); 8];
        let time = time.and_then(|time| Timespec::try_from(time).ok());
        let events = epoll::wait(&self.0, &mut buffer, time.as_ref());
        let (events, _) = events.unwrap_or_default();
        let numbers = events.iter().map(|event| 1 << event.data.u64());
        Ready(numbers.fold(0, std::ops::BitOr::bitor))
    }
}

/// Waits at most `time` until `fd` is readable. Returns whether it is.
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
    fn a_signal_is_reported_once_and_what_is_readable_until_it_is_read() {
        let events = Events::new().unwrap();
        let signal = EventFd::new(0).unwrap();
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        signal.write(1).unwrap();
        events.add_signal(3, &signal).unwrap();
        events.add_readable(5, &ours).unwrap();
        let ready = events.wait(None);
        assert!(
            ready.has(3) && !ready.has(5),
            "a signal from before is reported"
        );
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
