//! Tests what happens to requests when a worker must stop in the middle of them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;
use vm_memory::{Bytes, GuestAddress};

use super::super::Disk;
use super::super::tests::TempImage;
use super::*;
use crate::virtio::stop::StopFor;
use crate::virtio::testing::*;

/// Number of requests that the driver makes, and bytes of each.
const MANY: u16 = 5;
const EACH: u32 = 4096;
const HEADERS: u64 = BUFFERS;
const STATUSES: u64 = BUFFERS + 0x800;
const DATA: u64 = BUFFERS + (1 << 20);

/// Returns a disk. `through` sets whether each write must be durable before its request ends.
fn shared(image: &TempImage, flags: &str, through: bool) -> Arc<Shared> {
    let disk = Disk::new("disk0", image.open(flags).unwrap(), 1);
    disk.shared.through.store(through, Ordering::Release);
    Arc::clone(&disk.shared)
}

/// Describes request `number`: a write of `pieces` to the block of that number.
fn describe(driver: &Driver, number: u16, pieces: &[(u64, u32, u16)]) {
    let header = HEADERS + 16 * u64::from(number);
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&VIRTIO_BLK_T_OUT.to_le_bytes());
    bytes[8..].copy_from_slice(&(8 * u64::from(number)).to_le_bytes());
    driver
        .ram
        .write_slice(&bytes, GuestAddress(header))
        .unwrap();
    let mut buffers = vec![(header, 16, 0)];
    buffers.extend(pieces);
    buffers.push((STATUSES + u64::from(number), 1, WRITE));
    driver.describe_chain(rings(0)[0], 3 * number, &buffers);
}

/// Returns a queue with [`MANY`] writes of one block, each with different bytes.
fn with_writes() -> (Driver, Virtq) {
    let (mut driver, queue) = taken(u64::MAX);
    for number in 0..MANY {
        let at = DATA + u64::from(EACH) * u64::from(number);
        let content = [0x70 + number.to_le_bytes()[0]; EACH as usize];
        driver.ram.write_slice(&content, GuestAddress(at)).unwrap();
        describe(&driver, number, &[(at, EACH, 0)]);
        driver.offer(0, 3 * number);
    }
    (driver, queue)
}

/// No request has been submitted to the kernel when the request to stop comes.
#[test]
fn a_pause_finishes_what_is_in_the_ring() {
    for (flags, through, why) in [
        ("", false, StopFor::Pause),
        ("", true, StopFor::Pause),
        (",direct", false, StopFor::Pause),
        ("", false, StopFor::Reset),
    ] {
        let image = TempImage::new(1 << 20);
        let shared = shared(&image, flags, through);
        let (driver, mut queue) = with_writes();
        let stop = Stop::default();
        let Some(mut ring) = shared.ring(&queue) else {
            // A host without io_uring.
            return;
        };
        let more = shared.serve_some(&mut queue, Some(&mut ring), &stop);
        assert!(!more.unwrap());
        assert_eq!(ring.in_flight(), usize::from(MANY));
        assert_eq!(driver.used(0), 0);
        stop.ask(why);
        shared.finish(&mut queue, &mut ring, &stop).unwrap();
        shared.stop(&mut queue, ring).unwrap();
        if why == StopFor::Reset {
            assert_eq!(driver.used(0), 0, "cancelled");
            continue;
        }
        assert_eq!(driver.used(0), MANY, "{flags} {through}");
        for number in 0..MANY {
            let want = [0x70 + number.to_le_bytes()[0]; EACH as usize];
            let at = u64::from(EACH) * u64::from(number);
            assert_eq!(image.bytes(at, want.len()), want);
        }
    }
}

/// The thread takes the next request from the queue before it serves the current one.
#[test]
fn a_request_that_was_looked_at_stays_in_the_queue() {
    let image = TempImage::new(1 << 20);
    let shared = shared(&image, "", false);
    let (driver, mut queue) = with_writes();
    let stop = Stop::default();
    stop.ask(StopFor::Pause);
    let more = shared.serve_some(&mut queue, None, &stop);
    assert!(!more.unwrap());
    assert_eq!(driver.used(0), 0);
    for number in 0..MANY {
        let chain = queue.pop().unwrap().unwrap();
        assert_eq!(chain.head, 3 * number, "order of the requests");
    }
}

/// The request has three steps. The worker is asked to stop before the first one.
#[test]
fn a_pause_finishes_a_large_request() {
    const PIECE: u32 = 1 << 20;
    const PIECES: usize = 12;
    let length = PIECES * PIECE as usize;
    assert!(length > 2 * STEP);
    for why in [StopFor::Pause, StopFor::Reset] {
        let image = TempImage::new(16 << 20);
        let shared = shared(&image, "", false);
        let (mut driver, mut queue) = taken(u64::MAX);
        let content = vec![9; PIECE as usize];
        driver
            .ram
            .write_slice(&content, GuestAddress(DATA))
            .unwrap();
        describe(&driver, 0, &[(DATA, PIECE, 0); PIECES]);
        driver.offer(0, 0);
        let chain = queue.pop().unwrap().unwrap();
        let mut pending = shared.parse(chain, &queue).unwrap();
        let stop = Stop::default();
        stop.ask(why);
        let outcome = shared.execute(&mut pending.request, &stop);
        if why == StopFor::Pause {
            assert_eq!(outcome, Some(Outcome::ok(0)));
            assert!(image.bytes(0, length).iter().all(|byte| *byte == 9));
        } else {
            assert_eq!(outcome, None);
        }
    }
}
