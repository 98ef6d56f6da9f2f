//! System calls on disks' files: whole transfers, holes and zeros.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::fstatfs;
use rustix::io::{Errno, retry_on_intr};

use crate::memory::Pieces;

/// From `include/uapi/linux/magic.h`.
mod magic {
    pub(super) const RAMFS: u64 = 0x8584_58f6;
    pub(super) const TMPFS: u64 = 0x0102_1994;
    pub(super) const NFS: u64 = 0x6969;
    pub(super) const CIFS: u64 = 0xff53_4d42;
}

/// Returns the type of the file system that contains `file`.
fn magic(file: &File) -> Option<u64> {
    let system = fstatfs(file).ok()?;
    u64::try_from(system.f_type).ok()
}

/// Whether the file is on a file system in the host's RAM. Such file systems do not support
/// RWF_NOWAIT, so io_uring would pass each request to another thread. That takes longer than to
/// serve the request here.
pub(super) fn is_in_memory(file: &File) -> bool {
    // For a device, fstatfs gives the file system of the device's node, which is a tmpfs too.
    let is_device = !file.metadata().is_ok_and(|metadata| metadata.is_file());
    !is_device && matches!(magic(file), Some(magic::RAMFS | magic::TMPFS))
}

/// Whether flock(2) on `file` locks all of its bytes, and so conflicts with locks on single bytes
/// (`fs/nfs/file.c`, nfs_flock; `fs/smb/client/file.c`, cifs_flock).
pub(super) fn flock_is_by_bytes(file: &File) -> bool {
    matches!(magic(file), Some(magic::NFS | magic::CIFS))
}

/// Opens `file`, whose path is `path`, again. The result is an open file of its own, to which Linux
/// reports write errors separately.
///
/// # Errors
/// Fails if the file cannot be opened, or if another file now has this path.
pub(super) fn reopen(file: &File, path: &Path, how: &OpenOptions) -> io::Result<File> {
    // /proc/self/fd gives the same file even if it was renamed or deleted; but a chroot may lack
    // /proc.
    if let Ok(again) = how.open(format!("/proc/self/fd/{}", file.as_raw_fd())) {
        return Ok(again);
    }
    let again = how.open(path)?;
    let identity = |metadata: Metadata| (metadata.dev(), metadata.ino());
    if identity(again.metadata()?) != identity(file.metadata()?) {
        return Err(io::Error::other("another file now has this path"));
    }
    Ok(again)
}

/// Returns the most bytes to write at once. Linux (at least 6.12) writes to tmpfs page by page, and
/// before each page looks at all pages that are left: the time for a large write grows with the
/// square of its length.
pub(super) fn write_step(file: &File) -> usize {
    const STEP: usize = 32 << 10;
    if is_in_memory(file) { STEP } else { usize::MAX }
}

/// Runs a call to fallocate(2), and repeats it if a signal interrupts it. Returns false if the host
/// does not support the operation.
///
/// # Errors
/// Fails with any other error of the host.
pub(super) fn fallocated(call: impl FnMut() -> Result<(), Errno>) -> io::Result<bool> {
    match retry_on_intr(call) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::NODEV | Errno::PERM) => {
            Ok(false)
        }
        Err(errno) => Err(errno.into()),
    }
}

/// Fills `pieces` from `fd`, starting at `offset`.
///
/// # Errors
/// Fails if the host cannot read the file, or if the file ends before.
pub(super) fn read_all(fd: BorrowedFd, pieces: &mut Pieces, mut offset: u64) -> io::Result<()> {
    while !pieces.is_empty() {
        offset += read_some(fd, pieces, offset)?;
    }
    Ok(())
}

/// Reads the start of `pieces` with one call. Removes what it has read from `pieces`, and returns
/// its length, which is at least 1.
///
/// # Errors
/// Fails if the host cannot read the file, or if the file ends at `offset`.
pub(super) fn read_some(fd: BorrowedFd, pieces: &mut Pieces, offset: u64) -> io::Result<u64> {
    match uninterrupted(|| pieces.read_at(fd, offset))? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        count => {
            pieces.advance(count);
            Ok(count as u64)
        }
    }
}

/// Writes all of `pieces`, at most `step` bytes at a time.
///
/// # Errors
/// Fails if the host cannot write the file.
pub(super) fn write_all(
    file: &File,
    pieces: &mut Pieces,
    mut offset: u64,
    step: usize,
) -> io::Result<()> {
    while !pieces.is_empty() {
        offset += write_some(file, pieces, offset, step)?;
    }
    Ok(())
}

/// Writes the start of `pieces` with one call. Removes what it has written from `pieces`, and
/// returns its length, which is at least 1.
///
/// # Errors
/// Fails if the host cannot write the file.
pub(super) fn write_some(
    file: &File,
    pieces: &mut Pieces,
    offset: u64,
    step: usize,
) -> io::Result<u64> {
    match uninterrupted(|| pieces.write_at(file.as_fd(), offset, step))? {
        0 => Err(io::ErrorKind::WriteZero.into()),
        count => {
            pieces.advance(count);
            Ok(count as u64)
        }
    }
}

/// Writes zeros, for hosts where fallocate(2) cannot do it.
///
/// # Errors
/// Fails if the host cannot write the file.
pub(super) fn write_zeros(file: &File, offset: u64, length: u64) -> io::Result<()> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let mut done = 0;
    while done < length {
        let count = usize::try_from(length - done).unwrap_or(usize::MAX);
        let zeros = &ZEROS[..count.min(ZEROS.len())];
        file.write_all_at(zeros, offset + done)?;
        done += zeros.len() as u64;
    }
    Ok(())
}

/// Reads up to the length of `bytes`, or up to the end of the file. Returns the number of bytes.
///
/// # Errors
/// Fails if the host cannot read the file.
pub(super) fn read_up_to(file: &File, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match uninterrupted(|| file.read_at(&mut bytes[done..], offset + done as u64))? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}

/// Runs `call`, and repeats it if a signal interrupts it.
///
/// # Errors
/// Fails with any other error of `call`.
pub(super) fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_not_where_its_node_is() {
        let node = File::open("/dev/null").unwrap();
        assert!(!is_in_memory(&node));
        let file = rustix::fs::memfd_create("file", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(is_in_memory(&file.into()));
    }

    #[test]
    fn a_signal_does_not_end_fallocate() {
        let run = |answers: &[Result<(), Errno>]| {
            let mut answers = answers.iter();
            let result = fallocated(|| *answers.next().unwrap());
            assert!(answers.next().is_none(), "all answers were used");
            result.map_err(|error| error.raw_os_error())
        };
        assert_eq!(run(&[Err(Errno::INTR), Err(Errno::INTR), Ok(())]), Ok(true));
        assert_eq!(run(&[Err(Errno::INTR), Err(Errno::OPNOTSUPP)]), Ok(false));
        assert_eq!(run(&[Err(Errno::NOSPC)]), Err(Some(libc::ENOSPC)));
    }
}
