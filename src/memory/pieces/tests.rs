//! How pieces are cut and joined, and how the host reads and writes them.

use super::*;
use crate::config::MemConfig;
use crate::memory;
use crate::util::ByteSize;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;

const BASE: u64 = 0x8000_0000;

fn ram() -> Arc<FlatRam> {
    let ram = memory::create(
        GuestAddress(BASE),
        MemConfig::new(ByteSize::mib(1)),
        memory::Backing::Private,
    );
    FlatRam::of(&ram.unwrap())
}

fn pieces(parts: &[(u64, usize)]) -> Pieces {
    let mut pieces = Pieces::of(&ram());
    for (gpa, len) in parts {
        pieces.push(GuestAddress(*gpa), *len).unwrap();
    }
    pieces
}

#[test]
fn only_ram_is_a_piece() {
    let mut pieces = pieces(&[]);
    for (gpa, len) in [
        (BASE - 1, 2),
        (BASE + (1 << 20) - 1, 2),
        (BASE, usize::MAX),
        (u64::MAX, 1),
        (0, 1),
    ] {
        assert_eq!(pieces.push(GuestAddress(gpa), len), Err(NotRam), "{gpa:#x}");
    }
    assert_eq!(pieces.push(GuestAddress(0), 0), Ok(()));
    assert!(pieces.is_empty());
}

#[test]
fn bytes_keep_their_order() {
    let mut all = pieces(&[(BASE + 100, 3), (BASE, 4), (BASE + 50, 5)]);
    assert_eq!(all.copy_from(b"abcdefghijklmnop"), 12);
    let tail = all.split_off(5);
    assert_eq!((all.len(), tail.len()), (5, 7));
    let text = |pieces: &Pieces| {
        let mut bytes = vec![0; pieces.len()];
        assert_eq!(pieces.copy_to(&mut bytes), pieces.len());
        String::from_utf8(bytes).unwrap()
    };
    assert_eq!(
        (text(&all), text(&tail)),
        ("abcde".into(), "fghijkl".into())
    );
    all.advance(3);
    assert_eq!(text(&all), "de");
    tail.copy_from_at(1, b"GHI");
    assert_eq!(text(&tail), "fGHIjkl");
    tail.copy_from_at(6, b"LM");
    assert_eq!(text(&tail), "fGHIjkL");
    all.advance(99);
    assert!(all.is_empty() && all.iovecs().is_empty());
}

#[test]
fn files_are_read_and_written() {
    let pieces = pieces(&[(BASE + 10, 2), (BASE, 2)]);
    pieces.copy_from(b"wxyz");
    let file = tempfile();
    assert_eq!(pieces.write_at(file.as_fd(), 3, usize::MAX).unwrap(), 4);
    pieces.copy_from(b"....");
    assert_eq!(pieces.read_at(file.as_fd(), 4).unwrap(), 3);
    let mut bytes = [0; 4];
    pieces.copy_to(&mut bytes);
    assert_eq!(&bytes, b"xyz.");
    assert!(pieces.read_at(file.as_fd(), u64::MAX).is_err());
}

fn tempfile() -> rustix::fd::OwnedFd {
    rustix::fs::memfd_create("pieces", rustix::fs::MemfdFlags::CLOEXEC).unwrap()
}

#[test]
fn a_message_is_whole_or_none() {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    let mut few = pieces(&[(BASE, 3), (BASE + 10, 4)]);
    let mut many = pieces(&[]);
    for index in 0..1024 {
        let gpa = GuestAddress(BASE + 0x1000 + 2 * index);
        many.push(gpa, 1).unwrap();
    }
    for (pieces, room) in [(&mut few, 7), (&mut many, 1023)] {
        let length = pieces.len();
        for sent in [room, room - 1, room + 1, 2 * room, 1] {
            theirs.send(&vec![9; sent]).unwrap();
            let count = pieces.read_message(ours.as_fd()).unwrap();
            assert_eq!(count, Some(sent).filter(|sent| *sent <= room));
            assert_eq!(pieces.len(), length);
        }
        let mut bytes = vec![0; length];
        pieces.copy_to(&mut bytes);
        assert_eq!(bytes[..room], vec![9; room]);
    }
    ours.set_nonblocking(true).unwrap();
    assert!(few.read_message(ours.as_fd()).is_err());
    assert_eq!(few.iovecs().len(), 2);
}

#[test]
fn pieces_side_by_side_become_one() {
    let all = pieces(&[(BASE, 4), (BASE + 4, 4), (BASE + 16, 4), (BASE + 12, 4)]);
    let lengths: Vec<_> = all.iovecs().iter().map(|piece| piece.iov_len).collect();
    assert_eq!(lengths, [8, 4, 4]);
    let mut head = pieces(&[(BASE, 8)]);
    let tail = head.split_off(4);
    head.append(&tail);
    assert_eq!((head.iovecs().len(), head.len()), (1, 8));
}

#[test]
fn the_last_byte_is_its_own() {
    let mut all = pieces(&[(BASE, 4), (BASE + 50, 1)]);
    all.copy_from(b"abcde");
    for (left, pieces) in [(4, 1), (3, 1), (2, 1), (1, 1), (0, 0)] {
        all.split_last()
            .unwrap()
            .set(b'0' + u8::try_from(left).unwrap());
        assert_eq!((all.len(), all.iovecs().len()), (left, pieces));
    }
    assert!(all.split_last().is_none());
    let ram = &all.ram;
    let byte = |offset| {
        let host = ram.host_address(GuestAddress(BASE + offset), 1).unwrap();
        // SAFETY: the address is mapped RAM.
        unsafe { *host }
    };
    assert_eq!([0, 1, 2, 3, 50].map(byte), *b"01234");
}

#[test]
fn what_is_taken_leaves_nothing() {
    let mut all = pieces(&[(BASE, 4), (BASE + 50, 5)]);
    let taken = all.take();
    assert!(all.is_empty() && all.iovecs().is_empty());
    assert_eq!((taken.len(), taken.iovecs().len()), (9, 2));
}

#[test]
fn multiples_are_of_each_piece() {
    let all = pieces(&[(BASE + 512, 1024), (BASE + 4096, 512)]);
    assert!(all.are_multiples(512, 512) && all.are_multiples(1, 1));
    assert!(!all.are_multiples(1024, 512) && !all.are_multiples(512, 1024));
    assert!(pieces(&[]).are_multiples(4096, 4096));
}

#[test]
fn a_write_has_at_most_so_many_bytes() {
    let file = tempfile();
    let all = pieces(&[(BASE, 4), (BASE + 50, 5), (BASE + 100, 100)]);
    all.copy_from(b"abcdefghijkl");
    for (most, written) in [(3, 3), (4, 4), (8, 4), (9, 9), (108, 9), (109, 109)] {
        assert_eq!(all.write_at(file.as_fd(), 0, most).unwrap(), written);
    }
}
