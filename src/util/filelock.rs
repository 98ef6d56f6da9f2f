//! Locks on single bytes of a file: OFD locks, see fcntl_locking(2). Such a lock belongs to the
//! open file description. The kernel releases it when the last descriptor of that description is
//! closed.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Takes a shared lock on the byte at offset `at`.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] if another open file description has an exclusive lock on the
/// byte. Also fails if the file system has no locks.
pub fn share_byte(fd: BorrowedFd, at: i64) -> io::Result<()> {
    let mut lock = byte(at, libc::F_RDLCK);
    match fcntl(fd, libc::F_OFD_SETLK, &mut lock) {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            Err(io::ErrorKind::WouldBlock.into())
        }
        result => result,
    }
}

/// Whether another open file description has a shared or exclusive lock on the byte at offset `at`.
///
/// # Errors
/// Fails if the file system has no locks.
pub fn is_byte_locked(fd: BorrowedFd, at: i64) -> io::Result<bool> {
    let mut lock = byte(at, libc::F_WRLCK);
    fcntl(fd, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// Whether another open file description has a lock on any byte.
///
/// # Errors
/// Fails if the file system has no locks.
pub fn is_locked(fd: BorrowedFd) -> io::Result<bool> {
    let mut lock = byte(0, libc::F_WRLCK);
    // Length 0 means: up to the largest possible offset.
    lock.l_len = 0;
    fcntl(fd, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// The lock of the byte at offset `at`, of this kind (`F_RDLCK`, `F_WRLCK`).
fn byte(at: i64, kind: i32) -> libc::flock {
    // SAFETY: every field is an integer, for which zero is a valid value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    // The constants fit: they are 0, 1 and 2.
    lock.l_type = i16::try_from(kind).unwrap_or(i16::MAX);
    lock.l_whence = i16::try_from(libc::SEEK_SET).unwrap_or(i16::MAX);
    lock.l_start = at;
    lock.l_len = 1;
    lock
}

fn fcntl(fd: BorrowedFd, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open, and the kernel reads and writes only `lock`.
        if unsafe { libc::fcntl(fd.as_raw_fd(), command, std::ptr::from_mut(lock)) } != -1 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn another_open_file_sees_the_lock() {
        let path = std::env::temp_dir().join(format!("rvmm-filelock-{}", std::process::id()));
        File::create(&path).unwrap();
        let (one, other) = (File::open(&path).unwrap(), File::open(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        share_byte(one.as_fd(), 100).unwrap();
        assert!(
            !is_byte_locked(one.as_fd(), 100).unwrap(),
            "a lock does not show its own owner"
        );
        assert!(is_byte_locked(other.as_fd(), 100).unwrap());
        assert!(!is_byte_locked(other.as_fd(), 101).unwrap());
        assert!(is_locked(other.as_fd()).unwrap() && !is_locked(one.as_fd()).unwrap());
        share_byte(other.as_fd(), 100).unwrap();
        drop(one);
        assert!(!is_byte_locked(other.as_fd(), 100).unwrap());
    }
}
