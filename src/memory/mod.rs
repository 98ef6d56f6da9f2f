//! Guest RAM as the host sees it: one anonymous, private mapping, populated on first touch.

use std::sync::Arc;

use rustix::system::sysinfo;
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::util::ByteSize;

/// Guest RAM, as every part of rvmm names it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// The page size of RISC-V hosts and guests, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Why there is no guest RAM.
#[derive(Debug, Error)]
pub enum Error {
    /// Not whole pages.
    #[error("{} of guest RAM are not whole pages: --mem takes multiples of 4K", .0)]
    Unaligned(ByteSize),
    /// More than the host could ever back.
    #[error(
        "{wanted} of guest RAM are more than this host has ({host} with swap): give less with --mem"
    )]
    HostTooSmall {
        /// What was asked for.
        wanted: ByteSize,
        /// The host's RAM and swap.
        host: ByteSize,
    },
    /// The host refused the mapping.
    #[error("Failed to map {size} of guest RAM: {reason}")]
    Map {
        /// The size of the mapping.
        size: ByteSize,
        /// What the host or vm-memory said.
        reason: String,
    },
}

/// Maps `size` bytes of guest RAM at guest-physical address `base`.
///
/// # Errors
/// `size` is no multiple of [`PAGE_SIZE`], is more than the host's RAM and swap together, or the
/// host refuses the mapping.
pub fn create(base: GuestAddress, size: ByteSize) -> Result<Arc<GuestMemory>, Error> {
    if size.bytes() % PAGE_SIZE != 0 {
        return Err(Error::Unaligned(size));
    }
    let host = host_memory();
    if size > host {
        return Err(Error::HostTooSmall { wanted: size, host });
    }
    let failed = |reason: String| Error::Map { size, reason };
    let length = usize::try_from(size.bytes()).map_err(|e| failed(e.to_string()))?;
    let ram = GuestMemory::from_ranges(&[(base, length)]).map_err(|e| failed(e.to_string()))?;
    Ok(Arc::new(ram))
}

/// The host's RAM and swap together.
fn host_memory() -> ByteSize {
    let info = sysinfo();
    let unit = u64::from(info.mem_unit);
    ByteSize((info.totalram as u64).saturating_add(info.totalswap as u64) * unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    const BASE: GuestAddress = GuestAddress(0x8000_0000);

    #[test]
    fn ram_is_zeroed_and_where_it_was_asked_for() {
        let ram = create(BASE, ByteSize::mib(2)).unwrap();
        assert_eq!(ram.last_addr().0, 0x801f_ffff);
        assert_eq!(ram.read_obj::<u64>(BASE).unwrap(), 0);
        assert!(ram.read_obj::<u8>(GuestAddress(0x7fff_ffff)).is_err());
    }

    #[test]
    fn absurd_sizes_are_told() {
        let line = |size| create(BASE, ByteSize(size)).unwrap_err().to_string();
        assert!(line(5000).contains("multiples of 4K"));
        assert!(line(u64::MAX - 4095).contains("more than this host has"));
    }
}
