//! Pieces of guest RAM that a request names, for the host's scatter and gather calls.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::GuestAddress;

use super::FlatRam;

/// The most pieces that one call of the host's takes.
pub(super) const PIECES_MAX: u32 = libc::UIO_MAXIOV.unsigned_abs();

/// A guest-physical range that is not all RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotRam;

/// Pieces of guest RAM in the order the guest gave them. They stay mapped as long as this lives.
///
/// The guest may write to them at any time: bytes that matter twice are copied first. Everything
/// the host writes to them goes through here, and is marked in the log of dirty pages.
#[derive(Clone)]
pub struct Pieces {
    ram: Arc<FlatRam>,
    iovecs: Vec<libc::iovec>,
    len: usize,
}

// SAFETY: the pointers are to guest RAM, which `ram` keeps mapped and which any thread may access.
unsafe impl Send for Pieces {}

/// One byte of guest RAM. It stays mapped as long as this lives.
pub struct Byte {
    host: *mut u8,
    ram: Arc<FlatRam>,
}

// SAFETY: as of `Pieces`.
unsafe impl Send for Byte {}

impl Byte {
    /// Writes it.
    pub fn set(&self, value: u8) {
        // SAFETY: it is mapped RAM, and no reference to it exists.
        unsafe { self.host.write_volatile(value) };
        self.ram.wrote(self.host, 1);
    }
}

impl fmt::Debug for Byte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a byte of RAM")
    }
}

impl Pieces {
    /// No piece yet, of this RAM.
    pub fn of(ram: &Arc<FlatRam>) -> Self {
        Self {
            ram: Arc::clone(ram),
            iovecs: Vec::new(),
            len: 0,
        }
    }

    /// Adds `len` bytes at `gpa`.
    ///
    /// # Errors
    /// Not all of it is RAM.
    pub fn push(&mut self, gpa: GuestAddress, len: usize) -> Result<(), NotRam> {
        if len == 0 {
            return Ok(());
        }
        let host = self.ram.host_address(gpa, len).ok_or(NotRam)?;
        self.len = self.len.checked_add(len).ok_or(NotRam)?;
        self.add(libc::iovec {
            iov_base: host.cast(),
            iov_len: len,
        });
        Ok(())
    }

    /// Adds a piece; to the last one if it lies right behind, for the host's calls cost by the piece.
    fn add(&mut self, piece: libc::iovec) {
        match self.iovecs.last_mut() {
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == piece.iov_base => {
                last.iov_len += piece.iov_len;
            }
            _ => self.iovecs.push(piece),
        }
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether each piece starts at a multiple of `address`, and is a multiple of `length` long.
    pub fn are_multiples(&self, address: usize, length: usize) -> bool {
        self.iovecs
            .iter()
            .all(|piece| piece.iov_base.addr() % address == 0 && piece.iov_len % length == 0)
    }

    pub(super) fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// Takes the first `count` bytes off, or all there are.
    pub fn advance(&mut self, count: usize) {
        let mut rest = count.min(self.len);
        self.len -= rest;
        let mut gone = 0;
        for iovec in &mut self.iovecs {
            if rest < iovec.iov_len {
                iovec.iov_base = iovec.iov_base.wrapping_byte_add(rest);
                iovec.iov_len -= rest;
                break;
            }
            rest -= iovec.iov_len;
            gone += 1;
        }
        if gone == self.iovecs.len() {
            self.iovecs.clear();
        } else {
            self.iovecs.drain(..gone);
        }
    }

    /// Adds the pieces of `more`, which are of the same RAM.
    pub fn append(&mut self, more: &Pieces) {
        debug_assert!(Arc::ptr_eq(&self.ram, &more.ram));
        more.iovecs.iter().for_each(|piece| self.add(*piece));
        self.len += more.len;
    }

    /// Takes all of it, and leaves nothing.
    pub fn take(&mut self) -> Pieces {
        let nothing = Pieces::of(&self.ram);
        std::mem::replace(self, nothing)
    }

    /// Cuts off the last byte, and returns it. None where there is nothing.
    pub fn split_last(&mut self) -> Option<Byte> {
        let last = self.iovecs.last_mut()?;
        last.iov_len -= 1;
        self.len -= 1;
        let byte = Byte {
            host: last.iov_base.wrapping_byte_add(last.iov_len).cast(),
            ram: Arc::clone(&self.ram),
        };
        if last.iov_len == 0 {
            self.iovecs.pop();
        }
        Some(byte)
    }

    /// Cuts off what is behind the first `count` bytes, and returns it.
    pub fn split_off(&mut self, count: usize) -> Pieces {
        let mut rest = Pieces::of(&self.ram);
        let mut keep = count.min(self.len);
        (rest.len, self.len) = (self.len - keep, keep);
        // The first piece that is not, or not wholly, kept.
        let first = self.iovecs.iter().position(|iovec| {
            let whole = iovec.iov_len <= keep;
            keep -= if whole { iovec.iov_len } else { 0 };
            !whole
        });
        let Some(first) = first else {
            return rest;
        };
        rest.iovecs = self.iovecs[first..].to_vec();
        self.iovecs.truncate(first + 1);
        if let (Some(tail), Some(head)) = (rest.iovecs.first_mut(), self.iovecs.last_mut()) {
            tail.iov_base = tail.iov_base.wrapping_byte_add(keep);
            tail.iov_len -= keep;
            head.iov_len = keep;
        }
        if keep == 0 {
            self.iovecs.pop();
        }
        rest
    }

    /// Copies the first bytes out, as many as both have, and returns their number.
    pub fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for iovec in &self.iovecs {
            let count = iovec.iov_len.min(bytes.len() - done);
            let to = &mut bytes[done..done + count];
            // SAFETY: the piece is mapped RAM of `iov_len` bytes, and no reference to it exists:
            // what the guest writes meanwhile can only change which bytes are copied.
            unsafe { std::ptr::copy_nonoverlapping(iovec.iov_base.cast(), to.as_mut_ptr(), count) };
            done += count;
        }
        done
    }

    /// Copies `bytes` to what is behind the first `skip` bytes, as many as there is room for.
    pub fn copy_from_at(&self, mut skip: usize, mut bytes: &[u8]) {
        for iovec in &self.iovecs {
            if skip >= iovec.iov_len {
                skip -= iovec.iov_len;
                continue;
            }
            let count = (iovec.iov_len - skip).min(bytes.len());
            let to = iovec.iov_base.wrapping_byte_add(skip).cast::<u8>();
            // SAFETY: as in `copy_to`; `skip + count` bytes are in the piece.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, count) };
            self.ram.wrote(to, count);
            (skip, bytes) = (0, &bytes[count..]);
            if bytes.is_empty() {
                return;
            }
        }
    }

    /// Copies `bytes` to the start, as many as there is room for, and returns their number.
    pub fn copy_from(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for iovec in &self.iovecs {
            let count = iovec.iov_len.min(bytes.len() - done);
            let from = &bytes[done..done + count];
            // SAFETY: as in `copy_to`.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), iovec.iov_base.cast(), count) };
            self.ram.wrote(iovec.iov_base.cast(), count);
            done += count;
        }
        done
    }

    /// The host has written the first `count` bytes. To be told after that.
    #[inline(always)]
    pub(super) fn wrote(&self, count: usize) {
        if self.ram.is_tracked() {
            self.mark(count);
        }
    }

    #[cold]
    #[inline(never)]
    fn mark(&self, mut count: usize) {
        for iovec in &self.iovecs {
            let written = iovec.iov_len.min(count);
            self.ram.wrote(iovec.iov_base.cast(), written);
            count -= written;
        }
    }

    /// `preadv`: bytes of the file at `offset` into the pieces. May read fewer.
    ///
    /// # Errors
    /// The host's.
    pub fn read_at(&self, fd: BorrowedFd, offset: u64) -> io::Result<usize> {
        let (offset, count) = (file_offset(offset)?, call_count(&self.iovecs));
        // SAFETY: the pieces are mapped RAM that any bytes may be written to.
        let done = unsafe { libc::preadv(fd.as_raw_fd(), self.iovecs.as_ptr(), count, offset) };
        let done = transferred(done);
        self.wrote(self.len);
        done
    }

    /// `pwritev`: the pieces' bytes, `most` of them, to the file at `offset`. May write fewer, and end
    /// anywhere: no bound is for files that take whole blocks only.
    ///
    /// # Errors
    /// The host's.
    pub fn write_at(&self, fd: BorrowedFd, offset: u64, most: usize) -> io::Result<usize> {
        let offset = file_offset(offset)?;
        let mut room = most;
        let whole = self.iovecs.iter().take_while(|piece| {
            let fits = piece.iov_len <= room;
            room -= if fits { piece.iov_len } else { 0 };
            fits
        });
        let (count, first) = (whole.count(), self.iovecs.first());
        // A part of the first one, where not even that is to go whole.
        let part = first.filter(|_| count == 0).map(|first| libc::iovec {
            iov_base: first.iov_base,
            iov_len: most,
        });
        let pieces = part.as_slice();
        let pieces = if pieces.is_empty() {
            &self.iovecs[..count]
        } else {
            pieces
        };
        let count = call_count(pieces);
        // SAFETY: the pieces are mapped RAM.
        let done = unsafe { libc::pwritev(fd.as_raw_fd(), pieces.as_ptr(), count, offset) };
        transferred(done)
    }

    /// `readv` of one message, as a tap gives them. None: it is longer than the pieces, or than the first
    /// 1023 of them, and its end is lost.
    ///
    /// # Errors
    /// The host's.
    pub fn read_message(&mut self, fd: BorrowedFd) -> io::Result<Option<usize>> {
        let most = PIECES_MAX as usize - 1;
        let (count, room) = if self.iovecs.len() <= most {
            (self.iovecs.len(), self.len)
        } else {
            let pieces = self.iovecs[..most].iter();
            (most, pieces.map(|piece| piece.iov_len).sum())
        };
        // Behind them a byte of rvmm's own tells a message that ends with them from one that goes on.
        let mut beyond = 0u8;
        let behind = libc::iovec {
            iov_base: (&raw mut beyond).cast(),
            iov_len: 1,
        };
        self.iovecs.insert(count, behind);
        let pieces = &self.iovecs[..=count];
        // SAFETY: as in `read_at`; the last piece is a byte that lives through the call.
        let done = unsafe { libc::readv(fd.as_raw_fd(), pieces.as_ptr(), call_count(pieces)) };
        let done = transferred(done);
        self.iovecs.remove(count);
        let done = done?;
        self.wrote(done.min(room));
        Ok(Some(done).filter(|done| *done <= room))
    }

    /// `writev`. May write fewer.
    ///
    /// # Errors
    /// The host's.
    pub fn write_to(&self, fd: BorrowedFd) -> io::Result<usize> {
        // SAFETY: as in `write_at`.
        let done = unsafe {
            libc::writev(
                fd.as_raw_fd(),
                self.iovecs.as_ptr(),
                call_count(&self.iovecs),
            )
        };
        transferred(done)
    }
}

/// As many as one call takes; the rest is a short transfer.
fn call_count(pieces: &[libc::iovec]) -> i32 {
    let count = i32::try_from(pieces.len()).unwrap_or(i32::MAX);
    count.min(libc::UIO_MAXIOV)
}

fn file_offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn transferred(done: isize) -> io::Result<usize> {
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests;
