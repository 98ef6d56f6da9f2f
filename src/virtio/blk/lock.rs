//! Who else uses an image: rvmm by flock(2), QEMU and what is made of it by locks on single bytes.
//!
//! QEMU (`block/file-posix.c`) shares a lock on byte 100 + n for each permission n that it holds, and on
//! 200 + n for each that it lets nobody else hold; then it looks whether another has what it may not.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use log::warn;
use rustix::fs::{FlockOperation, flock};
use rustix::io::retry_on_intr;

use super::file::flock_is_by_bytes;
use crate::util::filelock::{is_byte_locked, share_byte};

/// The byte of a permission that is held.
const HELD: i64 = 100;
/// The byte of a permission that others may not hold.
const DENIED: i64 = 200;

/// QEMU's permissions (`BLK_PERM_*` in `include/block/block-common.h`), as bit numbers.
mod permission {
    pub(super) const CONSISTENT_READ: i64 = 0;
    pub(super) const WRITE: i64 = 1;
    pub(super) const RESIZE: i64 = 3;
}
use permission::{CONSISTENT_READ, RESIZE, WRITE};

/// Locks `file`, the image at `path`: for this open file alone if it `writes`, else for all that read.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] where another uses it; else the host's.
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
                "disk {path:?}: its file system has no locks on bytes ({error}): let no QEMU use it \
                 meanwhile"
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
    // All locks first: of two that come at once, both see the other's.
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

/// Whether the file system has no such locks, and so nobody else's on it either.
fn is_unknown(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP)
    )
}
