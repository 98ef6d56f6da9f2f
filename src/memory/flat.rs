//! Access to guest RAM for rings and descriptors, a few bytes at a time.
//!
//! RAM is one region, so one subtraction finds a place in it. vm-memory's own collections search
//! for the region at each access.
#![allow(unsafe_code)]

use std::iter::FusedIterator;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, Permissions,
    VolatileSlice,
};

use super::dirty::{DirtyLog, DirtySlice, dirty_log};
use super::{GuestMemory, Region};

/// All of guest RAM. It stays mapped as long as this value lives.
pub struct FlatRam {
    start: u64,
    size: u64,
    host: *mut u8,
    log: DirtyLog,
    ram: Arc<GuestMemory>,
}

// SAFETY: `host` points to guest RAM, which `ram` keeps mapped. Any thread may access guest RAM.
unsafe impl Send for FlatRam {}
// SAFETY: as above. All accesses are through raw pointers, never through references.
unsafe impl Sync for FlatRam {}

impl FlatRam {
    /// Wraps `ram`, which has to be one region, as [`super::create`] makes it. Further regions
    /// would be ignored.
    pub fn of(ram: &Arc<GuestMemory>) -> Arc<Self> {
        debug_assert_eq!(ram.num_regions(), 1);
        let region = ram.iter().next();
        let place = |region: &Region| (region.start_addr().0, region.len(), region.as_ptr());
        let (start, size, host) = region.map_or((0, 0, std::ptr::null_mut()), place);
        Arc::new(Self {
            start,
            size,
            host,
            log: dirty_log(ram),
            ram: Arc::clone(ram),
        })
    }

    /// The host address of the `length` bytes at `gpa`, if all of them are RAM. After a write
    /// there, the caller has to call [`FlatRam::wrote`].
    pub(super) fn host_address(&self, gpa: GuestAddress, length: usize) -> Option<*mut u8> {
        let offset = gpa.0.checked_sub(self.start)?;
        let room = self.size.checked_sub(offset)?;
        let fits = length as u64 <= room;
        fits.then(|| {
            self.host
                .wrapping_add(usize::try_from(offset).unwrap_or(usize::MAX))
        })
    }
}

impl FlatRam {
    /// Marks the `length` bytes at host address `host` as written by rvmm or by the host's kernel.
    #[inline(always)]
    pub(super) fn wrote(&self, host: *const u8, length: usize) {
        let offset = host.addr().wrapping_sub(self.host.addr());
        self.log.mark(offset, length);
    }

    /// Whether writes are logged now.
    #[inline(always)]
    pub(super) fn is_tracked(&self) -> bool {
        self.log.is_on()
    }
}

impl vm_memory::GuestMemory for FlatRam {
    type PhysicalMemory = GuestMemory;
    type Bitmap = DirtyLog;

    fn check_range(&self, gpa: GuestAddress, length: usize, _: Permissions) -> bool {
        self.host_address(gpa, length).is_some()
    }

    fn get_slices(
        &self,
        gpa: GuestAddress,
        length: usize,
        _: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'_, DirtySlice<'_>>, GuestMemoryError> {
        let host = self.host_address(gpa, length);
        let host = host.ok_or(GuestMemoryError::InvalidGuestAddress(gpa))?;
        let marks = self
            .log
            .slice_at(host.addr().wrapping_sub(self.host.addr()));
        // SAFETY: the range is RAM that stays mapped at least as long as `self` is borrowed.
        let slice = unsafe { VolatileSlice::with_bitmap(host, length, marks, None) };
        Ok(OneSlice(Some(slice).filter(|_| length > 0)))
    }

    fn physical_memory(&self) -> Option<&GuestMemory> {
        Some(&self.ram)
    }
}

/// An iterator over the one slice that a range consists of.
struct OneSlice<'a>(Option<VolatileSlice<'a, DirtySlice<'a>>>);

impl<'a> Iterator for OneSlice<'a> {
    type Item = Result<VolatileSlice<'a, DirtySlice<'a>>, GuestMemoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.take().map(Ok)
    }
}

impl FusedIterator for OneSlice<'_> {}

impl<'a> GuestMemorySliceIterator<'a, DirtySlice<'a>> for OneSlice<'a> {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemConfig;
    use crate::memory;
    use crate::util::ByteSize;
    use vm_memory::Bytes;

    const START: u64 = 0x8000_0000;
    const END: u64 = START + (1 << 20);

    fn flat() -> Arc<FlatRam> {
        let ram = memory::create(
            GuestAddress(START),
            MemConfig::new(ByteSize::mib(1)),
            memory::Backing::Private,
        );
        FlatRam::of(&ram.unwrap())
    }

    #[test]
    fn what_is_written_is_in_ram() {
        let flat = flat();
        for gpa in [START, START + 13, END - 8] {
            flat.write_obj(gpa, GuestAddress(gpa)).unwrap();
            assert_eq!(flat.read_obj::<u64>(GuestAddress(gpa)).unwrap(), gpa);
            assert_eq!(flat.ram.read_obj::<u64>(GuestAddress(gpa)).unwrap(), gpa);
        }
    }

    #[test]
    fn ranges_end_where_ram_does() {
        let flat = flat();
        for (gpa, length, fits) in [
            (START, 1 << 20, true),
            (END, 0, true),
            (START - 1, 1, false),
            (END - 7, 8, false),
            (END, 1, false),
            (END + 1, 0, false),
            (0, 1, false),
            (u64::MAX, 2, false),
            (START, usize::MAX, false),
        ] {
            let is_ram = flat.host_address(GuestAddress(gpa), length).is_some();
            assert_eq!(is_ram, fits, "{length} bytes at {gpa:#x}");
        }
        assert!(flat.read_obj::<u64>(GuestAddress(END - 4)).is_err());
        assert!(flat.write_slice(&[0; 16], GuestAddress(END - 8)).is_err());
    }
}
