//! The used ring, which the device writes (VIRTIO 1.2, section 2.7.8).
//!
//! virtio-queue's `add_used` is not used: it stores the ring's index after each element, but the
//! buffers of one packet have to become visible at once (section 5.1.6.4).

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::bits::word;
use crate::memory::FlatRam;

/// Layout of the used ring: flags and index of 16 bits each, then elements of 8 bytes.
const INDEX: u64 = 2;
const ELEMENTS: u64 = 4;
const ELEMENT: u64 = 8;
/// Layout of the available ring: flags and index of 16 bits each, entries of 2 bytes, then
/// `used_event`.
const ENTRIES: u64 = 4;
const ENTRY: u64 = 2;

/// The used ring of a live queue. All its parts are in RAM: this was checked before the queue went
/// live.
pub(super) struct UsedRing {
    ring: u64,
    driver_ring: u64,
    size: u16,
    event_idx: bool,
    /// The index that the driver sees.
    next: Wrapping<u16>,
    /// Elements made visible since the last call of [`UsedRing::wants_interrupt`].
    fresh: Wrapping<u16>,
    /// Every index stored so far.
    #[cfg(test)]
    pub(super) shown: Vec<u16>,
}

impl UsedRing {
    /// The used ring of `queue`, which the driver has set up and not used yet.
    pub(super) fn of(queue: &Queue) -> Self {
        Self {
            ring: queue.used_ring(),
            driver_ring: queue.avail_ring(),
            size: queue.size(),
            event_idx: queue.event_idx_enabled(),
            next: Wrapping(0),
            fresh: Wrapping(0),
            #[cfg(test)]
            shown: Vec::new(),
        }
    }

    /// Writes a used element: the head of a chain, and the number of bytes written to it. Its place
    /// is `ahead` elements after the last one that the driver can see.
    pub(super) fn write(
        &self,
        ram: &FlatRam,
        ahead: u16,
        head: u16,
        written: u32,
    ) -> Result<(), Error> {
        let place = u64::from((self.next + Wrapping(ahead)).0 % self.size);
        let at = GuestAddress(self.ring + ELEMENTS + ELEMENT * place);
        let element = u64::from(head) | (u64::from(written) << 32);
        ram.write_obj(element.to_le(), at)
            .map_err(Error::GuestMemory)
    }

    /// Makes the next `count` elements, which have been written, visible to the driver.
    pub(super) fn show(&mut self, ram: &FlatRam, count: u16) -> Result<(), Error> {
        self.next += count;
        self.fresh += count;
        #[cfg(test)]
        self.shown.push(self.next.0);
        let (index, at) = (self.next.0.to_le(), GuestAddress(self.ring + INDEX));
        let shown = ram.store(index, at, Ordering::Release);
        shown.map_err(Error::GuestMemory)
    }

    /// Whether the driver wants an interrupt for the elements made visible since the last call
    /// (section 2.7.7).
    pub(super) fn wants_interrupt(&mut self, ram: &FlatRam) -> Result<bool, Error> {
        let fresh = std::mem::take(&mut self.fresh);
        // The index must be stored before `used_event` or the flags are read.
        fence(Ordering::SeqCst);
        let wish = if self.event_idx {
            ENTRIES + ENTRY * u64::from(self.size)
        } else {
            0
        };
        let wish = ram.load(GuestAddress(self.driver_ring + wish), Ordering::Relaxed);
        let wish = u16::from_le(wish.map_err(Error::GuestMemory)?);
        Ok(if self.event_idx {
            // The driver waits for one of the new elements.
            self.next - Wrapping(wish) - Wrapping(1) < fresh
        } else {
            wish & word(VRING_AVAIL_F_NO_INTERRUPT) == 0
        })
    }

    /// The index that the driver sees.
    pub(super) fn position(&self) -> u16 {
        self.next.0
    }

    /// Goes on at `position`, which is the index that the driver sees.
    pub(super) fn go_to(&mut self, position: u16) {
        self.next = Wrapping(position);
    }

    /// Reads the index from RAM again, because the kernel has written the ring.
    pub(super) fn follow(&mut self, ram: &FlatRam) -> Result<(), Error> {
        let index = ram.load(GuestAddress(self.ring + INDEX), Ordering::Acquire);
        self.next = Wrapping(u16::from_le(index.map_err(Error::GuestMemory)?));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::queue::Virtq;
    use super::super::testing::*;
    use super::*;
    use crate::memory::{dirty_log, pages_of};

    const EVENT_IDX: u64 = 1 << 29;

    /// Returns a queue from which `count` requests were taken, none of them returned yet.
    fn with_requests(features: u64, count: u16) -> (Driver, Virtq) {
        let (mut driver, mut queue) = taken(features);
        for head in 0..count {
            let (addr, len, flags, next) = (BUFFERS, 4, WRITE, 0);
            let buffer = Desc {
                addr,
                len,
                flags,
                next,
            };
            driver.describe(0, head, buffer);
            driver.offer(0, head);
            assert_eq!(queue.pop().unwrap().unwrap().head, head);
        }
        (driver, queue)
    }

    #[test]
    fn no_element_is_shown_before_all_are_written() {
        let (driver, mut queue) = with_requests(u64::MAX, 12);
        for (first, count) in [(0, 1), (1, 8), (9, 3)] {
            let heads = first..first + count;
            let heads = heads.inspect(|_| assert_eq!(driver.used(0), first, "index moved early"));
            queue.push_together(heads.map(|head| (head, 3))).unwrap();
            assert_eq!(driver.used(0), first + count);
            for head in first..first + count {
                assert_eq!(driver.used_element(0, head), (head.into(), 3));
            }
        }
        queue.push_together([]).unwrap();
        assert_eq!(driver.used(0), 12);
    }

    /// The driver sets `used_event` to any of the elements, and is interrupted for that one.
    #[test]
    fn an_interrupt_comes_for_the_element_that_is_waited_for() {
        let used_event = GuestAddress(rings(0)[1] + 4 + 2 * u64::from(SIZE));
        for (waited, wanted) in [(0, true), (2, true), (3, false), (u16::MAX, false)] {
            let (driver, mut queue) = with_requests(u64::MAX, 3);
            driver.ram.write_obj(waited, used_event).unwrap();
            queue.push_together((0..3).map(|head| (head, 4))).unwrap();
            queue.notify().unwrap();
            let raised = driver.interrupts.queues.load(Ordering::Acquire);
            assert_eq!(raised == 1, wanted, "waited for {waited}");
        }
    }

    #[test]
    fn a_driver_without_event_index_can_refuse_interrupts() {
        let (driver, mut queue) = with_requests(!EVENT_IDX, 2);
        for (head, flags) in [(0, 1u16), (1, 0)] {
            let at = GuestAddress(rings(0)[1]);
            driver.ram.write_obj(flags, at).unwrap();
            queue.push(head, 4).unwrap();
            queue.notify().unwrap();
            let raised = driver.interrupts.queues.load(Ordering::Acquire);
            assert_eq!(raised, u32::from(flags == 0));
        }
    }

    /// The device marks its own writes in the dirty log: elements, the index, and what the crate
    /// virtio-queue writes to the used ring.
    #[test]
    fn what_is_written_is_marked() {
        for features in [u64::MAX, !EVENT_IDX] {
            let (driver, mut queue) = with_requests(features, 2);
            let log = dirty_log(&driver.ram);
            log.start().unwrap();
            let marked = || pages_of(&log.take()).collect::<Vec<_>>();
            queue.push(0, 4).unwrap();
            assert_eq!(marked(), [0], "element and index");
            queue.notify().unwrap();
            assert!(marked().is_empty(), "notify only reads");
            queue.disable_notifications().unwrap();
            queue.enable_notifications().unwrap();
            assert_eq!(marked(), [0], "flags or avail_event");
            queue.pop().unwrap();
            assert!(marked().is_empty(), "pop only reads");
        }
    }
}
