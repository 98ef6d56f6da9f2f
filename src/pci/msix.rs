//! MSI-X (PCI Local Bus 3.0, section 6.8.2): a table of messages in BAR 0, and the masks that hold
//! them back.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::hypervisor::MsiMessage;
use crate::irqchip::msi::{MsiRouter, MsiVector};
use crate::util::Half;
use crate::util::sync::lock;

/// The size of a table entry in bytes: address, data, vector control.
const ENTRY: u64 = 16;
/// The mask bit of an entry's vector control.
const MASKED: u32 = 1;
/// The bits of a message's address that are always zero.
const LOW_BITS: u64 = 3;
/// Bits of the capability's message control.
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;

/// The capability's id.
pub(super) const CAPABILITY: u8 = 0x11;
/// Bits of the message control that a guest can change.
pub(super) const CONTROL_WRITABLE: u16 = ENABLE | FUNCTION_MASK;

/// The saved state of one vector. The message control is in the configuration space.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedMessage {
    address: u64,
    data: u32,
    masked: bool,
    /// There is a signal that waits until the message may be sent.
    pending: bool,
}

/// The messages of a function.
pub(super) struct Msix {
    /// The eventfd of each vector. A thread can signal it without the table's lock.
    signals: Vec<EventFd>,
    enabled: AtomicBool,
    table: Mutex<Table>,
}

struct Table {
    router: Arc<MsiRouter>,
    control: u16,
    bus_master: bool,
    entries: Vec<Entry>,
}

struct Entry {
    message: MsiMessage,
    control: u32,
    vector: MsiVector,
}

impl Msix {
    /// Creates `count` vectors, all of them masked.
    ///
    /// # Errors
    /// Fails if the host has no free descriptors, or KVM no free interrupt numbers.
    pub(super) fn new(router: &Arc<MsiRouter>, count: u16) -> io::Result<Self> {
        let entry = |_| {
            Ok(Entry {
                message: MsiMessage::default(),
                control: MASKED,
                vector: router.vector()?,
            })
        };
        let entries: Vec<Entry> = (0..count).map(entry).collect::<io::Result<_>>()?;
        let signals = entries.iter().map(|entry| entry.vector.descriptor());
        Ok(Self {
            signals: signals.collect::<io::Result<_>>()?,
            enabled: AtomicBool::new(false),
            table: Mutex::new(Table {
                router: Arc::clone(router),
                control: 0,
                bus_master: false,
                entries,
            }),
        })
    }

    /// The number of vectors.
    pub(super) fn count(&self) -> u16 {
        u16::try_from(self.signals.len()).unwrap_or(u16::MAX)
    }

    /// Whether the guest has enabled MSI-X, so that the function does not use its pin.
    pub(super) fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// Sends the message of `vector`, or keeps it pending if it may not be sent. Does nothing if
    /// there is no such vector.
    pub(super) fn signal(&self, vector: u16) {
        if let Some(signal) = self.signals.get(usize::from(vector)) {
            // This fails only if the eventfd's counter is at its maximum; the message is pending
            // then.
            let _ = signal.write(1);
        }
    }

    /// The eventfd of `vector`. To signal it is the same as [`Msix::signal`].
    pub(super) fn descriptor(&self, vector: u16) -> Option<EventFd> {
        self.signals.get(usize::from(vector))?.try_clone().ok()
    }

    /// Takes over the capability's message control, which the guest may have written.
    pub(super) fn set_control(&self, control: u16) {
        let mut table = lock(&self.table);
        if table.control != control & CONTROL_WRITABLE {
            table.control = control & CONTROL_WRITABLE;
            self.enabled.store(control & ENABLE != 0, Ordering::Release);
            table.apply();
        }
    }

    /// Sets whether the function is a bus master. If it is not, as at first, all messages stay
    /// pending.
    pub(super) fn set_bus_master(&self, allowed: bool) {
        let mut table = lock(&self.table);
        table.bus_master = allowed;
        table.apply();
    }

    /// The state of all vectors. Their devices must not signal them meanwhile.
    pub(super) fn save(&self) -> Vec<SavedMessage> {
        let table = lock(&self.table);
        let saved = table.entries.iter().map(|entry| SavedMessage {
            address: entry.message.address,
            data: entry.message.data,
            masked: entry.control & MASKED != 0,
            pending: entry.vector.is_pending(),
        });
        saved.collect()
    }

    /// Takes over `saved`. The vectors must be new and not enabled, so that this sends nothing.
    ///
    /// # Errors
    /// Fails if the function has another number of vectors, or if an address is invalid.
    pub(super) fn load(&self, saved: &[SavedMessage]) -> Result<(), String> {
        let mut table = lock(&self.table);
        let (here, there) = (table.entries.len(), saved.len());
        if here != there {
            return Err(format!(
                "it has {there} messages in the snapshot, and {here} now"
            ));
        }
        for (entry, saved) in table.entries.iter_mut().zip(saved) {
            let (address, data) = (saved.address, saved.data);
            if address & LOW_BITS != 0 {
                return Err(format!(
                    "the address {address:#x} of a message is not aligned"
                ));
            }
            entry.message = MsiMessage { address, data };
            entry.control = if saved.masked { MASKED } else { 0 };
            if saved.pending {
                entry.vector.signal();
            }
        }
        Ok(())
    }

    /// Serves a load from the table. Only a load of 4 or 8 bytes at a multiple of 4 reads it; any
    /// other leaves `data` zero.
    pub(super) fn read_table(&self, offset: u64, data: &mut [u8]) {
        let table = lock(&self.table);
        words(offset, data.len(), |at, range| {
            let word = table.entry(at).map_or(0, |entry| entry.word(at));
            data[range].copy_from_slice(&word.to_le_bytes());
        });
    }

    /// Serves a store to the table. Only a store of 4 or 8 bytes at a multiple of 4 has an effect.
    pub(super) fn write_table(&self, offset: u64, data: &[u8]) {
        let mut table = lock(&self.table);
        words(offset, data.len(), |at, range| {
            if let (Some(index), Ok(word)) = (table.index(at), data[range].try_into()) {
                table.entries[index].set_word(at, u32::from_le_bytes(word));
            }
        });
        table.apply();
    }

    /// Serves a load from the pending bit array.
    pub(super) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let table = lock(&self.table);
        for (ahead, byte) in (0u64..).zip(data) {
            let first = offset.saturating_add(ahead).saturating_mul(8);
            let first = usize::try_from(first).unwrap_or(usize::MAX);
            let entries = table.entries.iter().skip(first).take(8);
            let bits = entries.enumerate();
            *byte = bits.fold(0, |bits, (bit, entry)| {
                bits | (u8::from(entry.vector.is_pending()) << bit)
            });
        }
    }
}

impl Table {
    fn index(&self, offset: u64) -> Option<usize> {
        let index = usize::try_from(offset / ENTRY).ok()?;
        (index < self.entries.len()).then_some(index)
    }

    fn entry(&self, offset: u64) -> Option<&Entry> {
        self.index(offset).map(|index| &self.entries[index])
    }

    /// Connects the vectors whose messages may be sent, and disconnects the others. Changes the
    /// machine's routes at most once.
    fn apply(&mut self) {
        let all = self.control == ENABLE && self.bus_master;
        let may_send = |entry: &Entry| all && entry.control & MASKED == 0;
        for entry in &mut self.entries {
            if !may_send(entry) {
                entry.vector.disconnect();
            }
        }
        let live = self.entries.iter_mut().filter(|entry| may_send(entry));
        let live = live.map(|entry| (&mut entry.vector, entry.message));
        self.router.connect(live);
    }
}

impl Entry {
    /// The 32-bit word of this entry at `offset` in the table.
    fn word(&self, offset: u64) -> u32 {
        match offset % ENTRY {
            0 => Half::Low.of(self.message.address),
            4 => Half::High.of(self.message.address),
            8 => self.message.data,
            _ => self.control,
        }
    }

    fn set_word(&mut self, offset: u64, word: u32) {
        let address = &mut self.message.address;
        match offset % ENTRY {
            0 => *address = Half::Low.set(*address, word) & !LOW_BITS,
            4 => *address = Half::High.set(*address, word),
            8 => self.message.data = word,
            _ => self.control = word & MASKED,
        }
    }
}

/// Calls `word` for each 32-bit word of an access, with the word's offset and its range in the
/// data. Does so only for an access of 4 or 8 bytes at a multiple of 4.
fn words(offset: u64, length: usize, mut word: impl FnMut(u64, std::ops::Range<usize>)) {
    if offset % 4 == 0 && (length == 4 || length == 8) {
        for first in (0..length).step_by(4) {
            word(offset.saturating_add(first as u64), first..first + 4);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::fake::FakeVm;

    fn msix(count: u16) -> (Arc<FakeVm>, Msix) {
        let vm = Arc::new(FakeVm::default());
        let router = MsiRouter::new(Arc::clone(&vm) as _);
        let msix = Msix::new(&router, count).unwrap();
        msix.set_bus_master(true);
        (vm, msix)
    }

    fn write_entry(msix: &Msix, vector: u64, data: u32, control: u32) {
        msix.write_table(vector * 16, &0x2800_0000u64.to_le_bytes());
        msix.write_table(vector * 16 + 8, &data.to_le_bytes());
        msix.write_table(vector * 16 + 12, &control.to_le_bytes());
    }

    fn pending(msix: &Msix) -> u8 {
        let mut byte = [0];
        msix.read_pending(0, &mut byte);
        byte[0]
    }

    #[test]
    fn vectors_are_connected_at_once() {
        let (vm, msix) = msix(8);
        msix.set_control(ENABLE | FUNCTION_MASK);
        (0..8).for_each(|vector| write_entry(&msix, vector, 5, 0));
        assert!(lock(&vm.tables).is_empty() && lock(&vm.irqfds).is_empty());
        msix.set_control(ENABLE);
        assert_eq!(lock(&vm.tables).len(), 1, "one table for all of them");
        assert_eq!(lock(&vm.tables)[0].len(), 8);
        assert_eq!(lock(&vm.irqfds).len(), 8);
        msix.set_control(0);
        assert!(lock(&vm.irqfds).is_empty());
        msix.set_control(ENABLE);
        assert_eq!(lock(&vm.tables).len(), 1);
    }

    #[test]
    fn a_masked_vector_is_pending() {
        let (vm, msix) = msix(3);
        msix.set_control(ENABLE);
        write_entry(&msix, 1, 9, 0);
        assert_eq!(*lock(&vm.irqfds), [1]);
        msix.write_table(16 + 12, &1u32.to_le_bytes());
        assert!(lock(&vm.irqfds).is_empty());
        assert_eq!(pending(&msix), 0);
        msix.signal(1);
        msix.signal(3);
        msix.signal(u16::MAX);
        assert_eq!(pending(&msix), 0b10);
        let tables = lock(&vm.tables).len();
        msix.write_table(16 + 12, &0u32.to_le_bytes());
        assert_eq!(lock(&vm.tables).len(), tables, "the message is the same");
        assert_eq!(*lock(&vm.irqfds), [1]);
    }

    #[test]
    fn without_the_bus_messages_are_pending() {
        let (vm, msix) = msix(2);
        msix.set_control(ENABLE);
        write_entry(&msix, 0, 9, 0);
        msix.set_bus_master(false);
        assert!(lock(&vm.irqfds).is_empty());
        msix.signal(0);
        write_entry(&msix, 0, 9, 0);
        assert!(lock(&vm.irqfds).is_empty());
        assert_eq!(pending(&msix), 1);
        msix.set_bus_master(true);
        assert_eq!(*lock(&vm.irqfds), [0]);
    }

    #[test]
    fn a_message_can_move_while_it_is_live() {
        let (vm, msix) = msix(1);
        msix.set_control(ENABLE);
        write_entry(&msix, 0, 9, 0);
        msix.write_table(8, &10u32.to_le_bytes());
        assert_eq!(lock(&vm.tables).last().unwrap()[0].1.data, 10);
        assert_eq!(*lock(&vm.irqfds), [0]);
    }

    #[test]
    fn hostile_accesses_do_nothing() {
        let (vm, msix) = msix(2);
        for offset in [0, 1, 2, 3, 28, 32, 4096, u64::MAX - 7, u64::MAX - 3] {
            for length in [1, 2, 3, 4, 8] {
                let mut data = [0xff; 8];
                msix.write_table(offset, &data[..length]);
                msix.read_table(offset, &mut data[..length]);
                msix.read_pending(offset, &mut data[..length]);
            }
        }
        assert!(lock(&vm.irqfds).is_empty());
        let mut data = [0; 4];
        msix.read_table(28, &mut data);
        assert_eq!(data, [1, 0, 0, 0], "only the mask is kept");
    }
}
