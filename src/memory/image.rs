//! Guest RAM in a file: a snapshot's `memory`. The file has the bytes of RAM from its first one,
//! and holes instead of pages that are zero.
//!
//! [`save`] writes it, and [`open`] maps it: the guest reads the file's pages, and gets a page of
//! its own when it writes. [`Sums`] are checksums of the file's content.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::iter;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{ACCESS, Backing, Error, GuestMemory, Mapping, PAGE_SIZE, Region, create};
use crate::config::MemConfig;

const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);
/// Words of 64 bits in a page.
const WORDS: usize = PAGE / 8;

/// The most checksums of one image. A restore reads them, and uses none.
const SUMS_MAX: u64 = 64;
/// The least bytes that one checksum is of.
const CHUNK_MIN: u64 = 1 << 20;

/// Checksums of an image. Each is of `chunk` bytes; the last one may be of fewer.
///
/// A checksum is a Fletcher sum of the chunk's 64-bit little-endian words w, modulo 2^64: the sum
/// of all w, and the sum of these sums after each word. It is 0 for a chunk of zeros. It finds
/// damage by chance; it is no protection against people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sums {
    /// Bytes of a chunk.
    pub chunk: u64,
    /// One checksum for each chunk.
    pub sums: Vec<[u64; 2]>,
}

impl Sums {
    /// The sums of `size` bytes of zeros.
    fn of_zeros(size: u64) -> Self {
        let mut chunk = CHUNK_MIN;
        while size.div_ceil(chunk) > SUMS_MAX {
            chunk *= 2;
        }
        let count = usize::try_from(size.div_ceil(chunk)).unwrap_or_default();
        Self {
            chunk,
            sums: vec![[0; 2]; count],
        }
    }

    /// Adds the page at byte `at`, whose own sum is `page`. The pages of a chunk can be added in
    /// any order.
    fn add(&mut self, at: u64, page: [u64; 2]) {
        let Some(index) = usize::try_from(at / self.chunk).ok() else {
            return;
        };
        if let Some([sum, of_sums]) = self.sums.get_mut(index) {
            // The words of this page are part of each sum after the page.
            let behind = (self.chunk - at % self.chunk - PAGE_SIZE) / 8;
            *sum = sum.wrapping_add(page[0]);
            let later = page[0].wrapping_mul(behind);
            *of_sums = of_sums.wrapping_add(page[1]).wrapping_add(later);
        }
    }
}

/// A page of guest RAM, or of a buffer.
type Page<'a> = &'a [AtomicU64; WORDS];

/// Whether the page has only zeros.
fn is_zero(page: Page) -> bool {
    let is_zero = |words: &[AtomicU64]| {
        let bits = words.iter().map(|word| word.load(Ordering::Relaxed));
        bits.fold(0, |all, word| all | word) == 0
    };
    // Most pages that have other words have one at the start.
    is_zero(&page[..8]) && page.chunks_exact(UNROLLED).all(is_zero)
}

/// Words that are looked at without a branch: the loop costs less than the words.
const UNROLLED: usize = 32;

/// The Fletcher sum of a page.
fn sum(page: Page) -> [u64; 2] {
    let (mut sum, mut of_sums) = (0u64, 0u64);
    for words in page.chunks_exact(UNROLLED) {
        for word in words {
            sum = sum.wrapping_add(u64::from_le(word.load(Ordering::Relaxed)));
            of_sums = of_sums.wrapping_add(sum);
        }
    }
    [sum, of_sums]
}

/// Writes `ram` to `file`, which must be empty, and returns the checksums. The guest must not run,
/// and no device may write to RAM meanwhile.
///
/// Pages that the guest has never touched are not read, so they use no memory afterwards either.
///
/// # Errors
/// Fails if the file cannot be written.
pub fn save(ram: &GuestMemory, file: &File) -> io::Result<Sums> {
    let region = ram.iter().next().ok_or(io::ErrorKind::NotFound)?;
    let size = region.size() as u64;
    file.set_len(size)?;
    let mut sums = Sums::of_zeros(size);
    let mut touched = Touched::of(region)?;
    let mut run = 0..0;
    while let Some(pages) = touched.next()? {
        for number in pages {
            let page = page(region, number).ok_or(io::ErrorKind::UnexpectedEof)?;
            if is_zero(page) {
                continue;
            }
            sums.add((number * PAGE) as u64, sum(page));
            if run.end != number {
                write_pages(region, file, &run)?;
                run = number..number;
            }
            run.end = number + 1;
        }
    }
    write_pages(region, file, &run)?;
    Ok(sums)
}

/// Writes those pages of `ram` to their place in `file` that are marked in `pages`, as
/// [`pages_of`](super::pages_of) counts them, whatever is in them. The guest must not run, and no
/// device may write to RAM meanwhile.
///
/// # Errors
/// Fails if the file cannot be written.
pub fn save_marked(ram: &GuestMemory, file: &File, pages: &[u64]) -> io::Result<()> {
    let region = ram.iter().next().ok_or(io::ErrorKind::NotFound)?;
    file.set_len(region.size() as u64)?;
    for run in runs(pages, region.size() / PAGE) {
        write_pages(region, file, &run)?;
    }
    Ok(())
}

/// Copies those pages of the image `from` to the image `to` that are marked in `pages`. Both have
/// `size` bytes.
///
/// # Errors
/// Fails if a file cannot be read or written.
pub fn copy_marked(from: &File, to: &File, pages: &[u64], size: u64) -> io::Result<()> {
    let all = usize::try_from(size / PAGE_SIZE).map_err(io::Error::other)?;
    for run in runs(pages, all) {
        copy_range(from, to, run.start * PAGE..run.end * PAGE)?;
    }
    Ok(())
}

/// Copies what is not a hole in the first `size` bytes of `from` to `to`, which is empty and gets
/// that size.
///
/// # Errors
/// Fails if a file cannot be read or written.
pub fn copy_all(from: &File, to: &File, size: u64) -> io::Result<()> {
    to.set_len(size)?;
    let all = usize::try_from(size).map_err(io::Error::other)?;
    for range in data(from, 0..all)? {
        copy_range(from, to, range)?;
    }
    Ok(())
}

/// Makes `to`, which is empty, a copy of the first `size` bytes of `from`. Where the file system
/// can do that, the two share the blocks of all of `from`.
///
/// # Errors
/// Fails if a file cannot be read or written.
pub fn share_or_copy(from: &File, to: &File, size: u64) -> io::Result<()> {
    match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => Ok(()),
        Err(_) => copy_all(from, to, size),
    }
}

/// Copies a range of bytes to the same place in another file.
fn copy_range(from: &File, to: &File, range: Range<usize>) -> io::Result<()> {
    let mut bytes = vec![0; (1 << 20).min(range.len())];
    let mut at = range.start;
    while at < range.end {
        let count = bytes.len().min(range.end - at);
        from.read_exact_at(&mut bytes[..count], at as u64)?;
        to.write_all_at(&bytes[..count], at as u64)?;
        at += count;
    }
    Ok(())
}

/// The runs of pages that are marked, of the first `all` pages.
fn runs(pages: &[u64], all: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for page in super::pages_of(pages).take_while(|page| *page < all) {
        match runs.last_mut() {
            Some(last) if last.end == page => last.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}

/// A page of RAM, by its number. None beyond the end.
fn page(region: &Region, number: usize) -> Option<Page<'_>> {
    let inside = number < region.size() / PAGE;
    let at = region.as_ptr().wrapping_add(number * PAGE);
    // SAFETY: the page is inside the mapping, which lives as long as `region`, and is aligned. All
    // accesses through the result are atomic.
    inside.then(|| unsafe { &*at.cast() })
}

/// The most bytes that are written at once. Before each page that it writes to tmpfs, Linux 6.12
/// looks at all bytes that are left (docs/performance.md).
const STEP: usize = 32 << 10;

/// Writes pages of RAM to their place in `file`.
fn write_pages(region: &Region, file: &File, pages: &Range<usize>) -> io::Result<()> {
    let (mut at, end) = (pages.start * PAGE, pages.end * PAGE);
    debug_assert!(end <= region.size());
    while at < end {
        let offset = i64::try_from(at).map_err(io::Error::other)?;
        // SAFETY: the range is inside the mapping, and the kernel only reads it.
        let written = unsafe {
            libc::pwrite64(
                file.as_raw_fd(),
                region.as_ptr().add(at).cast(),
                STEP.min(end - at),
                offset,
            )
        };
        match usize::try_from(written) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => at += count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// Finds the pages of RAM that may have other bytes than zeros: those that are in memory or in
/// swap, by /proc/self/pagemap, and those that the mapped file has.
struct Touched<'a> {
    region: &'a Region,
    pagemap: File,
    /// The first page that was not looked at.
    next: usize,
    /// The entries of pages from `first` on.
    entries: Vec<u8>,
    first: usize,
}

/// Bytes of an entry of the pagemap (`Documentation/admin-guide/mm/pagemap.rst`).
const ENTRY: usize = 8;
/// The bits of an entry that are set if the page is in memory or in swap.
const PRESENT: u64 = 0b11 << 62;
/// Entries that are read at once.
const BATCH: usize = 1 << 13;

impl<'a> Touched<'a> {
    fn of(region: &'a Region) -> io::Result<Self> {
        Ok(Self {
            region,
            pagemap: File::open("/proc/self/pagemap")?,
            next: 0,
            entries: Vec::new(),
            first: 0,
        })
    }

    /// The next run of pages, in ascending order.
    fn next(&mut self) -> io::Result<Option<Range<usize>>> {
        let all = self.region.size() / PAGE;
        while self.next < all {
            if self.next >= self.first + self.entries.len() / ENTRY {
                self.fill(all)?;
            }
            let start = self.next;
            let touched = self.run(true);
            if touched > 0 {
                return Ok(Some(start..start + touched));
            }
            self.run(false);
        }
        Ok(None)
    }

    /// Skips the entries in memory that are touched, or that are not, and returns their number.
    fn run(&mut self, touched: bool) -> usize {
        let ahead = &self.entries[(self.next - self.first) * ENTRY..];
        let is_touched = |entry: &[u8]| {
            let entry = entry.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes));
            entry.unwrap_or(PRESENT) & PRESENT != 0
        };
        let same = ahead.chunks_exact(ENTRY);
        let count = same
            .take_while(|entry| is_touched(entry) == touched)
            .count();
        self.next += count;
        count
    }

    /// Reads the entries from page `next` on.
    fn fill(&mut self, all: usize) -> io::Result<()> {
        let count = BATCH.min(all - self.next);
        self.first = self.next;
        self.entries.resize(count * ENTRY, 0);
        let start = self.region.as_ptr() as u64 / PAGE_SIZE + self.next as u64;
        self.pagemap
            .read_exact_at(&mut self.entries, start * ENTRY as u64)?;
        if let Some(file) = self.region.file_offset() {
            let base = self.first * PAGE..(self.first + count) * PAGE;
            for range in data(file.file(), base)? {
                let pages = range.start / PAGE..range.end.div_ceil(PAGE);
                let entries = (pages.start - self.first) * ENTRY..(pages.end - self.first) * ENTRY;
                if let Some(entries) = self.entries.get_mut(entries) {
                    entries.fill(0xff);
                }
            }
        }
        Ok(())
    }
}

/// The ranges of `file` inside `within` that are not holes.
pub(super) fn data(file: &File, within: Range<usize>) -> io::Result<Vec<Range<usize>>> {
    let mut ranges = Vec::new();
    let mut at = within.start as u64;
    let end = within.end as u64;
    while at < end {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < end => start,
            // There is no more data.
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let stop = seek(file, SeekFrom::Hole(start))?.min(end);
        let range = [start, stop].map(|at| usize::try_from(at).unwrap_or(within.end));
        ranges.push(range[0]..range[1]);
        at = stop;
    }
    Ok(ranges)
}

/// Maps an image as guest RAM at guest-physical address `base`. Nothing is read now, and the file
/// is never written. It must not change as long as the RAM is used. With huge pages, the RAM is a
/// copy of the image.
///
/// # Errors
/// Fails if the file is not as large as `config` says, or if it cannot be mapped or read.
pub fn open(base: GuestAddress, config: MemConfig, file: File) -> Result<Arc<GuestMemory>, Error> {
    let size = config.size;
    let failed = |reason: String| Error::Map { size, reason };
    let found = file.metadata().map_err(|e| failed(e.to_string()))?.len();
    if found != size.bytes() {
        let reason = format!(
            "the snapshot's memory has {found} bytes, and not {}",
            size.bytes()
        );
        return Err(failed(reason));
    }
    if config.hugepages.is_some() {
        let ram = create(base, config, Backing::Private)?;
        copy(&file, &ram).map_err(|e| failed(e.to_string()))?;
        return Ok(ram);
    }
    let length = usize::try_from(size.bytes()).map_err(|e| failed(e.to_string()))?;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let mapping = Mapping::build(Some(FileOffset::new(file, 0)), length, ACCESS, flags);
    let mapping = mapping.map_err(|e| failed(e.to_string()))?;
    let region = Region::new(mapping, base);
    let region = region.ok_or_else(|| failed("it would end beyond the last address".into()))?;
    let ram = GuestMemory::from_regions(vec![region]).map_err(|e| failed(e.to_string()))?;
    Ok(Arc::new(ram))
}

/// Reads the data of `file` into `ram`.
fn copy(file: &File, ram: &GuestMemory) -> io::Result<()> {
    let region = ram.iter().next().ok_or(io::ErrorKind::NotFound)?;
    for range in data(file, 0..region.size())? {
        let mut at = range.start;
        while at < range.end {
            let offset = i64::try_from(at).map_err(io::Error::other)?;
            // SAFETY: the range is inside the mapping, which no one else uses yet.
            let count = unsafe {
                let to = region.as_ptr().add(at).cast();
                libc::pread64(file.as_raw_fd(), to, range.end - at, offset)
            };
            match usize::try_from(count) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => at += count,
                Err(_) => return Err(io::Error::last_os_error()),
            }
        }
    }
    Ok(())
}

/// Replaces a private mapping of a file by zeros: memory without a file, at the same address.
pub(super) fn forget(region: &Region) -> io::Result<()> {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
    // SAFETY: the range is a whole mapping. Only the guest's bytes are in it, and no Rust reference
    // to them exists. The new mapping has the same access.
    unsafe { mmap_anonymous(region.as_ptr().cast(), region.size(), access, flags) }?;
    Ok(())
}

/// Whether the region is a private mapping of a file.
pub(super) fn is_private_file(region: &Region) -> bool {
    region.file_offset().is_some() && region.flags() & libc::MAP_PRIVATE != 0
}

/// Reads all of an image of `size` bytes, and returns its checksums.
///
/// # Errors
/// Fails if the file cannot be read, or has another size.
pub fn sums(file: &File, size: u64) -> io::Result<Sums> {
    let found = file.metadata()?.len();
    if found != size {
        let reason = format!("it has {found} bytes, and not {size}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    let mut sums = Sums::of_zeros(size);
    let length = usize::try_from(size).map_err(io::Error::other)?;
    let zero = || [const { AtomicU64::new(0) }; WORDS];
    let pages: Vec<[AtomicU64; WORDS]> = iter::repeat_with(zero).take(STEP / PAGE).collect();
    for range in data(file, 0..length)? {
        for at in (range.start / PAGE * PAGE..range.end).step_by(STEP) {
            let count = (range.end - at).div_ceil(PAGE).min(pages.len());
            read(file, &pages[..count], at)?;
            for (page, at) in pages[..count].iter().zip((at..).step_by(PAGE)) {
                sums.add(at as u64, sum(page));
            }
        }
    }
    Ok(sums)
}

/// Fills `pages` with the bytes of `file` from byte `at` on.
fn read(file: &File, pages: &[[AtomicU64; WORDS]], at: usize) -> io::Result<()> {
    let length = pages.len() * PAGE;
    let mut done = 0;
    while done < length {
        let offset = i64::try_from(at + done).map_err(io::Error::other)?;
        // SAFETY: the range is inside the pages, whose words can be changed.
        let count = unsafe {
            let to = pages.as_ptr().cast_mut().cast::<u8>().add(done);
            libc::pread64(file.as_raw_fd(), to.cast(), length - done, offset)
        };
        match usize::try_from(count) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// Bytes of `file` that are not holes.
///
/// # Errors
/// Fails if the file system does not say.
pub fn data_bytes(file: &File) -> io::Result<u64> {
    let size = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    Ok(data(file, 0..size)?
        .iter()
        .map(|range| range.len() as u64)
        .sum())
}

#[cfg(test)]
mod tests;
