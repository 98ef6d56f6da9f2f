//! The log of the pages of guest RAM that rvmm itself writes. KVM's dirty log does not have these.
//!
//! KVM logs the guest's own stores (KVM_GET_DIRTY_LOG). Devices, SBI calls and the loader write
//! through rvmm's mapping, and so do system calls that rvmm makes for them. While tracking is on,
//! this log marks all these writes, with one bit for each page.
//!
//! **The rule: a writer writes the bytes first, and marks the page then.** A reader that copies RAM
//! takes the marks first, and reads the pages then. If it takes a mark, it sees the bytes. If bytes
//! are written and not marked yet, a later take has their mark. So the last take has to come after
//! the last write, when the devices are paused. A request that the kernel serves by itself
//! (io_uring) is marked when it comes back. A read of a file marks all its buffers, whatever the
//! result: a direct read that fails, or is short, may have written more bytes than it reports.
//!
//! While tracking is off, a write costs one relaxed load and a branch, and the bits use no memory.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering, compiler_fence};
use std::sync::{Arc, Mutex};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use rustix::thread::{MembarrierCommand, membarrier};
use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{GuestMemory, PAGE_SIZE};
use crate::util::sync::lock;

/// Bytes that one bit stands for.
const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);

/// Pages that one word of the bitmap stands for.
const WORD_PAGES: usize = 64;

/// The number of words in the bitmap of `size` bytes of RAM. It is the same for rvmm's log and
/// KVM's.
pub fn words_of(size: usize) -> usize {
    size.div_ceil(PAGE * WORD_PAGES)
}

/// The numbers of the pages that are marked in `words`, in ascending order. Page 0 is the first
/// page of RAM.
pub fn pages_of(words: &[u64]) -> impl Iterator<Item = usize> + '_ {
    let of_word = |(index, word): (usize, &u64)| {
        let word = *word;
        let marked = (0..WORD_PAGES).filter(move |bit| (word >> bit) & 1 == 1);
        marked.map(move |bit| index * WORD_PAGES + bit)
    };
    let words = words.iter().enumerate();
    words.filter(|(_, word)| **word != 0).flat_map(of_word)
}

/// The log of one mapping of guest RAM. A clone refers to the same log.
#[derive(Clone, Default)]
pub struct DirtyLog(Arc<Log>);

/// The bitmap, and whether tracking is on.
#[derive(Default)]
struct Log {
    /// Points to the first word of the bitmap. Null while tracking is off.
    on: AtomicPtr<AtomicU64>,
    pages: usize,
    /// The first start maps the bitmap. It stays mapped when tracking stops, because a thread that
    /// has read the pointer may still mark a page. It uses no memory while tracking is off.
    bits: Mutex<Option<Bits>>,
}

impl DirtyLog {
    /// Starts tracking, with no page marked. A write from before this call may not be marked, but
    /// its bytes are visible to every thread when the call returns. All later writes are marked.
    ///
    /// # Errors
    /// Fails if the host has no memory for the bitmap, or no membarrier(2).
    pub fn start(&self) -> io::Result<()> {
        let log = &self.0;
        let mut bits = lock(&log.bits);
        let words = log.pages.div_ceil(WORD_PAGES);
        if words == 0 {
            return Ok(());
        }
        // A writer has no memory barrier between its write of the bytes and its load of `on`. The
        // membarrier call below is that barrier, on each CPU that runs a thread of rvmm.
        membarrier(MembarrierCommand::RegisterPrivateExpedited)?;
        let bits = match bits.take() {
            Some(known) => bits.insert(known),
            None => bits.insert(Bits::map(words)?),
        };
        bits.forget()?;
        log.on.store(bits.start.as_ptr(), Ordering::Release);
        let passed = membarrier(MembarrierCommand::PrivateExpedited);
        if passed.is_err() {
            log.on.store(null_mut(), Ordering::Release);
        }
        Ok(passed?)
    }

    /// Stops tracking, and gives the bitmap's memory back to the host.
    ///
    /// # Errors
    /// Fails if the memory cannot be given back. Tracking is off also then.
    pub fn stop(&self) -> io::Result<()> {
        let bits = lock(&self.0.bits);
        self.0.on.store(null_mut(), Ordering::Release);
        bits.as_ref().map_or(Ok(()), Bits::forget)
    }

    /// Whether tracking is on.
    pub fn is_on(&self) -> bool {
        !self.0.on.load(Ordering::Relaxed).is_null()
    }

    /// Returns the marks since the last take, and clears them. Page 0 is bit 0 of the first word,
    /// as in KVM's log. Returns no words while tracking is off. The caller has to read the pages
    /// after this call, not before.
    pub fn take(&self) -> Vec<u64> {
        let _bits = lock(&self.0.bits);
        let words = self.0.words();
        // Most words are 0. A load before the swap leaves their cache lines shared.
        let take = |word: &AtomicU64| match word.load(Ordering::Relaxed) {
            0 => 0,
            _ => word.swap(0, Ordering::AcqRel),
        };
        words.map_or_else(Vec::new, |words| words.iter().map(take).collect())
    }

    /// Marks the pages of the `length` bytes at `offset`. To be called after they were written.
    #[inline(always)]
    pub fn mark(&self, offset: usize, length: usize) {
        self.0.mark(offset, length);
    }
}

impl Log {
    #[inline(always)]
    fn mark(&self, offset: usize, length: usize) {
        // The compiler must not move the load of `on` before the write of the bytes. The membarrier
        // in `start` does the same for the CPU.
        compiler_fence(Ordering::SeqCst);
        if !self.on.load(Ordering::Relaxed).is_null() {
            self.mark_words(offset, length);
        }
    }

    /// Ignores what is beyond the end of RAM.
    #[cold]
    #[inline(never)]
    fn mark_words(&self, offset: usize, length: usize) {
        let (Some(words), Some(rest)) = (self.words(), length.checked_sub(1)) else {
            return;
        };
        let first = offset / PAGE;
        let last = (offset.saturating_add(rest) / PAGE).min(self.pages - 1);
        if first > last {
            return;
        }
        let (first_word, last_word) = (first / WORD_PAGES, last / WORD_PAGES);
        for (index, word) in (first_word..).zip(&words[first_word..=last_word]) {
            let mut marks = u64::MAX;
            if index == first_word {
                marks &= u64::MAX << (first % WORD_PAGES);
            }
            if index == last_word {
                marks &= u64::MAX >> (WORD_PAGES - 1 - last % WORD_PAGES);
            }
            // Release: a thread that takes the mark sees the bytes. For that, a bit has to be
            // written also if it is set already.
            word.fetch_or(marks, Ordering::Release);
        }
    }

    /// The words of the bitmap. `None` while tracking is off.
    fn words(&self) -> Option<&[AtomicU64]> {
        let start = NonNull::new(self.on.load(Ordering::Acquire))?;
        let count = self.pages.div_ceil(WORD_PAGES);
        // SAFETY: `on` points to the start of `bits`, which has that many words and stays mapped
        // until `self` is dropped. All accesses are atomic, and `Bits::forget` leaves zeros.
        Some(unsafe { std::slice::from_raw_parts(start.as_ptr(), count) })
    }
}

/// An anonymous mapping that holds the bitmap, at first all zeros.
struct Bits {
    start: NonNull<AtomicU64>,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone, and all threads of the process can access it.
unsafe impl Send for Bits {}

impl Bits {
    fn map(words: usize) -> io::Result<Self> {
        let bytes = words * size_of::<AtomicU64>();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping, for which the kernel chooses a free address.
        let start = unsafe { mmap_anonymous(null_mut(), bytes, access, flags) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, bytes })
    }

    /// Clears all bits, and gives their memory back to the host.
    fn forget(&self) -> io::Result<()> {
        let start = self.start.as_ptr().cast();
        // SAFETY: the mapping belongs to `self`, and all accesses to its words are atomic.
        unsafe { madvise(start, self.bytes, Advice::LinuxDontNeed) }?;
        Ok(())
    }
}

impl Drop for Bits {
    fn drop(&mut self) {
        // SAFETY: `map` mapped this range. The log is dropped too, so no thread can mark any more.
        // If munmap fails, the mapping is leaked, which is harmless.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

impl fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dirty log of {} pages", self.0.pages)
    }
}

/// The log of a slice of RAM, for vm-memory. Offsets count from `base`.
#[derive(Clone, Copy)]
pub struct DirtySlice<'a> {
    log: &'a Log,
    base: usize,
}

impl fmt::Debug for DirtySlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dirty log from {:#x}", self.base)
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyLog {
    type S = DirtySlice<'a>;
}

/// vm-memory calls `mark_dirty` after its write, as the rule of this module demands.
impl Bitmap for DirtyLog {
    #[inline(always)]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.0.mark(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(0).dirty_at(offset)
    }

    #[inline(always)]
    fn slice_at(&self, offset: usize) -> DirtySlice<'_> {
        DirtySlice {
            log: &self.0,
            base: offset,
        }
    }
}

impl NewBitmap for DirtyLog {
    fn with_len(len: usize) -> Self {
        Self(Arc::new(Log {
            pages: len.div_ceil(PAGE),
            ..Log::default()
        }))
    }
}

impl<'b> WithBitmapSlice<'_> for DirtySlice<'b> {
    type S = DirtySlice<'b>;
}

impl BitmapSlice for DirtySlice<'_> {}

impl Bitmap for DirtySlice<'_> {
    #[inline(always)]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.mark(self.base.wrapping_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = self.base.wrapping_add(offset) / PAGE;
        let words = self.log.words().unwrap_or_default();
        let word = words.get(page / WORD_PAGES);
        word.is_some_and(|word| (word.load(Ordering::Relaxed) >> (page % WORD_PAGES)) & 1 == 1)
    }

    #[inline(always)]
    fn slice_at(&self, offset: usize) -> Self {
        Self {
            log: self.log,
            base: self.base.wrapping_add(offset),
        }
    }
}

/// The log of `ram`, which is one region.
pub fn dirty_log(ram: &GuestMemory) -> DirtyLog {
    let region = ram.iter().next();
    let log = region.map(|region| vm_memory::MmapRegion::bitmap(region).clone());
    log.unwrap_or_default()
}

/// Moves the marks from vhost's log to the log of `ram`.
///
/// vhost writes to guest RAM inside the host's kernel, and keeps a log of its own:
/// VHOST_SET_LOG_BASE with VHOST_F_LOG_ALL (`log_write` in `drivers/vhost/vhost.c`). `log` is that
/// bitmap; vhost may set bits in it at the same time. Bit 0 of the first word is the page at
/// guest-physical address 0, and the bitmap has to reach to the end of RAM. vhost too writes the
/// bytes first and marks them then. So this has to be called before each [`DirtyLog::take`], and
/// once more when vhost has stopped. rvmm does not make vhost keep a log yet.
pub fn merge_vhost(ram: &GuestMemory, log: &[AtomicU64]) {
    for region in ram.iter() {
        let Ok(first) = usize::try_from(region.start_addr().0 / PAGE_SIZE) else {
            continue;
        };
        let end = first + region.size() / PAGE;
        for (index, word) in log.iter().enumerate() {
            let page = index * WORD_PAGES;
            if page + WORD_PAGES <= first || page >= end || word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            for marked in pages_of(&[word.swap(0, Ordering::AcqRel)]) {
                if let Some(offset) = (page + marked).checked_sub(first) {
                    vm_memory::MmapRegion::bitmap(region).mark(offset * PAGE, PAGE);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
