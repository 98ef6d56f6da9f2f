//! Locks an image against other processes: against rvmm by flock(2), against QEMU and its tools by
//! locks on single bytes.
//!
//! QEMU (`block/file-posix.c`) takes a shared lock on byte 100 + n for each permission n that it
//! holds, and on byte 200 + n for each permission that it denies to others. Then it checks whether
//! another process has a conflicting lock.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use log::warn;
use rustix::fs::{FlockOperation, flock};
use rustix::io::retry_on_intr;

use super::file::flock_is_by_bytes;
use crate::util::filelock::{is_byte_locked, share_byte};

/// First of the bytes for permissions that a process holds.
const HELD: i64 = 100;
/// First of the bytes for permissions that a process denies to others.
const DENIED: i64 = 200;

/// QEMU's permissions (`BLK_PERM_*` in `include/block/block-common.h`), as bit numbers.
mod permission {
    pub(super) const CONSISTENT_READ: i64 = 0;
    pub(super) const WRITE: i64 = 1;
    pub(super) const RESIZE: i64 = 3;
}
use permission::{CONSISTENT_READ, RESIZE, WRITE};

/// Locks `file`, the image at `path`: exclusively if it `writes`, otherwise shared with other
/// readers.
///
/// # Errors
/// Fails with [`io::ErrorKind::WouldBlock`] if another process uses the image. Fails with the
/// host's error if the image cannot be locked.
pub(super) fn lock(file: &File, path: &Path, writes: bool) -> io::Result<()> {
    let how = if writes {
        FlockOperation::NonBlockingLockExclusive
    } else {
        FlockOperation::NonBlockingLockShared
    };
    if !flock_is_by_bytes(file) {
        retry_on_intr(|| flock(file, how))?;
    }
    match lock_bytes(file, writes) {
        Err(error) if is_unknown(&error) => {
            warn!(
                "disk {path:?}: its file system does not support locks on bytes ({error}): do not \
                 use the image with QEMU at the same time"
            );
            Ok(())
        }
        result => result,
    }
}

fn lock_bytes(file: &File, writes: bool) -> io::Result<()> {
    let held: &[i64] = if writes {
        &[CONSISTENT_READ, WRITE]
    } else {
        &[CONSISTENT_READ]
    };
    let denied = &[WRITE, RESIZE];
    let fd = file.as_fd();
    // All locks come before the checks. If two processes lock at the same time, each sees the
    // other's locks.
    for permission in held {
        share_byte(fd, HELD + permission)?;
    }
    for permission in denied {
        share_byte(fd, DENIED + permission)?;
    }
    let against = held.iter().map(|permission| DENIED + permission);
    for at in against.chain(denied.iter().map(|permission| HELD + permission)) {
        if is_byte_locked(fd, at)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
    }
    Ok(())
}

/// Whether the file system does not support such locks, so that no other process can have one
/// either.
fn is_unknown(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP)
    )
}
