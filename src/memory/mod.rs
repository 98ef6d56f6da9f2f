//! Guest RAM in the host's memory: one mapping, private, of a memfd, or a private one of a
//! snapshot's file. The host populates a page when it is touched first; reserved huge pages are set
//! aside when RAM is mapped.

mod dirty;
mod flat;
pub mod image;
mod pieces;
mod ring;
mod shared;

use std::io;
use std::sync::Arc;

use log::debug;
use rustix::system::sysinfo;
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress, MmapRegion,
};

use crate::config::{HugePages, MemConfig};
use crate::util::ByteSize;
pub use dirty::{DirtyLog, DirtySlice, dirty_log, merge_vhost, pages_of, words_of};
pub use flat::FlatRam;
pub use pieces::{Byte, NotRam, Pieces};
pub use ring::{Ended, Op, Ring};

/// Guest RAM. Writes through it are marked in its [`DirtyLog`].
pub type GuestMemory = GuestMemoryMmap<DirtyLog>;

/// A region of guest RAM. rvmm's RAM is one region.
pub type Region = GuestRegionMmap<DirtyLog>;

/// A mapping of host memory that rvmm can give to the guest.
pub type Mapping = MmapRegion<DirtyLog>;

/// The page size of RISC-V hosts and guests, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// The reason why guest RAM cannot be made.
#[derive(Debug, Error)]
pub enum Error {
    /// The size is not a multiple of the page size.
    #[error(
        "{} bytes of guest RAM are not whole pages: --mem takes multiples of {} here",
        .size.bytes(), .page.as_flag()
    )]
    Unaligned {
        /// The configured size.
        size: ByteSize,
        /// The page size.
        page: ByteSize,
    },
    /// The size is more than the host's RAM and swap.
    #[error(
        "{wanted} of guest RAM are more than this host has ({host} with swap): give less with --mem"
    )]
    HostTooSmall {
        /// The configured size.
        wanted: ByteSize,
        /// The host's RAM and swap.
        host: ByteSize,
    },
    /// Too few huge pages are reserved and free.
    #[error(
        "Failed to map {wanted} of guest RAM: fewer than {count} huge pages of {} are free: \
         reserve them in /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages, or leave out \
         hugepages={}",
        .page, .page.as_flag()
    )]
    TooFewHugePages {
        /// The configured size.
        wanted: ByteSize,
        /// The size of a page.
        page: ByteSize,
        /// The size of a page in KiB, as it stands in /sys.
        kib: u64,
        /// The number of pages that the guest needs.
        count: u64,
    },
    /// The memory cannot be allocated or mapped.
    #[error("Failed to map {size} of guest RAM: {reason}")]
    Map {
        /// The size of the mapping.
        size: ByteSize,
        /// The error message of the host or of vm-memory.
        reason: String,
    },
}

/// The kind of mapping that backs guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private memory of this process.
    Private,
    /// A memfd with a sealed size, which another process can map too.
    Shared,
}

/// Maps guest RAM as `config` says, at guest-physical address `base`.
///
/// # Errors
/// Fails if the size is not a multiple of the page size, if it is more than the host's RAM and swap
/// together, or if the memory cannot be allocated or mapped.
pub fn create(
    base: GuestAddress,
    config: MemConfig,
    backing: Backing,
) -> Result<Arc<GuestMemory>, Error> {
    let size = config.size;
    let page = config
        .hugepages
        .map_or(ByteSize(PAGE_SIZE), HugePages::size);
    if size.bytes() % page.bytes() != 0 {
        return Err(Error::Unaligned { size, page });
    }
    let host = host_memory();
    if size > host {
        return Err(Error::HostTooSmall { wanted: size, host });
    }
    let failed = |reason: String| Error::Map { size, reason };
    let length = usize::try_from(size.bytes()).map_err(|e| failed(e.to_string()))?;
    let file = match backing {
        Backing::Private => None,
        Backing::Shared => Some(shared::file(size, config.hugepages).map_err(no_file(size))?),
    };
    let mapping = match config.hugepages {
        Some(pages) => map_huge(size, length, pages, file)?,
        None => map_ordinary(length, file).map_err(|e| failed(e.to_string()))?,
    };
    let region = Region::new(mapping, base)
        .ok_or_else(|| failed("it would end beyond the last address".into()))?;
    let ram = GuestMemory::from_regions(vec![region]).map_err(|e| failed(e.to_string()))?;
    Ok(Arc::new(ram))
}

fn no_file(size: ByteSize) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::Map {
        size,
        reason: format!("cannot create a memfd: {error}"),
    }
}

/// Zeroes all of `ram`, which was created with `config`. Ordinary memory goes back to the host
/// until it is touched again. Reserved huge pages stay allocated.
///
/// # Errors
/// Fails if madvise(2) or fallocate(2) fails.
#[allow(unsafe_code)]
pub fn clear(ram: &GuestMemory, config: MemConfig) -> io::Result<()> {
    use rustix::mm::{Advice, madvise};
    for region in ram.iter() {
        if config.hugepages.is_some() {
            // To release huge pages would end their reservation on older kernels, or fail.
            zero(region)?;
            continue;
        }
        match region.file_offset() {
            // With MADV_DONTNEED the file's bytes would come back.
            Some(_) if image::is_private_file(region) => image::forget(region)?,
            // With MADV_DONTNEED the bytes would stay in the file.
            Some(file) => shared::clear(file.file(), region.size())?,
            None => {
                let (start, length) = (region.as_ptr().cast(), region.size());
                // SAFETY: the range is a private mapping without a file. Only the guest's bytes are
                // in it, and no Rust reference to them exists.
                unsafe { madvise(start, length, Advice::LinuxDontNeed) }?;
            }
        }
        Mapping::bitmap(region).mark(0, region.size());
    }
    Ok(())
}

fn zero(region: &Region) -> io::Result<()> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let mut at = 0;
    while at < region.size() {
        let length = ZEROS.len().min(region.size() - at);
        let place = MemoryRegionAddress(at as u64);
        let written = region.write_slice(&ZEROS[..length], place);
        written.map_err(io::Error::other)?;
        at += length;
    }
    Ok(())
}

const ACCESS: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// The mmap flags for a mapping of `file`, or for an anonymous mapping.
fn mapping_flags(file: Option<&FileOffset>) -> i32 {
    match file {
        Some(_) => libc::MAP_SHARED,
        None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    }
}

/// Maps ordinary memory, with transparent huge pages if the host has them: they halve the cost of
/// the first touch.
fn map_ordinary(length: usize, file: Option<FileOffset>) -> Result<Mapping, MmapRegionError> {
    let flags = mapping_flags(file.as_ref()) | libc::MAP_NORESERVE;
    let mapping = Mapping::build(file, length, ACCESS, flags)?;
    advise_huge(&mapping);
    Ok(mapping)
}

#[allow(unsafe_code)]
fn advise_huge(mapping: &Mapping) {
    use rustix::mm::{Advice, madvise};
    let (start, length) = (mapping.as_ptr().cast(), mapping.size());
    // SAFETY: the range is a whole mapping, and the advice changes none of its bytes.
    if let Err(error) = unsafe { madvise(start, length, Advice::LinuxHugepage) } {
        debug!("the host has no transparent huge pages for guest RAM: {error}");
    }
}

/// Maps the host's reserved huge pages. Without MAP_NORESERVE this sets all of them aside, so no
/// later touch can fail.
fn map_huge(
    size: ByteSize,
    length: usize,
    pages: HugePages,
    file: Option<FileOffset>,
) -> Result<Mapping, Error> {
    let page = pages.size();
    let kind = match pages {
        HugePages::TwoMib => libc::MAP_HUGE_2MB,
        HugePages::OneGib => libc::MAP_HUGE_1GB,
    };
    // A memfd already knows the size of its pages.
    let kind = match file {
        Some(_) => 0,
        None => libc::MAP_HUGETLB | kind,
    };
    let flags = mapping_flags(file.as_ref()) | kind;
    Mapping::build(file, length, ACCESS, flags).map_err(|error| match &error {
        MmapRegionError::Mmap(source) if source.kind() == io::ErrorKind::OutOfMemory => {
            Error::TooFewHugePages {
                wanted: size,
                page,
                kib: page.bytes() >> 10,
                count: size.bytes() / page.bytes(),
            }
        }
        _ => Error::Map {
            size,
            reason: error.to_string(),
        },
    })
}

/// The size of the host's RAM and swap together.
fn host_memory() -> ByteSize {
    let info = sysinfo();
    let unit = u64::from(info.mem_unit);
    ByteSize((info.totalram as u64).saturating_add(info.totalswap as u64) * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: GuestAddress = GuestAddress(0x8000_0000);

    #[test]
    fn ram_is_zeroed_and_where_it_was_asked_for() {
        for backing in [Backing::Private, Backing::Shared] {
            let ram = create(BASE, MemConfig::new(ByteSize::mib(2)), backing).unwrap();
            assert_eq!(ram.last_addr().0, 0x801f_ffff);
            assert_eq!(ram.read_obj::<u64>(BASE).unwrap(), 0);
            assert!(ram.read_obj::<u8>(GuestAddress(0x7fff_ffff)).is_err());
            ram.write_obj(1u64, BASE).unwrap();
            clear(&ram, MemConfig::new(ByteSize::mib(2))).unwrap();
            assert_eq!(ram.read_obj::<u64>(BASE).unwrap(), 0);
            let last = GuestAddress(BASE.0 + (2 << 20) - 8);
            ram.write_obj(1u64, last).unwrap();
            ram.iter().for_each(|region| zero(region).unwrap());
            assert_eq!(ram.read_obj::<u64>(last).unwrap(), 0);
        }
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let line = |size| {
            let config = MemConfig::new(ByteSize(size));
            create(BASE, config, Backing::Shared)
                .unwrap_err()
                .to_string()
        };
        assert!(line(5000).contains("multiples of 4K"));
        assert!(line(u64::MAX - 4095).contains("more than this host has"));
    }

    #[test]
    fn huge_pages_are_whole_and_reserved() {
        let huge = |size| MemConfig {
            size,
            hugepages: Some(HugePages::OneGib),
        };
        let line = |size| {
            create(BASE, huge(size), Backing::Private)
                .unwrap_err()
                .to_string()
        };
        assert!(line(ByteSize::mib(256)).contains("multiples of 1G"));
    }
}
