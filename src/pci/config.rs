//! The configuration space of a function (PCI Local Bus 3.0, chapter 6): its bytes, and the bits
//! that a guest can change.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The size of the configuration space in bytes. An ECAM has room for 4096 bytes; the rest reads
/// zero.
const SIZE: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_INTERRUPT: u16 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// The ids by which a driver finds its function.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// The vendor id, which is also the subsystem vendor id.
    pub vendor: u16,
    /// The device id.
    pub device: u16,
    /// The class code: base class, subclass and interface, 8 bits each.
    pub class: u32,
    /// The revision id.
    pub revision: u8,
    /// The subsystem id.
    pub subsystem: u16,
}

/// The saved state of a configuration space: the bits that a guest can change of each byte that has
/// such bits, by the byte's offset.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedConfig {
    bytes: BTreeMap<u8, u8>,
}

/// A configuration space of header type 0, with at most one BAR, which is 32-bit memory.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    /// The bits that a guest can change are set.
    writable: [u8; SIZE],
    /// The offset of the link in the last capability, which will point to the next one.
    link: usize,
    /// The offset at which the next capability will be added.
    next: usize,
    bar_size: Option<u32>,
}

impl ConfigSpace {
    /// The configuration space of a function without a BAR and without a pin.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            link: CAPABILITIES,
            next: FIRST_CAPABILITY,
            bar_size: None,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision]);
        space.put(0x09, &identity.class.to_le_bytes()[..3]);
        space.put(0x2c, &identity.vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(
            COMMAND,
            &(COMMAND_MEMORY | COMMAND_BUS_MASTER).to_le_bytes(),
        );
        space
    }

    /// Adds BAR 0 with `size` bytes, which has to be a power of two and at least 4096.
    #[must_use]
    pub fn with_bar(mut self, size: u32) -> Self {
        // The bits below the size always read zero. So do the type bits: the BAR is 32-bit memory,
        // and not prefetchable.
        self.allow(BAR0, &(!(size - 1)).to_le_bytes());
        self.bar_size = Some(size);
        self
    }

    /// Adds the interrupt pin INTA.
    #[must_use]
    pub fn with_pin(mut self) -> Self {
        self.put(INTERRUPT_PIN, &[1]);
        self.allow(INTERRUPT_LINE, &[0xff]);
        let all = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        self.allow(COMMAND, &all.to_le_bytes());
        self
    }

    /// Adds a capability, and returns its offset. `body` are the bytes behind the id and the link.
    /// In `writable`, the bits of `body` that a guest can change are set. All capabilities together
    /// have room for 192 bytes.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.next;
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        let offset = u8::try_from(at).unwrap_or(0);
        self.put(self.link, &[offset]);
        self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        offset.into()
    }

    /// Reads bytes at `offset`. Those beyond the end are zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let from = self.bytes.iter().skip(start(offset));
        let from = from.copied().chain(std::iter::repeat(0));
        data.iter_mut().zip(from).for_each(|(to, from)| *to = from);
    }

    /// Serves a store of the guest at `offset`: changes only the bits that a guest can change.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let to = self.bytes.iter_mut().zip(self.writable);
        for ((to, mask), from) in to.skip(start(offset)).zip(data) {
            *to = (*to & !mask) | (from & mask);
        }
    }

    /// The state: all bits that a guest can change.
    pub(super) fn save(&self) -> SavedConfig {
        let all = (0..=u8::MAX).zip(self.bytes.iter().zip(self.writable));
        let changing = all.filter(|(_, (_, mask))| *mask != 0);
        SavedConfig {
            bytes: changing
                .map(|(at, (byte, mask))| (at, byte & mask))
                .collect(),
        }
    }

    /// Takes over `saved`.
    ///
    /// # Errors
    /// Fails if that has other bytes or bits than those that a guest can change here.
    pub(super) fn load(&mut self, saved: &SavedConfig) -> Result<(), String> {
        let mut left = saved.bytes.clone();
        for (at, (byte, mask)) in (0..=u8::MAX).zip(self.bytes.iter_mut().zip(self.writable)) {
            if mask == 0 {
                continue;
            }
            let value = left
                .remove(&at)
                .ok_or_else(|| format!("byte {at:#x} of the configuration space is missing"))?;
            if value & !mask != 0 {
                return Err(format!(
                    "byte {at:#x} of the configuration space cannot be {value:#x}"
                ));
            }
            *byte = (*byte & !mask) | value;
        }
        match left.first_key_value() {
            Some((at, _)) => Err(format!(
                "byte {at:#x} of the configuration space cannot change"
            )),
            None => Ok(()),
        }
    }

    /// The address of BAR 0. `None` if there is no BAR, or if memory decoding is off.
    pub fn bar(&self) -> Option<u64> {
        self.bar_size?;
        let base = u32::from(self.word(BAR0)) | (u32::from(self.word(BAR0 + 2)) << 16);
        (self.word(COMMAND) & COMMAND_MEMORY != 0).then_some(base.into())
    }

    /// The size of BAR 0 in bytes. 0 if there is no BAR.
    pub fn bar_size(&self) -> u64 {
        self.bar_size.unwrap_or(0).into()
    }

    /// Whether the function may access memory (bus master enable). Messages are such accesses too.
    pub fn is_bus_master(&self) -> bool {
        self.word(COMMAND) & COMMAND_BUS_MASTER != 0
    }

    /// Whether the guest has disabled the interrupt pin (INTx disable).
    pub fn is_intx_disabled(&self) -> bool {
        self.word(COMMAND) & COMMAND_INTX_DISABLE != 0
    }

    /// Sets the interrupt status bit: whether the function asserts its pin, or would if INTx were
    /// not disabled.
    pub fn set_interrupt_status(&mut self, asserted: bool) {
        let others = self.word(STATUS) & !STATUS_INTERRUPT;
        let bit = if asserted { STATUS_INTERRUPT } else { 0 };
        self.put(STATUS, &(others | bit).to_le_bytes());
    }

    /// The 16-bit word at `offset`. Zero beyond the end.
    pub fn word(&self, offset: usize) -> u16 {
        match self.bytes.get(offset..).and_then(<[u8]>::first_chunk) {
            Some(bytes) => u16::from_le_bytes(*bytes),
            None => 0,
        }
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        let to = self.bytes.iter_mut().skip(offset);
        to.zip(bytes).for_each(|(to, from)| *to = *from);
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        let to = self.writable.iter_mut().skip(offset);
        to.zip(mask).for_each(|(to, from)| *to = *from);
    }
}

/// An offset as an index into the bytes.
fn start(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_8000,
            revision: 1,
            subsystem: 0x1100,
        };
        ConfigSpace::new(identity).with_bar(0x8000).with_pin()
    }

    fn read(space: &ConfigSpace, offset: u64) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_guest_finds_the_function() {
        let space = space();
        assert_eq!(read(&space, 0), 0x1042_1af4);
        assert_eq!(read(&space, 8), 0x0180_0001);
        assert_eq!(read(&space, 0x2c), 0x1100_1af4);
        assert_eq!(read(&space, 0x3c), 0x100);
    }

    #[test]
    fn a_bar_has_its_size_and_is_placed() {
        let mut space = space();
        space.write(0x10, &[0xff; 4]);
        assert_eq!(read(&space, 0x10), 0xffff_8000);
        space.write(0x10, &0x4000_1234u32.to_le_bytes());
        assert_eq!(read(&space, 0x10), 0x4000_0000);
        assert_eq!(space.bar(), None, "memory decoding is off");
        space.write(4, &[2]);
        assert_eq!(space.bar(), Some(0x4000_0000));
        // There is no other BAR, and no ROM.
        for offset in [0x14, 0x24, 0x30] {
            space.write(offset, &[0xff; 4]);
            assert_eq!(read(&space, offset), 0);
        }
    }

    #[test]
    fn only_what_may_change_does() {
        let mut space = space();
        let before = read(&space, 0);
        (0..4096u64).for_each(|offset| space.write(offset, &[0xff; 8]));
        assert_eq!(read(&space, 0), before);
        assert_eq!(read(&space, 4), 0x0000_0406);
        assert_eq!(read(&space, 0x3c), 0x1ff);
        assert_eq!(read(&space, 4094), 0);
        space.read(u64::MAX - 1, &mut [0; 1]);
    }

    #[test]
    fn capabilities_are_linked() {
        let mut space = space();
        let first = space.add_capability(9, &[1, 2, 3], &[]);
        let second = space.add_capability(0x11, &[4, 5, 6, 7], &[0, 0xc0]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(read(&space, 0x34), 0x40);
        assert_eq!(read(&space, 0x40), 0x0201_4809);
        assert_eq!(read(&space, 0x48), 0x0504_0011);
        assert_eq!(read(&space, 4) >> 16, 0x10);
        space.write(0x48, &[0xff; 4]);
        assert_eq!(read(&space, 0x48), 0xc504_0011);
        space.set_interrupt_status(true);
        assert_eq!(read(&space, 4) >> 16, 0x18);
    }
}
