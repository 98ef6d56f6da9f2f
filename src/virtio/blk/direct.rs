//! Access to a file past the host's page cache (O_DIRECT). The host then takes only whole units of
//! memory and of the file.
//!
//! The guest sees no difference. A request that does not fit the units goes through a buffer that
//! does. If it covers a unit of the file only in part, that unit is read, changed and written as a
//! whole.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::{AtFlags, StatxFlags, ioctl_blksszget, statx};

use super::file::{read_all, read_some, uninterrupted, write_all, write_some};
use crate::memory::Pieces;

/// The most bytes that go through a buffer at once, unless a unit is larger.
const BUFFER: u64 = 64 << 10;
/// A larger unit is taken for an error of the host.
const UNIT_MAX: u32 = 1 << 20;
/// A unit in bytes that every host accepts.
const PAGE: u32 = 4096;

/// Addresses and lengths must be multiples of these numbers of bytes. Both are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Units {
    /// For addresses in memory.
    pub memory: usize,
    /// For offsets and lengths in the file, and for the length of each piece of memory.
    pub file: u64,
}

impl Units {
    /// Asks the host for the units of `file` with STATX_DIOALIGN (Linux 6.1). If the host does not
    /// know them, uses a block device's own block size, and whole pages for a regular file.
    pub(super) fn of(file: &File, is_regular: bool) -> Self {
        let reported = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
        let reported =
            reported.filter(|reported| reported.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
        let reported =
            reported.map(|reported| (reported.stx_dio_mem_align, reported.stx_dio_offset_align));
        let is_unit = |unit: u32| unit.is_power_of_two() && unit <= UNIT_MAX;
        let reported = reported.filter(|(memory, file)| is_unit(*memory) && is_unit(*file));
        let (memory, file) = reported.unwrap_or_else(|| {
            let block = ioctl_blksszget(file).ok().filter(|block| is_unit(*block));
            let unit = block.filter(|_| !is_regular).unwrap_or(PAGE);
            (unit, unit)
        });
        Self {
            memory: usize::try_from(memory).unwrap_or(1),
            file: file.into(),
        }
    }
}

/// Access to a file that was opened with O_DIRECT.
pub(super) struct Direct {
    units: Units,
    /// Whether the guest's blocks are smaller than a unit, so that a request may cover a unit in
    /// part.
    is_coarse: bool,
    /// Writes of whole units hold this shared. A write that covers a unit in part holds it
    /// exclusively from the read to the write of that unit. Not used if there are no such writes.
    blocks: RwLock<()>,
    /// Offset of the end of the file's last whole unit.
    edge: u64,
    /// The same file through the page cache, for the bytes after `edge`. To write those as a whole
    /// unit would make the file longer.
    tail: Option<File>,
}

impl Direct {
    /// `len` is the number of bytes that the guest sees, in blocks of `block_size`. `reopen` opens
    /// the file again, through the page cache.
    ///
    /// # Errors
    /// Fails if the file does not end with a whole unit and cannot be opened again.
    pub(super) fn new(
        units: Units,
        len: u64,
        block_size: u32,
        writes: bool,
        reopen: impl FnOnce(&OpenOptions) -> io::Result<File>,
    ) -> io::Result<Self> {
        let edge = len - len % units.file;
        let reopen = || reopen(OpenOptions::new().read(true).write(writes));
        Ok(Self {
            units,
            is_coarse: units.file > u64::from(block_size),
            blocks: RwLock::new(()),
            edge,
            tail: (edge < len).then(reopen).transpose()?,
        })
    }

    /// Whether the host takes `pieces` at `offset` without a buffer.
    pub(super) fn fits(&self, pieces: &Pieces, offset: u64) -> bool {
        let length = usize::try_from(self.units.file).unwrap_or(usize::MAX);
        offset % self.units.file == 0
            && offset + pieces.len() as u64 <= self.edge
            && pieces.are_multiples(self.units.memory, length)
    }

    /// Whether io_uring may write `pieces` at `offset` without a buffer. It must not if another
    /// write could read, change and write the same unit meanwhile.
    pub(super) fn fits_write(&self, pieces: &Pieces, offset: u64) -> bool {
        !self.is_coarse && self.fits(pieces, offset)
    }

    /// Fills `pieces` with the bytes at `offset`.
    ///
    /// # Errors
    /// Fails if the host cannot read the file, or if the file ends before.
    pub(super) fn read(&self, file: &File, pieces: &mut Pieces, mut offset: u64) -> io::Result<()> {
        let mut rest = self.split(pieces, offset);
        while !pieces.is_empty() {
            offset += if self.fits(pieces, offset) {
                read_some(file.as_fd(), pieces, offset)?
            } else {
                self.read_through(file, pieces, offset)?
            };
        }
        let tail = self.tail.as_ref().unwrap_or(file);
        read_all(tail.as_fd(), &mut rest, offset)
    }

    /// Writes `pieces` at `offset`.
    ///
    /// # Errors
    /// Fails if the host cannot write the file, or cannot read a unit that is written in part.
    pub(super) fn write(
        &self,
        file: &File,
        pieces: &mut Pieces,
        mut offset: u64,
    ) -> io::Result<()> {
        let mut rest = self.split(pieces, offset);
        while !pieces.is_empty() {
            offset += if self.fits(pieces, offset) {
                let _whole = self.lock_whole();
                write_some(file, pieces, offset, usize::MAX)?
            } else {
                let length = pieces.len() as u64;
                let count = self.write_through(file, offset, length, |bytes| {
                    pieces.copy_to(bytes);
                })?;
                pieces.advance(usize::try_from(count).unwrap_or(usize::MAX));
                count
            };
        }
        let tail = self.tail.as_ref().unwrap_or(file);
        write_all(tail, &mut rest, offset, usize::MAX)
    }

    /// Writes zeros, for hosts where fallocate(2) cannot do it.
    ///
    /// # Errors
    /// Fails if the host cannot write the file, or cannot read a unit that is written in part.
    pub(super) fn write_zeros(&self, file: &File, mut offset: u64, length: u64) -> io::Result<()> {
        let end = offset + length;
        while offset < end.min(self.edge) {
            let length = end.min(self.edge) - offset;
            offset += self.write_through(file, offset, length, |bytes| bytes.fill(0))?;
        }
        let tail = self.tail.as_ref().unwrap_or(file);
        super::file::write_zeros(tail, offset, end - offset)
    }

    /// Runs `call`, which changes the file inside the kernel, while no unit is read, changed and
    /// written.
    pub(super) fn between_changes<T>(&self, call: impl FnOnce() -> T) -> T {
        let _whole = self.lock_whole();
        call()
    }

    /// Splits off the part of `pieces` that lies after the last whole unit.
    fn split(&self, pieces: &mut Pieces, offset: u64) -> Pieces {
        let before = self.edge.saturating_sub(offset);
        pieces.split_off(usize::try_from(before).unwrap_or(usize::MAX))
    }

    /// Returns a buffer for the units that contain `length` bytes at `offset`, or for the first of
    /// those units. Also returns the offset of the first unit.
    fn buffer(&self, offset: u64, length: u64) -> (u64, Buffer) {
        let unit = self.units.file;
        let start = offset - offset % unit;
        let end = (offset + length).next_multiple_of(unit);
        let count = (end - start).min(BUFFER.max(unit));
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        (start, Buffer::new(count, self.units.memory))
    }

    /// Reads the start of `pieces` through a buffer. Removes what it has read from `pieces`, and
    /// returns its length.
    fn read_through(&self, file: &File, pieces: &mut Pieces, offset: u64) -> io::Result<u64> {
        let (start, mut buffer) = self.buffer(offset, pieces.len() as u64);
        let got = uninterrupted(|| file.read_at(buffer.bytes(), start))?;
        let skip = usize::try_from(offset - start).unwrap_or(usize::MAX);
        let found = buffer.bytes().get(skip..got).unwrap_or_default();
        match pieces.copy_from(found) {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                pieces.advance(count);
                Ok(count as u64)
            }
        }
    }

    /// Writes the first of `length` bytes at `offset` through a buffer, which `fill` fills. Returns
    /// how many bytes it has written.
    fn write_through(
        &self,
        file: &File,
        offset: u64,
        length: u64,
        fill: impl FnOnce(&mut [u8]),
    ) -> io::Result<u64> {
        let (start, mut buffer) = self.buffer(offset, length);
        let bytes = buffer.bytes();
        let end = (start + bytes.len() as u64).min(offset + length);
        let place = |at: u64| usize::try_from(at - start).unwrap_or(usize::MAX);
        let (from, to, unit) = (place(offset), place(end), place(start + self.units.file));
        let (has_head, has_tail) = (from > 0, to < bytes.len());
        let _alone = (has_head || has_tail).then(|| self.lock_alone());
        let _whole = (!has_head && !has_tail).then(|| self.lock_whole());
        if has_head {
            read_unit(file, start, &mut bytes[..unit])?;
        }
        if has_tail && !(has_head && bytes.len() == unit) {
            let last = bytes.len() - unit;
            read_unit(file, start + last as u64, &mut bytes[last..])?;
        }
        fill(&mut bytes[from..to]);
        file.write_all_at(bytes, start)?;
        Ok(end - offset)
    }

    fn lock_whole(&self) -> Option<RwLockReadGuard<'_, ()>> {
        let lock = || self.blocks.read().unwrap_or_else(PoisonError::into_inner);
        self.is_coarse.then(lock)
    }

    fn lock_alone(&self) -> RwLockWriteGuard<'_, ()> {
        self.blocks.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads a unit that will be changed in part.
fn read_unit(file: &File, at: u64, unit: &mut [u8]) -> io::Result<()> {
    match uninterrupted(|| file.read_at(unit, at))? {
        count if count == unit.len() => Ok(()),
        // The image was truncated. Zeros in place of the lost bytes would hide that.
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// A buffer whose address is a multiple of the host's unit of memory.
struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    fn new(length: usize, unit: usize) -> Self {
        let bytes = vec![0; length + unit];
        // `unit` is a power of two, so the offset is less than `unit`.
        let start = bytes.as_ptr().align_offset(unit).min(unit);
        Self {
            bytes,
            start,
            length,
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.length]
    }
}
