//! Tests several requests at a time. io_uring serves them if the host has it for the image.

use super::*;

/// Bytes of each request.
const EACH: u32 = 4096;
/// Number of requests.
const MANY: u16 = 5;

/// Address of the data of request `number`.
fn data(number: u16) -> u64 {
    DATA + u64::from(EACH) * u64::from(number)
}

/// Starts a disk with requests of type `kind` in its queue, each for a block at one of `sectors`.
/// Returns their statuses after all have ended.
fn at_once(
    disk: Disk,
    kind: u32,
    features: u64,
    sectors: [u64; MANY as usize],
) -> (Driver, Vec<u8>) {
    let mut driver = Driver::of(Box::new(disk));
    driver.negotiate(features);
    driver.set_up(0, rings(0));
    let (room, spare) = match kind {
        VIRTIO_BLK_T_IN => (WRITE, 0),
        _ => (0, 1),
    };
    for (number, sector) in (0u16..).zip(sectors) {
        let header = HEADER + 32 * u64::from(number);
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        let ram = &driver.ram;
        ram.write_slice(&bytes, GuestAddress(header)).unwrap();
        let content = [0x70 + number.to_le_bytes()[0]; EACH as usize];
        ram.write_slice(&content, GuestAddress(data(number)))
            .unwrap();
        let buffers = [
            (header, 16, 0),
            (data(number), EACH, room),
            // A write has room before the status that it does not need.
            (STATUS + 2 * u64::from(number), 1 + spare, WRITE),
        ];
        driver.describe_chain(rings(0)[0], 3 * number, &buffers);
        driver.offer(0, 3 * number);
    }
    driver.become_ready();
    driver.wait_until("all ends", |d| d.used(0) == MANY);
    let ended = (0..MANY).map(|n| driver.used_element(0, n));
    let mut ended: Vec<(u32, u32)> = ended.collect();
    ended.sort_unstable();
    let status = |number: u64| {
        let at = STATUS + 2 * number + u64::from(spare);
        driver.ram.read_obj::<u8>(GuestAddress(at)).unwrap()
    };
    let statuses: Vec<u8> = (0..MANY.into()).map(status).collect();
    for ((number, (head, written)), status) in (0..).zip(ended).zip(&statuses) {
        assert_eq!(head, 3 * number);
        let is_read = room == WRITE && *status == 0;
        assert_eq!(written, if is_read { EACH + 1 } else { 0 });
    }
    (driver, statuses)
}

fn disk(image: &TempImage, flags: &str) -> Disk {
    Disk::new("disk0", image.open(flags).unwrap(), 1)
}

#[test]
fn requests_at_once_all_come_back() {
    let image = TempImage::new(MIB);
    let content: Vec<u8> = (0..MIB).map(|at| (at / 4096).to_le_bytes()[0]).collect();
    image.file().write_all_at(&content, 0).unwrap();
    for flags in ["", ",snapshot=on", ",direct"] {
        // Blocks 10 to 13, and one that ends beyond the disk. Its error must not affect the others.
        let sectors = [80, 88, 96, 104, 2047];
        let (driver, statuses) = at_once(disk(&image, flags), VIRTIO_BLK_T_IN, u64::MAX, sectors);
        assert_eq!(statuses, [0, 0, 0, 0, 1], "{flags}");
        for number in 0..MANY - 1 {
            let mut bytes = [0; EACH as usize];
            let ram = &driver.ram;
            ram.read_slice(&mut bytes, GuestAddress(data(number)))
                .unwrap();
            assert_eq!(
                bytes,
                [10 + number.to_le_bytes()[0]; EACH as usize],
                "{flags}"
            );
        }
    }
}

#[test]
fn writes_at_once_are_all_there() {
    let no_flush = !(1 << VIRTIO_BLK_F_FLUSH);
    for (flags, features) in [
        ("", u64::MAX),
        ("", no_flush),
        (",cache=writethrough", u64::MAX),
        (",direct,cache=writethrough", u64::MAX),
        (",snapshot=on", u64::MAX),
    ] {
        let image = TempImage::new(MIB);
        let sectors = [0, 8, 16, 2040, 2047];
        let disk = disk(&image, flags);
        let (mut driver, statuses) = at_once(disk, VIRTIO_BLK_T_OUT, features, sectors);
        assert_eq!(statuses, [0, 0, 0, 0, 1], "{flags}");
        for (byte, sector) in (0x70..).zip(&sectors[..4]) {
            let now = read(&mut driver, *sector, EACH).unwrap();
            assert_eq!(now, [byte; EACH as usize], "{flags}");
        }
    }
}
