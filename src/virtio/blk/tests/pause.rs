//! Tests that a disk can pause at any moment: no request is left incomplete, and none is lost.

use super::*;

/// Number of requests at a time, of three descriptors each, and bytes of each.
const SLOTS: u16 = 5;
const EACH: usize = 4096;

/// A driver that keeps one write per slot in flight.
struct Load {
    driver: Driver,
    /// For each slot: the content of its last write, and whether that write is in flight.
    slots: [(u8, bool); SLOTS as usize],
    seen: u16,
}

impl Load {
    fn on(driver: Driver) -> Self {
        let slots = [(0, false); SLOTS as usize];
        Self {
            driver,
            slots,
            seen: 0,
        }
    }

    /// Takes the used buffers. Each write must have succeeded, and be returned once.
    fn reap(&mut self) {
        while self.seen != self.driver.used(0) {
            let (head, written) = self.driver.used_element(0, self.seen);
            assert_eq!(written, 1);
            let slot = head / 3;
            let status = self.driver.ram.read_obj::<u8>(status(slot.into()));
            assert_eq!(status.unwrap(), 0);
            let slot = &mut self.slots[slot as usize];
            assert!(std::mem::take(&mut slot.1), "returned twice");
            self.seen = self.seen.wrapping_add(1);
        }
    }

    /// Writes `content` to the blocks of all slots that have no write in flight.
    fn submit(&mut self, content: u8) {
        for number in 0..SLOTS {
            let slot = &mut self.slots[usize::from(number)];
            if slot.1 {
                continue;
            }
            *slot = (content, true);
            let place = u64::from(number);
            let header = HEADER + 16 * place;
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&VIRTIO_BLK_T_OUT.to_le_bytes());
            bytes[8..].copy_from_slice(&(8 * place).to_le_bytes());
            let ram = &self.driver.ram;
            ram.write_slice(&bytes, GuestAddress(header)).unwrap();
            let data = DATA + place * EACH as u64;
            let all = [content; EACH];
            ram.write_slice(&all, GuestAddress(data)).unwrap();
            ram.write_obj(NO_STATUS, status(place)).unwrap();
            let buffers = [
                (header, 16, 0),
                (data, u32::try_from(EACH).unwrap(), 0),
                (status(place).0, 1, WRITE),
            ];
            let table = rings(0)[0];
            self.driver.describe_chain(table, 3 * number, &buffers);
            self.driver.offer(0, 3 * number);
        }
    }
}

fn status(slot: u64) -> GuestAddress {
    GuestAddress(STATUS + slot)
}

#[test]
fn a_thousand_pauses_under_load() {
    pauses_under_load(1000, false);
}

/// The machine is saved and restored at any moment.
#[test]
fn a_hundred_processes_one_after_another() {
    pauses_under_load(100, true);
}

fn pauses_under_load(rounds: u32, is_restored: bool) {
    for (flags, features) in [
        ("", u64::MAX),
        // Each write is synced.
        ("", !(1 << VIRTIO_BLK_F_FLUSH)),
        (",snapshot=on", u64::MAX),
        (",direct", u64::MAX),
    ] {
        let image = TempImage::new(MIB).open(flags).unwrap();
        let disk = || Box::new(Disk::new("disk0", Arc::clone(&image), 1));
        let first = disk();
        let mut shared = Arc::clone(&first.shared);
        let mut driver = Driver::of(first);
        driver.negotiate(features);
        driver.set_up(0, rings(0));
        driver.become_ready();
        let through = shared.is_through();
        let mut load = Load::on(driver);
        for round in 0..rounds {
            load.submit(round.to_le_bytes()[0]);
            load.driver.core.pause();
            load.reap();
            let used = load.driver.used(0);
            let queue = &load.driver.core.describe()["queues"][0];
            assert_eq!(queue["next_available"], used, "{flags}: incomplete request");
            if is_restored {
                let next = disk();
                shared = Arc::clone(&next.shared);
                load.driver.replace(next);
            }
            load.driver.core.resume();
        }
        load.driver
            .wait_until("the rest", |d| d.used(0) == d.next_offer(0));
        load.reap();
        load.driver.core.wait_settled();
        assert_eq!(shared.is_through(), through, "{flags}");
        for (number, (content, _)) in (0u32..).zip(load.slots) {
            let sector = 8 * u64::from(number);
            let bytes = read(&mut load.driver, sector, 4096);
            assert_eq!(bytes, Ok(vec![content; EACH]), "{flags}");
        }
    }
}
