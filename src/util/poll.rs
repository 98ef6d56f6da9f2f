//! What a descriptor is ready for at this moment.

use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd};
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

/// An EventFd's descriptor in the form that polls take.
#[allow(unsafe_code)]
pub fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the EventFd, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// Waits until one of `fds` is readable, or in a state that only a read tells, and says which are; none
/// after a signal.
pub fn wait_readable<const N: usize>(fds: [BorrowedFd; N]) -> [bool; N] {
    let mut polled = fds.each_ref().map(|fd| PollFd::new(fd, PollFlags::IN));
    match poll(&mut polled, None) {
        Ok(_) => polled.each_ref().map(|fd| !fd.revents().is_empty()),
        Err(_) => [false; N],
    }
}

/// Waits until `fd` is readable, for `time` at most, and says whether it is.
pub fn wait_readable_for(fd: BorrowedFd, time: Duration) -> bool {
    let mut polled = [PollFd::new(&fd, PollFlags::IN)];
    let time = Timespec::try_from(time).ok();
    matches!(poll(&mut polled, time.as_ref()), Ok(1..))
}
