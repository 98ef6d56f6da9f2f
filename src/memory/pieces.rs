//! Pieces of guest RAM that make up a request's buffer, for readv(2), writev(2) and their like.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use vm_memory::GuestAddress;

use super::FlatRam;

/// The most pieces that one system call takes (UIO_MAXIOV).
pub(super) const PIECES_MAX: u32 = libc::UIO_MAXIOV.unsigned_abs();

/// The error for a guest-physical range of which a part is not RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotRam;

/// Pieces of guest RAM, in the order in which the guest gave them. They stay mapped as long as this
/// value lives.
///
/// The guest can write to them at any time, so bytes that are used twice have to be copied first.
/// All writes of the host to them go through this type, which marks them in the dirty log.
#[derive(Clone)]
pub struct Pieces {
    ram: Arc<FlatRam>,
    iovecs: Vec<libc::iovec>,
    len: usize,
}

// SAFETY: the pointers are to guest RAM, which `ram` keeps mapped. Any thread may access guest RAM.
unsafe impl Send for Pieces {}

/// One byte of guest RAM. It stays mapped as long as this value lives.
pub struct Byte {
    host: *mut u8,
    ram: Arc<FlatRam>,
}

// SAFETY: as for `Pieces`.
unsafe impl Send for Byte {}

impl Byte {
    /// Writes the byte.
    pub fn set(&self, value: u8) {
        // SAFETY: the byte is mapped RAM, and no reference to it exists.
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
    /// An empty list of pieces of `ram`.
    pub fn of(ram: &Arc<FlatRam>) -> Self {
        Self {
            ram: Arc::clone(ram),
            iovecs: Vec::new(),
            len: 0,
        }
    }

    /// Adds the `len` bytes at `gpa` at the end.
    ///
    /// # Errors
    /// [`NotRam`] if a part of the range is not RAM.
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

    /// Adds a piece at the end. Merges it with the last one if it begins where that ends, because
    /// the cost of a system call grows with the number of pieces.
    fn add(&mut self, piece: libc::iovec) {
        match self.iovecs.last_mut() {
            Some(last) if last.iov_base.wrapping_byte_add(last.iov_len) == piece.iov_base => {
                last.iov_len += piece.iov_len;
            }
            _ => self.iovecs.push(piece),
        }
    }

    /// The number of bytes in all pieces.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the host address of each piece is a multiple of `address`, and its length a multiple
    /// of `length`.
    pub fn are_multiples(&self, address: usize, length: usize) -> bool {
        self.iovecs
            .iter()
            .all(|piece| piece.iov_base.addr() % address == 0 && piece.iov_len % length == 0)
    }

    pub(super) fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// Removes the first `count` bytes, or all if there are fewer.
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

    /// Adds the pieces of `more` at the end. They have to be of the same RAM.
    pub fn append(&mut self, more: &Pieces) {
        debug_assert!(Arc::ptr_eq(&self.ram, &more.ram));
        more.iovecs.iter().for_each(|piece| self.add(*piece));
        self.len += more.len;
    }

    /// Takes all pieces, and leaves an empty list.
    pub fn take(&mut self) -> Pieces {
        let nothing = Pieces::of(&self.ram);
        std::mem::replace(self, nothing)
    }

    /// Removes the last byte and returns it. `None` if there are no bytes.
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

    /// Keeps the first `count` bytes. Removes the rest and returns it.
    pub fn split_off(&mut self, count: usize) -> Pieces {
        let mut rest = Pieces::of(&self.ram);
        let mut keep = count.min(self.len);
        (rest.len, self.len) = (self.len - keep, keep);
        // Find the first piece that is not kept as a whole.
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

    /// Copies bytes from the start of the pieces to `bytes`, until one of them ends. Returns the
    /// number of bytes copied.
    pub fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for iovec in &self.iovecs {
            let count = iovec.iov_len.min(bytes.len() - done);
            let to = &mut bytes[done..done + count];
            // SAFETY: the piece is mapped RAM of `iov_len` bytes, and no reference to it exists. If
            // the guest writes meanwhile, that only changes which bytes are copied.
            unsafe { std::ptr::copy_nonoverlapping(iovec.iov_base.cast(), to.as_mut_ptr(), count) };
            done += count;
        }
        done
    }

    /// Copies `bytes` to the pieces, behind their first `skip` bytes, as many as fit.
    pub fn copy_from_at(&self, mut skip: usize, mut bytes: &[u8]) {
        for iovec in &self.iovecs {
            if skip >= iovec.iov_len {
                skip -= iovec.iov_len;
                continue;
            }
            let count = (iovec.iov_len - skip).min(bytes.len());
            let to = iovec.iov_base.wrapping_byte_add(skip).cast::<u8>();
            // SAFETY: as in `copy_to`; the piece has at least `skip + count` bytes.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, count) };
            self.ram.wrote(to, count);
            (skip, bytes) = (0, &bytes[count..]);
            if bytes.is_empty() {
                return;
            }
        }
    }

    /// Copies `bytes` to the start of the pieces, as many as fit. Returns the number of bytes
    /// copied.
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

    /// Marks the first `count` bytes in the dirty log. To be called after they were written.
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

    /// Reads from the file at `offset` into the pieces (preadv(2)), and returns the number of
    /// bytes. May read fewer than there is room for.
    ///
    /// # Errors
    /// Fails if preadv(2) fails, or if `offset` is 2^63 or more.
    pub fn read_at(&self, fd: BorrowedFd, offset: u64) -> io::Result<usize> {
        let (offset, count) = (file_offset(offset)?, call_count(&self.iovecs));
        // SAFETY: the pieces are mapped RAM, in which any bytes are valid.
        let done = unsafe { libc::preadv(fd.as_raw_fd(), self.iovecs.as_ptr(), count, offset) };
        let done = transferred(done);
        self.wrote(self.len);
        done
    }

    /// Writes at most `most` bytes of the pieces to the file at `offset` (pwritev(2)), and returns
    /// the number of bytes. Passes only whole pieces to the kernel, except if the first one is
    /// longer than `most`. A short write can end at any byte. For a file that takes only whole
    /// blocks, the caller has to give `most` as `usize::MAX`, because a bound may cut a block.
    ///
    /// # Errors
    /// Fails if pwritev(2) fails, or if `offset` is 2^63 or more.
    pub fn write_at(&self, fd: BorrowedFd, offset: u64, most: usize) -> io::Result<usize> {
        let offset = file_offset(offset)?;
        let mut room = most;
        let whole = self.iovecs.iter().take_while(|piece| {
            let fits = piece.iov_len <= room;
            room -= if fits { piece.iov_len } else { 0 };
            fits
        });
        let (count, first) = (whole.count(), self.iovecs.first());
        // If even the first piece is longer than `most`, write a part of it.
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

    /// Reads one message, such as a tap's packet, with one readv(2). Returns its length. `None` if
    /// the message is longer than the pieces, or than the first 1023 of them; its end is lost then.
    ///
    /// # Errors
    /// Fails if readv(2) fails.
    pub fn read_message(&mut self, fd: BorrowedFd) -> io::Result<Option<usize>> {
        let most = PIECES_MAX as usize - 1;
        let (count, room) = if self.iovecs.len() <= most {
            (self.iovecs.len(), self.len)
        } else {
            let pieces = self.iovecs[..most].iter();
            (most, pieces.map(|piece| piece.iov_len).sum())
        };
        // Add one byte of rvmm's own behind the pieces. The kernel writes to it only if the message
        // is longer than the pieces.
        let mut beyond = 0u8;
        let behind = libc::iovec {
            iov_base: (&raw mut beyond).cast(),
            iov_len: 1,
        };
        self.iovecs.insert(count, behind);
        let pieces = &self.iovecs[..=count];
        // SAFETY: as in `read_at`; the last piece is `beyond`, which outlives the call.
        let done = unsafe { libc::readv(fd.as_raw_fd(), pieces.as_ptr(), call_count(pieces)) };
        let done = transferred(done);
        self.iovecs.remove(count);
        let done = done?;
        self.wrote(done.min(room));
        Ok(Some(done).filter(|done| *done <= room))
    }

    /// Writes the pieces to `fd` (writev(2)), and returns the number of bytes. May write fewer than
    /// there are.
    ///
    /// # Errors
    /// Fails if writev(2) fails.
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

/// The number of pieces for one system call. If there are more than it takes, the transfer is
/// short.
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
