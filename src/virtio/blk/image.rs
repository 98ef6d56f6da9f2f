//! What is behind a disk: a raw image or a block device of the host.

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

/// Why a disk cannot be had.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The host said no.
    #[error("Failed to open disk {path:?}: {error}{}", hint(.error, *.writes))]
    Open {
        /// Which.
        path: PathBuf,
        /// Whether the guest is to write it.
        writes: bool,
        /// Why.
        error: io::Error,
    },
    /// A directory, a pipe, a terminal.
    #[error("Failed to open disk {0:?}: neither a file nor a block device")]
    Kind(PathBuf),
    /// Not a whole sector in it.
    #[error(
        "Failed to open disk {0:?}: it has no {SECTOR} bytes, the least a disk can have: is this the \
         right file? truncate -s 1G NEW makes an empty disk"
    )]
    Empty(PathBuf),
    /// Another program's image.
    #[error(
        "Failed to open disk {path:?}: it is a {format} image, and rvmm reads raw ones: qemu-img \
         convert -O raw {path:?} NEW makes one; format=raw takes this one as it is"
    )]
    Format {
        /// Which.
        path: PathBuf,
        /// As qemu-img calls it.
        format: &'static str,
    },
    /// In use.
    #[error(
        "Failed to lock disk {0:?}: another process uses it: end that one; several can read it, \
         each with readonly or snapshot=on"
    )]
    Locked(PathBuf),
    /// Nowhere to keep what the guest writes.
    #[error(
        "Failed to make a file for a disk's snapshot in {directory:?}: {error}: \
         snapshot-dir=DIR chooses another place"
    )]
    Snapshot {
        /// Where.
        directory: PathBuf,
        /// Why.
        error: io::Error,
    },
}

fn hint(error: &io::Error, writes: bool) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EROFS | libc::EPERM) if writes => {
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
    /// Not closed before the end, whoever else has it: a close can take an error that a flush is to tell.
    file: Arc<File>,
    /// The same file, through which nobody writes: some file systems tell of earlier writes' errors by a
    /// write too (NFS), and a sync of the same open file would find none.
    synced: File,
    /// Bytes that the guest sees, whole sectors.
    len: u64,
    /// A file that could be truncated.
    is_regular: bool,
    block_size: u32,
    read_only: bool,
    cache: Cache,
    overlay: Option<Overlay>,
    direct: Option<Direct>,
    /// Bytes that one write to the file, or to the overlay, is to have at most.
    step: usize,
    durable: Durable,
}

impl Image {
    /// Opens and locks what `config` names: for this process alone if it writes.
    ///
    /// # Errors
    /// [`OpenError`], one line.
    pub fn open(config: &DiskConfig) -> Result<Self, OpenError> {
        let path = config.path.as_path();
        let writes = !config.readonly && !config.snapshot;
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
                "disk {path:?}: its last {rest} bytes are no sector of {SECTOR} bytes: the guest does \
                 not see them"
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
    pub(super) fn unwaiting(&self) -> Option<Arc<File>> {
        let waits = self.overlay.is_none() && !is_in_memory(&self.file);
        waits.then(|| Arc::clone(&self.file))
    }

    /// Whether that file takes a read of `pieces` at `offset`, a range of the disk, as it is.
    pub(super) fn fits_read(&self, pieces: &Pieces, offset: u64) -> bool {
        let direct = self.direct.as_ref();
        direct.is_none_or(|direct| direct.fits(pieces, offset))
    }

    /// The same for a write.
    pub(super) fn fits_write(&self, pieces: &Pieces, offset: u64) -> bool {
        let direct = self.direct.as_ref();
        direct.is_none_or(|direct| direct.fits_write(pieces, offset))
    }

    /// Fills `pieces` with what is at `offset`.
    ///
    /// # Errors
    /// Out of range, or the host's; the pieces may have changed in part.
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
    /// Out of range, read-only, or the host's; some of it may have been written.
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

    /// Makes durable what was written, all of it ever.
    ///
    /// # Errors
    /// The host's, now or ever before: what was lost then stays lost.
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

    /// Where a write begins that [`Image::is_kept_since`] is asked of.
    pub(super) fn mark(&self) -> Mark {
        self.durable.mark()
    }

    /// Syncs once what has been written, whoever else wants that now.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.durable.sync(|| self.synced.sync_data())
    }

    /// Whether what was written since `mark`, and then synced, is durable.
    ///
    /// # Errors
    /// A sync failed meanwhile, and that it was not for this nobody can tell.
    pub(super) fn is_kept_since(&self, mark: Mark) -> io::Result<()> {
        if self.durable.is_lost_since(mark) {
            return Err(lost());
        }
        Ok(())
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
        // A hint only: what cannot be done need not be.
        self.allocate(hole, range).map(drop)
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
        if self.allocate(how, range)? {
            return Ok(());
        }
        match &self.direct {
            Some(direct) => direct.write_zeros(&self.file, offset, length),
            None => write_zeros(&self.file, offset, length),
        }
    }

    /// fallocate(2) on `range`; false where the host cannot do that.
    fn allocate(&self, how: FallocateFlags, range: Range) -> io::Result<bool> {
        let call = || fallocated(|| fallocate(&self.file, how, range.offset, range.length));
        match &self.direct {
            Some(direct) => direct.between_changes(call),
            None => call(),
        }
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
        // Refused while a file system on it is mounted.
        flags |= libc::O_EXCL;
    }
    let mut options = OpenOptions::new();
    options.read(true).write(writes).custom_flags(flags);
    options.open(path)
}

/// What writes go to instead of the image. Says where that is, and warns if it is RAM that nobody chose.
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
            "disk {path:?}: what the guest writes fills the host's RAM, for {directory:?} is there: \
             snapshot-dir=DIR chooses another place"
        );
    } else {
        info!("disk {path:?}: what the guest writes is in {directory:?} until the end");
    }
    Ok(overlay)
}

fn lost() -> io::Error {
    io::Error::other("the host failed to keep what was written before")
}

/// What requests are to be multiples of: a block device's own blocks, as its partition table was written
/// for them, be they 512 or 4096 bytes; sectors of a file. How rvmm reaches either changes nothing.
fn block_size(file: &File, is_regular: bool) -> u32 {
    const PAGE: u32 = 4096;
    if is_regular {
        SECTOR_BYTES
    } else {
        ioctl_blksszget(file).unwrap_or(PAGE)
    }
}
