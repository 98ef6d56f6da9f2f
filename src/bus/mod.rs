//! MMIO dispatch, and the traits of a device.

mod irq;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;
use thiserror::Error;
pub use vm_fdt::{Error as FdtError, FdtWriter};

use crate::snapshot::{LoadError, Parts, SaveError, Saved};
use crate::util::{RateLimit, guest_warn};
pub use irq::{IrqLine, IrqSink};

/// Memory-mapped registers, which the guest accesses by loads and stores.
///
/// The vCPUs' threads call the methods, several at the same time. Implementations must not wait for
/// a file of the host, or for a reader of the console's output. There is one exception: a store
/// that resets a virtio device, or clears its bus master enable, waits until the device has
/// stopped.
pub trait MmioDevice: Send + Sync {
    /// Serves a load at `offset` bytes from the start of the device's range. `data` has 1, 2, 4 or
    /// 8 bytes, all zero at first. The whole access is inside the range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Serves a store at `offset`. `data` has 1, 2, 4 or 8 bytes. The whole access is inside the
    /// range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A part of the machine with a name. It can have nodes in the device tree, can be paused, and can
/// describe its state.
///
/// The machine calls [`Device::pause`] and [`Device::resume`] alternately, and only while no vCPU
/// runs. Any thread may call the other methods at any time. The caller must not hold a lock.
pub trait Device: Send + Sync {
    /// The name, such as `uart` or `disk0`. It is unique in the machine.
    fn id(&self) -> &str;

    /// Adds the device's nodes to the device tree, inside `/soc`. A device that the guest finds by
    /// other means, such as a PCI function, adds none.
    ///
    /// # Errors
    /// Fails if the writer refuses a name or value, which is a bug in rvmm.
    fn fdt_node(&self, fdt: &mut FdtWriter) -> Result<(), FdtError>;

    /// A readable name for the registers that are at guest-physical address `gpa` now, for the
    /// statistics. `None` if this device has no registers there. Only devices of which a machine
    /// can have several have to implement this. `machine/layout.rs` has a name for the others.
    fn registers_at(&self, _gpa: u64) -> Option<String> {
        None
    }

    /// Pauses the device. Requests that have begun are complete when this returns. Until
    /// [`Device::resume`], the device does not write to guest RAM, does not change an interrupt,
    /// and takes no input from the host. No request is lost: the device serves those that have not
    /// begun, and new ones, after the resume. This method may wait for the host's disk.
    fn pause(&self) {}

    /// Ends a [`Device::pause`]: the device goes on where it stopped. A device that cannot go on
    /// reports that to its driver (DEVICE_NEEDS_RESET), or logs it.
    fn resume(&self) {}

    /// Waits until the device has done what [`Device::resume`] began: a thread may start.
    fn settle(&self) {}

    /// The device's state for a snapshot. Called only while the device is paused. A device that has
    /// no state returns nothing.
    ///
    /// # Errors
    /// Fails if KVM or the host refuses to read a part of the state.
    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        Ok(Vec::new())
    }

    /// Takes over the state that [`Device::save`] returned in another process. Called once, on a
    /// new device, before the guest runs; the device is paused then, and stays paused until
    /// [`Device::resume`]. Sets the level of the device's interrupt line. The state of the
    /// interrupt controller is loaded after that of all other devices.
    ///
    /// The state may come from a stranger: nothing in it may make this panic, block or allocate
    /// without a bound.
    ///
    /// # Errors
    /// Fails if the state is not complete, or if this device cannot have it.
    fn load(&self, _parts: &mut Parts) -> Result<(), LoadError> {
        Ok(())
    }

    /// The device's state for the user, as a JSON object with a `kind`, as in `{"kind": "uart"}`.
    fn describe(&self) -> Value;
}

#[cfg(test)]
impl<D: Device + ?Sized> crate::snapshot::testing::Part for D {
    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        Device::save(self)
    }

    fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        Device::load(self, parts)
    }
}

/// Two devices claim the same address. This is a bug in the machine's layout.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the MMIO ranges {} and {} overlap", range(.0), range(.1))]
pub struct Overlap(Range<u64>, Range<u64>);

fn range(r: &Range<u64>) -> String {
    format!("{:#x}..{:#x}", r.start, r.end)
}

/// The devices by guest-physical address: a sorted list of ranges. The list does not change once
/// the machine runs.
pub struct Bus {
    regions: Vec<Region>,
    /// The index of the region of the last access. It is tried first, because the next access is
    /// mostly to the same device.
    last: AtomicUsize,
    unmapped: RateLimit,
}

struct Region {
    range: Range<u64>,
    device: Arc<dyn MmioDevice>,
}

impl Region {
    /// Whether all `len` bytes at `gpa` are in this region.
    #[inline]
    fn holds(&self, gpa: u64, len: usize) -> bool {
        let (start, end) = (self.range.start, self.range.end);
        start <= gpa && gpa <= end && len as u64 <= end - gpa
    }
}

impl Default for Bus {
    fn default() -> Self {
        Self {
            regions: Vec::new(),
            last: AtomicUsize::new(0),
            unmapped: RateLimit::named("bus"),
        }
    }
}

impl Bus {
    /// Gives the addresses in `range` to `device`.
    ///
    /// # Errors
    /// Fails if a part of the range belongs to another device.
    pub fn insert(
        &mut self,
        range: Range<u64>,
        device: Arc<dyn MmioDevice>,
    ) -> Result<(), Overlap> {
        let at = self
            .regions
            .partition_point(|r| r.range.start < range.start);
        let neighbours = at.saturating_sub(1)..self.regions.len().min(at + 1);
        for Region { range: taken, .. } in &self.regions[neighbours] {
            if taken.start < range.end && range.start < taken.end {
                return Err(Overlap(taken.clone(), range));
            }
        }
        self.regions.insert(at, Region { range, device });
        Ok(())
    }

    /// Serves a guest's load of `len` bytes, at most 8. Returns the bytes as a little-endian
    /// number. They are all ones if no device has all of these addresses.
    pub fn read(&self, gpa: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        let data = &mut bytes[..len.min(8)];
        match self.find(gpa, data.len()) {
            Some(region) => region.device.read(gpa - region.range.start, data),
            None => {
                data.fill(0xff);
                self.warn_unmapped("read", gpa, len);
            }
        }
        u64::from_le_bytes(bytes)
    }

    /// Serves a guest's store. It has no effect if no device has all of these addresses.
    pub fn write(&self, gpa: u64, data: &[u8]) {
        match self.find(gpa, data.len()) {
            Some(region) => region.device.write(gpa - region.range.start, data),
            None => self.warn_unmapped("wrote", gpa, data.len()),
        }
    }

    /// The region that contains all `len` bytes at `gpa`.
    #[inline]
    fn find(&self, gpa: u64, len: usize) -> Option<&Region> {
        let last = self.regions.get(self.last.load(Ordering::Relaxed))?;
        if last.holds(gpa, len) {
            return Some(last);
        }
        self.search(gpa, len)
    }

    #[inline(never)]
    fn search(&self, gpa: u64, len: usize) -> Option<&Region> {
        let after = self.regions.partition_point(|r| r.range.start <= gpa);
        let index = after.checked_sub(1)?;
        let region = self.regions.get(index)?;
        let found = region.holds(gpa, len).then_some(region)?;
        self.last.store(index, Ordering::Relaxed);
        Some(found)
    }

    #[cold]
    fn warn_unmapped(&self, act: &str, gpa: u64, len: usize) {
        guest_warn!(
            self.unmapped,
            "the guest {act} {len} bytes at {gpa:#x}, where there is no RAM and no device"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::util::sync::lock;
    use std::sync::Mutex;

    /// Returns the offset of each load as its value, and records the stores.
    #[derive(Default)]
    struct Probe(Mutex<Vec<(u64, Vec<u8>)>>);

    impl MmioDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data[0] = u8::try_from(offset).unwrap();
        }
        fn write(&self, offset: u64, data: &[u8]) {
            lock(&self.0).push((offset, data.to_vec()));
        }
    }

    fn bus() -> (Bus, Arc<Probe>) {
        let (mut bus, high) = (Bus::default(), Arc::new(Probe::default()));
        bus.insert(0x2000..0x2010, high.clone()).unwrap();
        bus.insert(0x1000..0x1010, Arc::new(Probe::default()))
            .unwrap();
        (bus, high)
    }

    #[test]
    fn an_access_finds_its_device() {
        let (bus, high) = bus();
        assert_eq!(bus.read(0x1008, 4), 8);
        assert_eq!(bus.read(0x2000, 1), 0);
        bus.write(0x200c, &[1, 2, 3, 4]);
        assert_eq!(*lock(&high.0), [(0xc, vec![1, 2, 3, 4])]);
    }

    /// The region of the last access is tried first. It must not serve an access to another region.
    #[test]
    fn whatever_the_access_before() {
        let (bus, _) = bus();
        let expected = [
            (0x1000, 1, 0),
            (0x2000, 1, 0),
            (0x100f, 1, 0xf),
            (0x2003, 1, 3),
            (0x100f, 2, 0xffff),
            (0x1010, 1, 0xff),
            (0xfff, 2, 0xffff),
            (u64::MAX, 1, 0xff),
        ];
        for before in expected {
            for (gpa, len, value) in expected {
                bus.read(before.0, before.1);
                assert_eq!(bus.read(gpa, len), value, "{gpa:#x} after {:#x}", before.0);
            }
        }
        assert_eq!(Bus::default().read(0, 1), 0xff);
    }

    #[test]
    fn where_nothing_is_reads_all_ones() {
        let (bus, high) = bus();
        for gpa in [0, 0xfff, 0x1010, 0x200d, 0x2010, u64::MAX] {
            assert_eq!(bus.read(gpa, 4), 0xffff_ffff, "{gpa:#x}");
            bus.write(gpa, &[0; 4]);
        }
        assert_eq!(bus.read(u64::MAX, 8), u64::MAX);
        assert!(lock(&high.0).is_empty());
    }

    #[test]
    fn overlaps_are_refused() {
        let (mut bus, probe) = bus();
        for range in [
            0x0fff..0x1001,
            0x1000..0x1010,
            0x100f..0x1011,
            0x0000..0x9000,
            0x2008..0x2009,
        ] {
            assert!(bus.insert(range, probe.clone()).is_err());
        }
        bus.insert(0x1010..0x2000, probe).unwrap();
    }
}
