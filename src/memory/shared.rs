//! Guest RAM in a memfd (memfd_create(2)), which other processes can map too.

use std::fs::File;
use std::io;

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use vm_memory::FileOffset;

use crate::config::HugePages;
use crate::util::ByteSize;

/// Creates a memfd of `size` zero bytes, in huge pages if `hugepages` says so. Its size is sealed,
/// so no other process can truncate the file and so make rvmm fault.
pub(super) fn file(size: ByteSize, hugepages: Option<HugePages>) -> io::Result<FileOffset> {
    let kind = match hugepages {
        None => MemfdFlags::empty(),
        Some(HugePages::TwoMib) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        Some(HugePages::OneGib) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | kind;
    let file = File::from(memfd_create("guest-ram", flags)?);
    ftruncate(&file, size.bytes())?;
    // F_SEAL_SEAL: no other process can add a seal against writes.
    fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(FileOffset::new(file, 0))
}

/// Gives the memory of the first `length` bytes back to the host. They read as 0 then, in every
/// mapping of the file.
pub(super) fn clear(file: &File, length: usize) -> io::Result<()> {
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, hole, 0, length as u64)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use rustix::io::{FdFlags, fcntl_getfd};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;
    use crate::config::MemConfig;
    use crate::memory::{self, Backing};

    const BASE: GuestAddress = GuestAddress(0x8000_0000);
    const CONFIG: MemConfig = MemConfig::new(ByteSize::mib(2));

    #[test]
    fn the_file_is_the_ram() {
        let ram = memory::create(BASE, CONFIG, Backing::Shared).unwrap();
        let region = ram.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        let mut bytes = [0; 8];
        ram.write_obj(7u64, GuestAddress(BASE.0 + 4096)).unwrap();
        file.read_exact_at(&mut bytes, 4096).unwrap();
        assert_eq!(u64::from_ne_bytes(bytes), 7);
        file.write_all_at(&[9], 0).unwrap();
        assert_eq!(ram.read_obj::<u8>(BASE).unwrap(), 9);
        assert!(file.metadata().unwrap().blocks() > 0);
        memory::clear(&ram, CONFIG).unwrap();
        assert_eq!(ram.read_obj::<u8>(BASE).unwrap(), 0);
        file.read_exact_at(&mut bytes, 4096).unwrap();
        assert_eq!(bytes, [0; 8]);
        assert_eq!(file.metadata().unwrap().len(), 2 << 20);
    }

    #[test]
    fn its_size_is_sealed_and_no_child_has_it() {
        let file = file(ByteSize::mib(2), None).unwrap();
        let file = file.file();
        for size in [0, 1 << 20, 4 << 20] {
            file.set_len(size).unwrap_err();
        }
        fcntl_add_seals(file, SealFlags::WRITE).unwrap_err();
        assert!(fcntl_getfd(file).unwrap().contains(FdFlags::CLOEXEC));
    }

    #[test]
    fn private_ram_has_no_file() {
        let ram = memory::create(BASE, CONFIG, Backing::Private).unwrap();
        assert!(ram.iter().all(|region| region.file_offset().is_none()));
    }

    /// Uses huge pages if the host has free ones. If not, the error has to explain what to do.
    #[test]
    fn huge_pages_are_reserved() {
        let huge = MemConfig {
            hugepages: Some(HugePages::TwoMib),
            ..CONFIG
        };
        match memory::create(BASE, huge, Backing::Shared) {
            Ok(ram) => {
                ram.write_obj(7u64, BASE).unwrap();
                memory::clear(&ram, huge).unwrap();
                assert_eq!(ram.read_obj::<u64>(BASE).unwrap(), 0);
            }
            Err(error) => assert!(error.to_string().contains("huge pages"), "{error}"),
        }
    }
}
