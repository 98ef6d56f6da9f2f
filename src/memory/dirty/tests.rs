//! Which writes mark which pages.

use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;

use vm_memory::{Bytes, GuestAddress, MmapRegion};

use super::*;
use crate::config::MemConfig;
use crate::memory::{self, FlatRam, Pieces};
use crate::util::ByteSize;

const BASE: u64 = 0x8000_0000;
const PAGES: usize = 256;
const NONE: [usize; 0] = [];

/// RAM with tracking on, and its log.
fn tracked() -> (Arc<GuestMemory>, DirtyLog) {
    let ram = memory::create(
        GuestAddress(BASE),
        MemConfig::new(ByteSize::mib(1)),
        memory::Backing::Private,
    )
    .unwrap();
    let log = dirty_log(&ram);
    log.start().unwrap();
    (ram, log)
}

fn taken(log: &DirtyLog) -> Vec<usize> {
    pages_of(&log.take()).collect()
}

fn page(number: u64) -> GuestAddress {
    GuestAddress(BASE + number * PAGE_SIZE)
}

#[test]
fn each_page_that_is_touched_is_marked_once() {
    let log = DirtyLog::with_len(130 * PAGE);
    log.start().unwrap();
    for (offset, length, pages) in [
        (0, 1, 0..1),
        (PAGE - 1, 1, 0..1),
        (PAGE - 1, 2, 0..2),
        (63 * PAGE, 2 * PAGE, 63..65),
        (5 * PAGE + 7, 124 * PAGE, 5..130),
        (0, 130 * PAGE, 0..130),
        (129 * PAGE, usize::MAX, 129..130),
        (130 * PAGE, 1, 0..0),
        (usize::MAX, usize::MAX, 0..0),
        (3 * PAGE, 0, 0..0),
    ] {
        log.mark(offset, length);
        assert_eq!(
            taken(&log),
            pages.collect::<Vec<_>>(),
            "{length} at {offset}"
        );
        assert_eq!(taken(&log), NONE, "a take clears the marks");
    }
    let slice = log.slice_at(2 * PAGE);
    slice.slice_at(PAGE).mark_dirty(PAGE, 1);
    assert!(log.dirty_at(4 * PAGE) && slice.dirty_at(3 * PAGE - 1));
    assert!(!log.dirty_at(5 * PAGE) && !log.dirty_at(usize::MAX));
}

/// There is no bitmap before the first start, and there are no marks after a stop.
#[test]
fn what_is_off_has_no_bits() {
    let log = DirtyLog::with_len(64 * PAGE);
    log.mark(0, 64 * PAGE);
    assert!(lock(&log.0.bits).is_none() && !log.is_on());
    assert!(log.take().is_empty());
    log.start().unwrap();
    log.mark(0, 1);
    log.stop().unwrap();
    assert!(log.take().is_empty() && !log.is_on());
    log.mark(PAGE, 1);
    let bits = lock(&log.0.bits);
    let bits = bits.as_ref().unwrap();
    #[allow(unsafe_code)]
    // SAFETY: the bitmap is mapped, and no other thread uses it.
    let word = unsafe { bits.start.as_ref() };
    assert_eq!(word.load(Ordering::Acquire), 0);
}

#[test]
fn a_start_begins_without_marks() {
    let log = DirtyLog::with_len(64 * PAGE);
    for _ in 0..2 {
        log.start().unwrap();
        log.mark(9 * PAGE, 1);
        log.start().unwrap();
        log.mark(7 * PAGE, 1);
        assert_eq!(taken(&log), [7]);
        log.mark(8 * PAGE, 1);
        log.stop().unwrap();
    }
    // The log of no RAM has no pages.
    let none = DirtyLog::default();
    none.start().unwrap();
    none.mark(0, 1);
    assert!(none.take().is_empty());
}

#[test]
fn what_vm_memory_writes_is_marked() {
    let (ram, log) = tracked();
    ram.write_slice(&[1; 4097], page(2)).unwrap();
    assert_eq!(taken(&log), [2, 3]);
    ram.write_obj(7u64, page(5)).unwrap();
    ram.store(7u16, page(255), Ordering::Release).unwrap();
    assert_eq!(taken(&log), [5, 255]);
    let mut bytes = [0u8; 9].as_slice();
    ram.read_exact_volatile_from(page(9), &mut bytes, 9)
        .unwrap();
    assert_eq!(taken(&log), [9]);
    let mut seen = [0; 9];
    ram.read_slice(&mut seen, page(2)).unwrap();
    assert_eq!(taken(&log), NONE);
}

#[test]
fn what_flat_ram_writes_is_marked() {
    let (ram, log) = tracked();
    let flat = FlatRam::of(&ram);
    flat.write_obj(7u64, GuestAddress(page(3).0 - 4)).unwrap();
    flat.store(7u16, page(64), Ordering::Release).unwrap();
    assert_eq!(taken(&log), [2, 3, 64]);
    flat.load::<u16>(page(64), Ordering::Acquire).unwrap();
    assert!(flat.write_obj(7u64, page(256)).is_err());
    assert_eq!(taken(&log), NONE);
}

/// Two buffers: one on the pages 1 to 3, one on page 8.
fn two(ram: &Arc<GuestMemory>) -> Pieces {
    let mut pieces = Pieces::of(&FlatRam::of(ram));
    pieces.push(GuestAddress(page(1).0 + 8), 2 * PAGE).unwrap();
    pieces.push(page(8), 16).unwrap();
    pieces
}

#[test]
fn what_pieces_are_given_is_marked() {
    let (ram, log) = tracked();
    let mut pieces = two(&ram);
    pieces.copy_from(&[1; PAGE - 8]);
    assert_eq!(taken(&log), [1]);
    pieces.copy_from_at(2 * PAGE - 9, &[2; 10]);
    assert_eq!(taken(&log), [2, 3, 8]);
    pieces.copy_to(&mut [0; 100]);
    assert_eq!(taken(&log), NONE);
    pieces.split_last().unwrap().set(3);
    assert_eq!(taken(&log), [8]);
}

#[test]
fn what_the_kernel_reads_into_pieces_is_marked() {
    let (ram, log) = tracked();
    let mut pieces = two(&ram);
    let file = rustix::fs::memfd_create("dirty", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert_eq!(
        pieces.write_at(file.as_fd(), 0, usize::MAX).unwrap(),
        pieces.len()
    );
    assert_eq!(taken(&log), NONE);
    // A read of a file marks all pieces, whatever its length.
    pieces.read_at(file.as_fd(), 100).unwrap();
    assert_eq!(taken(&log), [1, 2, 3, 8]);

    let (ours, theirs) = UnixDatagram::pair().unwrap();
    theirs.send(&[5; PAGE]).unwrap();
    pieces.read_message(ours.as_fd()).unwrap().unwrap();
    assert_eq!(taken(&log), [1, 2], "only the pages of the message");
    theirs.send(&[5; 3 * PAGE]).unwrap();
    assert_eq!(pieces.read_message(ours.as_fd()).unwrap(), None);
    assert_eq!(
        taken(&log),
        [1, 2, 3, 8],
        "a message that is too long fills all"
    );
    ours.set_nonblocking(true).unwrap();
    pieces.read_message(ours.as_fd()).unwrap_err();
    assert_eq!(taken(&log), NONE);
}

#[test]
fn ram_that_is_cleared_is_marked() {
    let (ram, log) = tracked();
    memory::clear(&ram, MemConfig::new(ByteSize::mib(1))).unwrap();
    assert_eq!(taken(&log), (0..PAGES).collect::<Vec<_>>());
}

#[test]
fn vhosts_log_is_taken_over() {
    let (ram, log) = tracked();
    let first = usize::try_from(BASE / PAGE_SIZE).unwrap();
    let words = (first + 2 * PAGES) / WORD_PAGES;
    let vhost: Vec<AtomicU64> = (0..words).map(|_| AtomicU64::new(0)).collect();
    let set = |page: usize| {
        vhost[page / WORD_PAGES].fetch_or(1 << (page % WORD_PAGES), Ordering::AcqRel);
    };
    [first - 1, first, first + 70, first + PAGES].map(set);
    merge_vhost(&ram, &vhost);
    assert_eq!(taken(&log), [0, 70]);
    merge_vhost(&ram, &vhost);
    assert_eq!(taken(&log), NONE, "a take clears the marks");
    // A log that ends before RAM begins, and an empty one.
    merge_vhost(&ram, &vhost[..1]);
    merge_vhost(&ram, &[]);
}

/// While one thread writes and marks, another that takes a mark sees the bytes from before it.
#[test]
fn marks_come_with_their_bytes() {
    const ROUNDS: u64 = 20_000;
    let (ram, log) = tracked();
    let (writes, at) = (FlatRam::of(&ram), page(17));
    let writer = std::thread::spawn(move || {
        for round in 1..=ROUNDS {
            writes.store(round, at, Ordering::Relaxed).unwrap();
        }
    });
    let mut copy = 0;
    while !writer.is_finished() {
        if taken(&log) == [17] {
            copy = ram.load(at, Ordering::Relaxed).unwrap();
        }
    }
    writer.join().unwrap();
    if taken(&log) == [17] {
        copy = ram.load(at, Ordering::Relaxed).unwrap();
    }
    assert_eq!(copy, ROUNDS);
}

#[test]
fn pages_and_words() {
    assert_eq!([0, 1, 64 * PAGE, 64 * PAGE + 1].map(words_of), [0, 1, 1, 2]);
    let words = [1 << 63, 0, 0b101];
    assert_eq!(pages_of(&words).collect::<Vec<_>>(), [63, 128, 130]);
    let ram = tracked().0;
    let region = ram.iter().next().unwrap();
    assert_eq!(words_of(region.size()), PAGES / WORD_PAGES);
    assert!(MmapRegion::bitmap(region).is_on());
}
