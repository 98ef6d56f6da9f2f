//! What is behind a disk: a raw image or a block device of the host.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use log::debug;
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock, fstatfs, ioctl_blksszget};
use rustix::io::Errno;
use thiserror::Error;

use super::overlay::Overlay;
use super::request::{Range, SECTOR, SECTOR_BYTES};
use crate::config::{Cache, DiskConfig};
use crate::memory::Pieces;
use crate::util::ByteSize;
use crate::util::sync::lock;

/// Why a disk cannot be had.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The host said no.
    #[error("Failed to open disk {path:?}: {error}{}", hint(.error))]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A directory, a pipe, a terminal.
    #[error("Failed to open disk {0:?}: neither a file nor a block device")]
    Kind(PathBuf),
    /// Not a whole sector in it.
    #[error("Failed to open disk {0:?}: it has no {SECTOR} bytes: truncate -s 1G {0:?} makes room")]
    Empty(PathBuf),
    /// In use.
    #[error(
        "Failed to lock disk {0:?}: another process uses it: end that one; several can read it, \
         each with readonly or snapshot=on"
    )]
    Locked(PathBuf),
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EROFS | libc::EPERM) => {
            ": readonly or snapshot=on needs no permission to write"
        }
        Some(libc::EINVAL) => ": its file system may know no O_DIRECT: leave out direct",
        Some(libc::EBUSY) => ": the host itself uses it, as a mounted file system does",
        _ => "",
    }
}

/// An open image. Many threads may use it at once.
pub struct Image {
    path: PathBuf,
    file: File,
    /// Bytes that the guest sees, whole sectors.
    len: u64,
    /// A file that could be truncated.
    is_regular: bool,
    block_size: u32,
    read_only: bool,
    cache: Cache,
    overlay: Option<Overlay>,
    /// Bytes that one write to the file, or to the overlay, is to have at most.
    step: usize,
    /// What was written is lost: a flush failed, and no later one can promise it. Held while one is at
    /// work: the host tells of a loss once, and so only one of two that ask at the same time.
    lost: Mutex<bool>,
}

impl Image {
    /// Opens and locks what `config` names: for this process alone if it writes.
    ///
    /// # Errors
    /// [`OpenError`], one line.
    pub fn open(config: &DiskConfig) -> Result<Self, OpenError> {
        let path = config.path.as_path();
        let failed = |error| OpenError::Open {
            path: path.to_owned(),
            error,
        };
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Err(OpenError::Kind(path.to_owned()));
        }
        let writes = !config.readonly && !config.snapshot;
        let mut file = open_file(path, config, &metadata, writes).map_err(failed)?;
        lock_file(&file, writes).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => OpenError::Locked(path.to_owned()),
            _ => failed(error),
        })?;
        let whole = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let len = whole - whole % SECTOR;
        if len == 0 {
            return Err(OpenError::Empty(path.to_owned()));
        }
        let overlay = config.snapshot.then(|| Overlay::new(len)).transpose();
        let overlay = overlay.map_err(failed)?;
        let is_regular = metadata.is_file();
        debug!("disk {path:?}: {}", ByteSize(len));
        Ok(Self {
            path: path.to_owned(),
            block_size: block_size(&file, is_regular, config.direct),
            len,
            is_regular,
            read_only: config.readonly,
            cache: config.cache,
            step: write_step(overlay.as_ref().map_or(&file, Overlay::file)),
            overlay,
            lost: Mutex::new(false),
            file,
        })
    }

    /// For messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes, whole sectors.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no sector: never, once open.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What requests are to be multiples of, in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Whether the guest can only read.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether writes are durable only after a flush.
    pub fn has_write_cache(&self) -> bool {
        self.cache != Cache::Writethrough
    }

    /// The file, for requests that need not wait for each other: none where there is an overlay, or
    /// where none of them would wait.
    pub fn unwaiting(&self) -> Option<File> {
        if self.overlay.is_some() || is_in_memory(&self.file) {
            return None;
        }
        self.file.try_clone().ok()
    }

    /// Fills `pieces` with what is at `offset`.
    ///
    /// # Errors
    /// Out of range, or the host's; the pieces may have changed in part.
    pub fn read(&self, pieces: &mut Pieces, offset: u64) -> io::Result<()> {
        self.check(offset, pieces.len() as u64)?;
        match &self.overlay {
            None => read_all(self.file.as_fd(), pieces, offset),
            Some(overlay) => overlay.read(&self.file, pieces, offset),
        }
    }

    /// Writes `pieces` at `offset`, with flags RWF_*.
    ///
    /// # Errors
    /// Out of range, read-only, or the host's; some of it may have been written.
    pub fn write(&self, pieces: &mut Pieces, offset: u64, flags: i32) -> io::Result<()> {
        let len = pieces.len() as u64;
        self.check_write(offset, len)?;
        match &self.overlay {
            None => write_all(&self.file, pieces, offset, flags, self.step),
            Some(overlay) => overlay.write(&self.file, offset, len, |file| {
                write_all(file, pieces, offset, 0, self.step)
            }),
        }
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// The host's, now or ever before: what was lost then stays lost.
    pub fn flush(&self) -> io::Result<()> {
        if self.overlay.is_some() || self.cache == Cache::Unsafe || self.read_only {
            return Ok(());
        }
        let mut lost = lock(&self.lost);
        if *lost {
            return Err(io::Error::other("an earlier flush failed"));
        }
        self.file.sync_data().inspect_err(|_| *lost = true)
    }

    /// Forgets what is in `range`, if the host can; the bytes may stay.
    ///
    /// # Errors
    /// Out of range, read-only, or the host's.
    pub(super) fn discard(&self, range: Range) -> io::Result<()> {
        self.check_write(range.offset, range.length)?;
        if self.overlay.is_some() || range.length == 0 {
            return Ok(());
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, hole, range.offset, range.length) {
            // A hint only: what cannot be done need not be.
            Err(errno) if !is_unsupported(errno) => Err(errno.into()),
            _ => Ok(()),
        }
    }

    /// Fills `range` with zeros.
    ///
    /// # Errors
    /// Out of range, read-only, or the host's.
    pub(super) fn write_zeroes(&self, range: Range) -> io::Result<()> {
        let Range { offset, length, .. } = range;
        self.check_write(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        if let Some(overlay) = &self.overlay {
            return overlay.write(&self.file, offset, length, |file| {
                write_zeros(file, offset, length)
            });
        }
        let how = if range.unmap {
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        match fallocate(&self.file, how, offset, length) {
            Ok(()) => {}
            Err(errno) if is_unsupported(errno) => write_zeros(&self.file, offset, length)?,
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }

    /// Whether flushes mean something.
    pub fn is_durable(&self) -> bool {
        self.cache != Cache::Unsafe && self.overlay.is_none()
    }

    /// Whether a range is on the disk, and of whole blocks.
    ///
    /// # Errors
    /// It is not.
    pub fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        let block = u64::from(self.block_size);
        let end = offset.checked_add(length).filter(|end| *end <= self.len);
        match end {
            Some(_) if offset % block == 0 && length % block == 0 => Ok(()),
            Some(_) => Err(io::Error::other("not whole blocks")),
            None => Err(io::Error::other("beyond the end of the disk")),
        }
    }

    /// The same for a write. A file that was truncated gets no new end: that would turn what was
    /// cut off into zeros, in silence.
    ///
    /// # Errors
    /// It may not be written.
    pub fn check_write(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        if self.read_only {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let may_shrink = self.is_regular && self.overlay.is_none();
        if may_shrink && (&self.file).seek(SeekFrom::End(0))? < self.len {
            return Err(io::Error::other("the image was truncated"));
        }
        Ok(())
    }
}

fn open_file(
    path: &Path,
    config: &DiskConfig,
    metadata: &Metadata,
    writes: bool,
) -> io::Result<File> {
    let mut flags = 0;
    if config.direct {
        flags |= libc::O_DIRECT;
    }
    if writes && metadata.file_type().is_block_device() {
        // Refused while a file system on it is mounted.
        flags |= libc::O_EXCL;
    }
    let mut options = OpenOptions::new();
    options.read(true).write(writes).custom_flags(flags);
    options.open(path)
}

fn lock_file(file: &File, writes: bool) -> io::Result<()> {
    let how = if writes {
        FlockOperation::NonBlockingLockExclusive
    } else {
        FlockOperation::NonBlockingLockShared
    };
    Ok(flock(file, how)?)
}

/// What the host wants requests to be multiples of: a block device's own blocks, a page for O_DIRECT
/// on a file; else sectors.
fn block_size(file: &File, is_regular: bool, direct: bool) -> u32 {
    const PAGE: u32 = 4096;
    match (is_regular, direct) {
        (false, _) => ioctl_blksszget(file).unwrap_or(PAGE),
        (true, true) => PAGE,
        (true, false) => SECTOR_BYTES,
    }
}

/// What hosts say of holes and zeros that they cannot make.
fn is_unsupported(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::NODEV | Errno::PERM
    )
}

/// Whether the file is in the host's memory alone. Such file systems cannot say that a request would
/// wait (RWF_NOWAIT): io_uring hands each to another thread, which takes longer than to serve it.
pub(super) fn is_in_memory(file: &File) -> bool {
    /// `include/uapi/linux/magic.h`.
    const RAMFS_MAGIC: u64 = 0x8584_58f6;
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    // Of a device it would be where its node is, which is a tmpfs too.
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return false;
    }
    let kind = fstatfs(file)
        .ok()
        .map(|system| u64::try_from(system.f_type));
    matches!(kind, Some(Ok(RAMFS_MAGIC | TMPFS_MAGIC)))
}

/// Linux, of 6.12 at least, writes to tmpfs a page at a time, and before each page looks at all that is
/// left: a large write takes the square of its length.
fn write_step(file: &File) -> usize {
    const STEP: usize = 32 << 10;
    if is_in_memory(file) { STEP } else { usize::MAX }
}

/// Fills `pieces` from `fd`; a file that ends before is an error.
pub(super) fn read_all(fd: BorrowedFd, pieces: &mut Pieces, mut offset: u64) -> io::Result<()> {
    while !pieces.is_empty() {
        match pieces.read_at(fd, offset, 0) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                pieces.advance(count);
                offset += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes all of `pieces`, `step` bytes at a time.
fn write_all(
    file: &File,
    pieces: &mut Pieces,
    mut offset: u64,
    flags: i32,
    step: usize,
) -> io::Result<()> {
    while !pieces.is_empty() {
        match pieces.write_at(file.as_fd(), offset, flags, step) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                pieces.advance(count);
                offset += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes zeros, for hosts that have no quicker way. The buffer has the alignment O_DIRECT wants.
fn write_zeros(file: &File, offset: u64, length: u64) -> io::Result<()> {
    #[repr(align(4096))]
    struct Zeros([u8; 1 << 16]);
    static ZEROS: Zeros = Zeros([0; 1 << 16]);
    let mut done = 0;
    while done < length {
        let count = usize::try_from(length - done).unwrap_or(usize::MAX);
        let zeros = &ZEROS.0[..count.min(ZEROS.0.len())];
        file.write_all_at(zeros, offset + done)?;
        done += zeros.len() as u64;
    }
    Ok(())
}

/// Reads as much as there is, up to the length of `bytes`.
pub(super) fn read_up_to(file: &File, offset: u64, bytes: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
