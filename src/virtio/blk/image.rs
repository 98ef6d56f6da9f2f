//! The content of a disk: a raw image file, or a block device of the host.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::{debug, info, warn};
use rustix::fs::{FallocateFlags, fallocate, ioctl_blksszget};
use thiserror::Error;

use super::direct::{Direct, Units};
use super::durable::{Durable, Mark};
use super::file::{fallocated, is_in_memory, read_all, reopen, write_all, write_step, write_zeros};
use super::format::foreign;
use super::lock::lock;
use super::overlay::{Overlay, default_directory};
use super::request::{Range, SECTOR, SECTOR_BYTES};
use crate::config::{Cache, DiskConfig, DiskFormat};
use crate::memory::Pieces;
use crate::util::ByteSize;

/// Why a disk could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The host reported an error.
    #[error("Failed to open disk {path:?}: {error}{}", hint(.error, *.writes))]
    Open {
        /// The disk's file.
        path: PathBuf,
        /// Whether rvmm would write to the file.
        writes: bool,
        /// The host's error.
        error: io::Error,
    },
    /// The path is a directory, a pipe or a terminal, for example.
    #[error("Failed to open disk {0:?}: neither a file nor a block device")]
    Kind(PathBuf),
    /// The file is smaller than one sector.
    #[error(
        "Failed to open disk {0:?}: it has less than {SECTOR} bytes, the smallest size of a disk: \
         is this the right file? truncate -s 1G NEW makes an empty disk"
    )]
    Empty(PathBuf),
    /// The image has the format of another program.
    #[error(
        "Failed to open disk {path:?}: it is a {format} image, and rvmm reads only raw images: \
         qemu-img convert -O raw {path:?} NEW makes one; format=raw takes this file as it is"
    )]
    Format {
        /// The disk's file.
        path: PathBuf,
        /// qemu-img's name for the format.
        format: &'static str,
    },
    /// Another process uses the image.
    #[error(
        "Failed to lock disk {0:?}: another process uses it: stop that process, or use readonly or \
         snapshot=on in both"
    )]
    Locked(PathBuf),
    /// The file for the guest's writes could not be created.
    #[error(
        "Failed to create a file for a disk's snapshot in {directory:?}: {error}: \
         snapshot-dir=DIR chooses another place"
    )]
    Snapshot {
        /// The directory.
        directory: PathBuf,
        /// The host's error.
        error: io::Error,
    },
}

fn hint(error: &io::Error, writes: bool) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EROFS | libc::EPERM) if writes => {
            ": readonly or snapshot=on needs no permission to write"
        }
        Some(libc::EINVAL) => ": its file system may not support O_DIRECT: leave out direct",
        Some(libc::EBUSY) => ": the host itself uses it, for example as a mounted file system",
        _ => "",
    }
}

/// An open image. Several threads may use it at once.
pub struct Image {
    path: PathBuf,
    /// Kept open until the image is dropped, even when rings that share it end: a close can take
    /// the error that a later flush must report.
    file: Arc<File>,
    /// The same file, opened again for syncs. Nobody writes through it: on some file systems (NFS)
    /// a write reports the errors of earlier writes too, and a sync of the same open file would
    /// miss them.
    synced: File,
    /// Size in bytes that the guest sees, whole sectors.
    len: u64,
    /// Whether it is a regular file, which can be truncated.
    is_regular: bool,
    block_size: u32,
    read_only: bool,
    cache: Cache,
    overlay: Option<Overlay>,
    direct: Option<Direct>,
    /// Most bytes of a single write to the file, or to the overlay.
    step: usize,
    durable: Durable,
}

impl Image {
    /// Opens and locks the image that `config` names: exclusively if rvmm writes to it, otherwise
    /// shared with other readers.
    ///
    /// # Errors
    /// Fails with an [`OpenError`], whose message is one line.
    pub fn open(config: &DiskConfig) -> Result<Self, OpenError> {
        let path = config.path.as_path();
        let writes = config.is_written();
        let failed = |error| OpenError::Open {
            path: path.to_owned(),
            writes,
            error,
        };
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Err(OpenError::Kind(path.to_owned()));
        }
        let mut file = open_file(path, config, &metadata, writes).map_err(failed)?;
        if config.format != Some(DiskFormat::Raw) {
            if let Some(format) = foreign(path).map_err(failed)? {
                let path = path.to_owned();
                return Err(OpenError::Format { path, format });
            }
        }
        lock(&file, path, writes).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => OpenError::Locked(path.to_owned()),
            _ => failed(error),
        })?;
        let whole = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let rest = whole % SECTOR;
        let len = whole - rest;
        if len == 0 {
            return Err(OpenError::Empty(path.to_owned()));
        }
        if rest > 0 {
            warn!(
                "disk {path:?}: its last {rest} bytes are not a whole sector of {SECTOR} bytes: \
                 the guest does not see them"
            );
        }
        let is_regular = metadata.is_file();
        let block_size = block_size(&file, is_regular);
        let direct = || {
            let units = Units::of(&file, is_regular);
            debug!("disk {path:?}: {units:?}");
            let tail = |how: &OpenOptions| reopen(&file, path, how);
            Direct::new(units, len, block_size, writes, tail)
        };
        let direct = config.direct.then(direct).transpose().map_err(failed)?;
        let overlay = config.snapshot.then(|| open_overlay(config, len));
        let overlay = overlay.transpose()?;
        let synced = reopen(&file, path, OpenOptions::new().read(true)).map_err(failed)?;
        debug!("disk {path:?}: {}", ByteSize(len));
        Ok(Self {
            synced,
            path: path.to_owned(),
            len,
            is_regular,
            block_size,
            read_only: config.readonly,
            cache: config.cache,
            step: write_step(overlay.as_ref().map_or(&file, Overlay::file)),
            overlay,
            direct,
            durable: Durable::default(),
            file: Arc::new(file),
        })
    }

    /// Opens the image once more, to read it.
    ///
    /// # Errors
    /// Fails if the host refuses.
    pub fn open_again(&self) -> io::Result<File> {
        reopen(&self.file, &self.path, OpenOptions::new().read(true))
    }

    /// The path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes, whole sectors.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Always false: an image without a sector cannot be opened.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The block size in bytes. Offsets and lengths of requests must be multiples of it.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// What the guest has written, if the image itself is not written (`snapshot=on`).
    pub fn overlay(&self) -> Option<&Overlay> {
        self.overlay.as_ref()
    }

    /// Whether the guest can only read.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether writes are durable only after a flush.
    pub fn has_write_cache(&self) -> bool {
        self.cache != Cache::Writethrough
    }

    /// Returns the file for io_uring, where requests do not wait for each other. `None` if there is
    /// an overlay, or if requests to the file never wait (it is in RAM).
    pub(super) fn unwaiting(&self) -> Option<Arc<File>> {
        let waits = self.overlay.is_none() && !is_in_memory(&self.file);
        waits.then(|| Arc::clone(&self.file))
    }

    /// Whether io_uring may read `pieces` at `offset`, which must be a range of the disk, without a
    /// buffer.
    pub(super) fn fits_read(&self, pieces: &Pieces, offset: u64) -> bool {
        let direct = self.direct.as_ref();
        direct.is_none_or(|direct| direct.fits(pieces, offset))
    }

    /// Whether io_uring may write `pieces` at `offset` without a buffer.
    pub(super) fn fits_write(&self, pieces: &Pieces, offset: u64) -> bool {
        let direct = self.direct.as_ref();
        direct.is_none_or(|direct| direct.fits_write(pieces, offset))
    }

    /// Fills `pieces` with the bytes at `offset`.
    ///
    /// # Errors
    /// Fails if the range is invalid, or if the host cannot read the file. A part of `pieces` may
    /// have been filled.
    pub fn read(&self, pieces: &mut Pieces, offset: u64) -> io::Result<()> {
        self.check(offset, pieces.len() as u64)?;
        match (&self.overlay, &self.direct) {
            (Some(overlay), _) => overlay.read(&self.file, pieces, offset),
            (None, Some(direct)) => direct.read(&self.file, pieces, offset),
            (None, None) => read_all(self.file.as_fd(), pieces, offset),
        }
    }

    /// Writes `pieces` at `offset`.
    ///
    /// # Errors
    /// Fails if the range is invalid, if the disk is read-only, or if the host cannot write the
    /// file. A part may have been written.
    pub fn write(&self, pieces: &mut Pieces, offset: u64) -> io::Result<()> {
        let len = pieces.len() as u64;
        self.check_write(offset, len)?;
        if let Some(overlay) = &self.overlay {
            return overlay.write(&self.file, offset, len, |file| {
                write_all(file, pieces, offset, self.step)
            });
        }
        match &self.direct {
            Some(direct) => direct.write(&self.file, pieces, offset),
            None => write_all(&self.file, pieces, offset, self.step),
        }
    }

    /// Makes all writes so far durable. Does nothing where that is not wanted (`cache=unsafe`), or
    /// where the image is not written.
    ///
    /// # Errors
    /// Fails if a sync fails now, or has failed at any time before: the data that was lost then is
    /// still lost.
    pub fn flush(&self) -> io::Result<()> {
        if !self.is_durable() || self.read_only {
            return Ok(());
        }
        if self.durable.is_lost_since(Mark::FIRST) {
            return Err(lost());
        }
        self.sync()?;
        self.is_kept_since(Mark::FIRST)
    }

    /// Returns the mark for a write that begins now, for [`Image::is_kept_since`].
    pub(super) fn mark(&self) -> Mark {
        self.durable.mark()
    }

    /// Syncs all writes so far. Threads that sync at the same time share one sync.
    ///
    /// # Errors
    /// Fails if the host cannot sync the file.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.durable.sync(|| self.synced.sync_data())
    }

    /// Checks that data written since `mark` and synced afterwards is durable.
    ///
    /// # Errors
    /// Fails if any sync has failed since `mark`, because the failure may concern this data.
    pub(super) fn is_kept_since(&self, mark: Mark) -> io::Result<()> {
        if self.durable.is_lost_since(mark) {
            return Err(lost());
        }
        Ok(())
    }

    /// Discards the bytes in `range`, if the host supports that. Otherwise they stay.
    ///
    /// # Errors
    /// Fails if the range is invalid, if the disk is read-only, or if the host reports an error.
    pub(super) fn discard(&self, range: Range) -> io::Result<()> {
        self.check_write(range.offset, range.length)?;
        if self.overlay.is_some() || range.length == 0 {
            return Ok(());
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A discard is only a hint, so it does not matter if the host does not support it.
        self.allocate(hole, range).map(drop)
    }

    /// Fills `range` with zeros.
    ///
    /// # Errors
    /// Fails if the range is invalid, if the disk is read-only, or if the host cannot write the
    /// file.
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
        if self.allocate(how, range)? {
            return Ok(());
        }
        match &self.direct {
            Some(direct) => direct.write_zeros(&self.file, offset, length),
            None => write_zeros(&self.file, offset, length),
        }
    }

    /// Calls fallocate(2) for `range`. False if the host does not support the operation.
    fn allocate(&self, how: FallocateFlags, range: Range) -> io::Result<bool> {
        let call = || fallocated(|| fallocate(&self.file, how, range.offset, range.length));
        match &self.direct {
            Some(direct) => direct.between_changes(call),
            None => call(),
        }
    }

    /// Whether a flush has an effect.
    pub fn is_durable(&self) -> bool {
        self.cache != Cache::Unsafe && self.overlay.is_none()
    }

    /// Checks that a range consists of whole blocks of the disk.
    ///
    /// # Errors
    /// Fails if it does not.
    pub fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        let block = u64::from(self.block_size);
        let end = offset.checked_add(length).filter(|end| *end <= self.len);
        match end {
            Some(_) if offset % block == 0 && length % block == 0 => Ok(()),
            Some(_) => Err(io::Error::other(
                "offset or length is no multiple of the block size",
            )),
            None => Err(io::Error::other("the range ends beyond the disk")),
        }
    }

    /// Checks a range like [`Image::check`], and that it may be written. A file that was truncated
    /// must not grow again: the lost bytes would silently become zeros.
    ///
    /// # Errors
    /// Fails if the range is invalid, if the disk is read-only, or if the file was truncated.
    pub fn check_write(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        if self.read_only {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let may_shrink = self.is_regular && self.overlay.is_none();
        if may_shrink && self.file.as_ref().seek(SeekFrom::End(0))? < self.len {
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
        // Fails with EBUSY while a file system on the device is mounted.
        flags |= libc::O_EXCL;
    }
    let mut options = OpenOptions::new();
    options.read(true).write(writes).custom_flags(flags);
    options.open(path)
}

/// Opens the overlay for the guest's writes. Logs where it is, and warns if it is in RAM and the
/// user did not choose that.
fn open_overlay(config: &DiskConfig, len: u64) -> Result<Overlay, OpenError> {
    let path = &config.path;
    let chosen = config.snapshot_dir.clone();
    let is_chosen = chosen.is_some();
    let directory = chosen.unwrap_or_else(default_directory);
    let overlay = Overlay::new(len, &directory).map_err(|error| OpenError::Snapshot {
        directory: directory.clone(),
        error,
    })?;
    if !is_chosen && is_in_memory(overlay.file()) {
        warn!(
            "disk {path:?}: what the guest writes fills the host's RAM, because {directory:?} is \
             in RAM: snapshot-dir=DIR chooses another place"
        );
    } else {
        info!("disk {path:?}: what the guest writes is kept in {directory:?} until rvmm ends");
    }
    Ok(overlay)
}

fn lost() -> io::Error {
    io::Error::other("the host failed to write earlier data to the disk")
}

/// The block size that the guest sees. A block device keeps its own (512 or 4096 bytes), because
/// its partition table was written for that. A file has blocks of one sector. It is the same with
/// and without O_DIRECT or an overlay.
fn block_size(file: &File, is_regular: bool) -> u32 {
    const PAGE: u32 = 4096;
    if is_regular {
        SECTOR_BYTES
    } else {
        ioctl_blksszget(file).unwrap_or(PAGE)
    }
}
