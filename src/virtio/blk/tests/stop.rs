//! Tests that a guest cannot make a reset take long.

use super::*;

/// Bytes of RAM that each descriptor names. All descriptors name the same RAM.
const PIECE: u32 = (2 << 20) - 4096;
/// Number of descriptors of one request, 2 GiB in all.
const PIECES: u16 = 1022;
/// Address of the table of descriptors.
const TABLE: u64 = BUFFERS + 0x20_0000;

/// Makes descriptor `head` a request whose pieces all name the same RAM.
fn describe_huge(driver: &Driver, head: u16, kind: u32) {
    let flags = if kind == VIRTIO_BLK_T_IN { WRITE } else { 0 };
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    let ram = &driver.ram;
    ram.write_slice(&header, GuestAddress(HEADER)).unwrap();
    let mut buffers = vec![(HEADER, 16, 0)];
    buffers.extend([(DATA, PIECE, flags)].repeat(PIECES.into()));
    buffers.push((STATUS, 1, WRITE));
    driver.describe_chain(TABLE, 0, &buffers);
    let (addr, len, flags, next) = (TABLE, 16 * u32::from(PIECES + 2), INDIRECT, 0);
    driver.describe(
        0,
        head,
        Desc {
            addr,
            len,
            flags,
            next,
        },
    );
}

/// Returns an image of 4 GiB with the byte 7 at the start of each piece.
fn image() -> TempImage {
    let image = TempImage::new(4 << 30);
    for piece in 0..u64::from(PIECES) {
        image
            .file()
            .write_all_at(&[7], piece * u64::from(PIECE))
            .unwrap();
    }
    image
}

fn byte(driver: &Driver, at: u64) -> u8 {
    driver.ram.read_obj(GuestAddress(at)).unwrap()
}

#[test]
fn hostile_a_huge_read_does_not_hold_a_reset() {
    for flags in ["", ",snapshot=on", ",direct"] {
        let image = image();
        let mut driver = image.driver(flags);
        describe_huge(&driver, 0, VIRTIO_BLK_T_IN);
        driver.offer(0, 0);
        driver.wait_until("its start", |d| byte(d, DATA) == 7);
        driver.core.set_status(0);
        assert_eq!(
            driver.used(0),
            0,
            "{flags}: an incomplete request was returned"
        );
    }
}

#[test]
fn hostile_many_huge_reads_do_not_hold_a_reset() {
    let image = image();
    let disk = Disk::new("disk0", image.open("").unwrap(), 1);
    let mut driver = Driver::of(Box::new(disk));
    driver.negotiate(u64::MAX);
    driver.set_up(0, rings(0));
    describe_huge(&driver, 0, VIRTIO_BLK_T_IN);
    for _ in 0..SIZE {
        driver.offer(0, 0);
    }
    driver.become_ready();
    driver.wait_until("a start", |d| byte(d, DATA) == 7);
    driver.core.set_status(0);
    assert!(driver.used(0) < SIZE, "all requests were served");
}

/// Each of 16 requests asks for 256 MiB of zeros, which a snapshot has to write.
#[test]
fn hostile_many_zeros_do_not_hold_a_reset() {
    let image = image();
    let mut driver = image.driver(",snapshot=on");
    let mut list = Vec::new();
    for _ in 0..16u8 {
        list.extend_from_slice(&0u64.to_le_bytes());
        list.extend_from_slice(&(1u32 << 15).to_le_bytes());
        list.extend_from_slice(&0u32.to_le_bytes());
    }
    driver.ram.write_slice(&list, GuestAddress(DATA)).unwrap();
    let mut header = [0; 16];
    header[..4].copy_from_slice(&VIRTIO_BLK_T_WRITE_ZEROES.to_le_bytes());
    let ram = &driver.ram;
    ram.write_slice(&header, GuestAddress(HEADER)).unwrap();
    let buffers = [(HEADER, 16, 0), (DATA, 256, 0), (STATUS, 1, WRITE)];
    driver.describe_chain(rings(0)[0], 0, &buffers);
    for _ in 0..SIZE {
        driver.offer(0, 0);
    }
    driver.wait_until("the first", |d| d.used(0) > 0);
    driver.core.set_status(0);
    assert!(driver.used(0) < SIZE, "all requests were served");
}
