//! What a descriptor is ready for at this moment.

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
