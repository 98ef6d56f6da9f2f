//! Tests disks through their queues.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::image::OpenError;
use super::*;
use crate::config::DiskConfig;
use crate::memory::{dirty_log, pages_of};
use crate::virtio::testing::*;

mod direct;
mod many;
mod open;
mod pause;
mod saved;
mod stop;

const MIB: u64 = 1 << 20;
const HEADER: u64 = BUFFERS;
const DATA: u64 = BUFFERS + 0x1000;
const STATUS: u64 = BUFFERS + 0x800;
/// A value that is not a status.
const NO_STATUS: u8 = 0x55;

/// An image file of its own for each test. Deleted at the test's end.
pub(super) struct TempImage(PathBuf);

impl TempImage {
    pub(super) fn new(len: u64) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("rvmm-disk-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let file = File::create(&path).unwrap();
        file.set_len(len).unwrap();
        Self(path)
    }

    pub(super) fn open(&self, flags: &str) -> Result<Arc<Image>, OpenError> {
        let config: DiskConfig = format!("{}{flags}", self.0.display()).parse().unwrap();
        Image::open(&config).map(Arc::new)
    }

    fn driver(&self, flags: &str) -> Driver {
        Driver::ready(Box::new(Disk::new("disk0", self.open(flags).unwrap(), 1)))
    }

    fn file(&self) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(&self.0)
            .unwrap()
    }

    pub(super) fn bytes(&self, offset: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.file().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

impl Drop for TempImage {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Sends one request. Returns its status, and the number of bytes written.
fn ask(driver: &mut Driver, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    driver
        .ram
        .write_slice(&header, GuestAddress(HEADER))
        .unwrap();
    driver
        .ram
        .write_obj(NO_STATUS, GuestAddress(STATUS))
        .unwrap();
    let mut buffers = vec![(HEADER, 16, 0)];
    buffers.extend_from_slice(data);
    buffers.push((STATUS, 1, WRITE));
    let written = driver.request(0, &buffers);
    (driver.ram.read_obj(GuestAddress(STATUS)).unwrap(), written)
}

fn write(driver: &mut Driver, sector: u64, bytes: &[u8]) -> u8 {
    driver.ram.write_slice(bytes, GuestAddress(DATA)).unwrap();
    let len = u32::try_from(bytes.len()).unwrap();
    let (status, written) = ask(driver, VIRTIO_BLK_T_OUT, sector, &[(DATA, len, 0)]);
    assert_eq!(written, 1, "only the status is written");
    status
}

fn read(driver: &mut Driver, sector: u64, count: u32) -> Result<Vec<u8>, u8> {
    let buffer = [(DATA, count, WRITE)];
    match ask(driver, VIRTIO_BLK_T_IN, sector, &buffer) {
        (0, written) => {
            assert_eq!(written, count + 1);
            let mut bytes = vec![0; count as usize];
            driver
                .ram
                .read_slice(&mut bytes, GuestAddress(DATA))
                .unwrap();
            Ok(bytes)
        }
        (status, written) => {
            // The used length can only report bytes before the status, and how many those are is
            // unknown.
            assert_eq!(
                written,
                u32::from(count == 0),
                "the used length of a failed read"
            );
            Err(status)
        }
    }
}

/// Sends a list of ranges, for discard and write-zeroes.
fn ranges(driver: &mut Driver, kind: u32, list: &[(u64, u32, u32)]) -> u8 {
    let mut bytes = Vec::new();
    for (sector, count, flags) in list {
        bytes.extend_from_slice(&sector.to_le_bytes());
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
    }
    driver.ram.write_slice(&bytes, GuestAddress(DATA)).unwrap();
    let len = u32::try_from(bytes.len()).unwrap();
    ask(driver, kind, 0, &[(DATA, len, 0)]).0
}

#[test]
fn what_is_written_is_read() {
    let image = TempImage::new(MIB);
    let mut driver = image.driver("");
    let data: Vec<u8> = (0..8192u32).map(|n| n.to_le_bytes()[0] ^ 0x5a).collect();
    assert_eq!(write(&mut driver, 3, &data), 0);
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_FLUSH, 0, &[]), (0, 1));
    assert_eq!(image.bytes(3 * 512, 8192), data);
    assert_eq!(read(&mut driver, 3, 8192), Ok(data));
    assert_eq!(read(&mut driver, 0, 512), Ok(vec![0; 512]));
    // The last sector, in two pieces of odd sizes.
    let last = [(DATA, 100, WRITE), (DATA + 200, 412, WRITE)];
    assert_eq!(ask(&mut driver, VIRTIO_BLK_T_IN, 2047, &last), (0, 513));
}

/// Each of buffers, status and used ring has pages of its own. The driver writes to page 0.
#[test]
fn what_a_disk_writes_is_marked() {
    const USED: u64 = RAM + 0x2000;
    const STATUS_PAGE: u64 = RAM + 0x4000;
    let image = TempImage::new(MIB);
    for flags in ["", ",snapshot=on", ",direct"] {
        let disk = Disk::new("disk0", image.open(flags).unwrap(), 1);
        let mut driver = Driver::of(Box::new(disk));
        driver.negotiate(u64::MAX);
        driver.set_up(0, [rings(0)[0], rings(0)[1], USED]);
        driver.core.set_status(READY);
        let ram = Arc::clone(&driver.ram);
        for (round, (kind, flag, pages)) in [
            (VIRTIO_BLK_T_IN, WRITE, vec![0, 2, 4, 257, 258]),
            (VIRTIO_BLK_T_OUT, 0, vec![0, 2, 4]),
            (VIRTIO_BLK_T_GET_ID, WRITE, vec![0, 2, 4, 257]),
        ]
        .into_iter()
        .enumerate()
        {
            let mut header = [0; 16];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            ram.write_slice(&header, GuestAddress(HEADER)).unwrap();
            let buffers = [(HEADER, 16, 0), (DATA, 8192, flag), (STATUS_PAGE, 1, WRITE)];
            driver.describe_chain(rings(0)[0], 0, &buffers);
            let log = dirty_log(&ram);
            log.start().unwrap();
            driver.offer(0, 0);
            driver.wait_until("a used buffer", |_| {
                let index = ram.load::<u16>(GuestAddress(USED + 2), Ordering::Acquire);
                usize::from(index.unwrap()) == round + 1
            });
            let marked: Vec<_> = pages_of(&log.take()).collect();
            assert_eq!(marked, pages, "{kind} {flags}");
        }
    }
}

#[test]
fn hostile_ranges_are_errors() {
    let image = TempImage::new(MIB);
    let mut driver = image.driver("");
    for (sector, count) in [
        (2048, 512),
        (2047, 1024),
        (u64::MAX, 512),
        (1 << 55, 512),
        (u64::MAX / 512, 512),
        (0, 511),
        (0, 513),
    ] {
        assert_eq!(read(&mut driver, sector, count), Err(1), "{sector} {count}");
        let bytes = vec![7; count as usize];
        assert_eq!(write(&mut driver, sector, &bytes), 1, "{sector} {count}");
    }
    assert_eq!(fs::metadata(&image.0).unwrap().len(), MIB, "the image grew");
    assert_eq!(read(&mut driver, 0, 0), Ok(vec![]), "a read of no bytes");
}

#[test]
fn hostile_requests_that_are_none() {
    let image = TempImage::new(MIB);
    for buffers in [
        // No status; a header that is too short; a header that is device-writable.
        vec![(HEADER, 16, 0)],
        vec![(HEADER, 15, 0), (STATUS, 1, WRITE)],
        vec![(HEADER, 16, WRITE), (STATUS, 1, WRITE)],
        vec![(STATUS, 1, WRITE)],
        vec![(HEADER, 0, 0), (STATUS, 0, WRITE)],
    ] {
        let mut driver = image.driver("");
        let last = buffers.len() - 1;
        for (index, (addr, len, flags)) in buffers.into_iter().enumerate() {
            let next = u16::try_from(index + 1).unwrap();
            let flags = flags | if index == last { 0 } else { NEXT };
            driver.describe(
                0,
                next - 1,
                Desc {
                    addr,
                    len,
                    flags,
                    next,
                },
            );
        }
        driver.offer(0, 0);
        driver.breaks_and_recovers(|d| assert_eq!(write(d, 0, &[1; 512]), 0));
    }
}

#[test]
fn hostile_types_are_unsupported() {
    let image = TempImage::new(MIB);
    let mut driver = image.driver("");
    for kind in [2, 3, 5, 14, 15, 0x8000_0000, u32::MAX] {
        assert_eq!(ask(&mut driver, kind, 0, &[]), (2, 1), "{kind}");
    }
    for list in [
        vec![],
        vec![(0, 8, 2)],
        vec![(0, 8, u32::MAX)],
        vec![(0, 8, 0); 17],
    ] {
        let status = ranges(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, &list);
        assert_eq!(status, 2, "{list:?}");
    }
    // A discard has no valid flags.
    assert_eq!(ranges(&mut driver, VIRTIO_BLK_T_DISCARD, &[(0, 8, 1)]), 2);
}

#[test]
fn a_header_in_pieces_is_a_header() {
    let image = TempImage::new(MIB);
    let mut driver = image.driver("");
    driver
        .ram
        .write_slice(&[0; 16], GuestAddress(HEADER))
        .unwrap();
    let buffers = [
        (HEADER, 1, 0),
        (HEADER + 1, 7, 0),
        (HEADER + 8, 8, 0),
        (DATA, 512, WRITE),
        (STATUS, 1, WRITE),
    ];
    assert_eq!(driver.request(0, &buffers), 513);
}

#[test]
fn ranges_become_zeros() {
    let image = TempImage::new(MIB);
    for flags in ["", ",snapshot=on", ",cache=writethrough", ",direct"] {
        let mut driver = image.driver(flags);
        for (kind, unmap) in [
            (VIRTIO_BLK_T_WRITE_ZEROES, 0),
            (VIRTIO_BLK_T_WRITE_ZEROES, 1),
        ] {
            assert_eq!(write(&mut driver, 0, &[9; 16384]), 0);
            let list = [(1, 2, unmap), (9, 17, unmap)];
            assert_eq!(ranges(&mut driver, kind, &list), 0, "{flags} {unmap}");
            let bytes = read(&mut driver, 0, 16384).unwrap();
            for (sector, bytes) in bytes.chunks(512).enumerate() {
                let zero = (1..3).contains(&sector) || (9..26).contains(&sector);
                let want = if zero { 0 } else { 9 };
                assert!(bytes.iter().all(|byte| *byte == want), "{flags} {sector}");
            }
        }
        assert_eq!(ranges(&mut driver, VIRTIO_BLK_T_DISCARD, &[(0, 64, 0)]), 0);
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(ranges(&mut driver, kind, &[(2048, 1, 0)]), 1);
            assert_eq!(ranges(&mut driver, kind, &[(0, 8, 0), (u64::MAX, 1, 0)]), 1);
            assert_eq!(ranges(&mut driver, kind, &[(0, u32::MAX, 0)]), 2);
            assert_eq!(ranges(&mut driver, kind, &[(0, 1 << 15, 0)]), 1);
        }
    }
}

#[test]
fn the_name_is_told() {
    let image = TempImage::new(MIB);
    let mut driver = image.driver("");
    assert_eq!(
        ask(&mut driver, VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, WRITE)]),
        (0, 21)
    );
    let mut id = [0; 20];
    driver.ram.read_slice(&mut id, GuestAddress(DATA)).unwrap();
    assert_eq!(&id, b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    // The name is cut off if there is too little room. The status does not count if room is left
    // before it.
    for (room, written) in [(3, 4), (0, 1), (512, 20)] {
        let buffer = [(DATA, room, WRITE)];
        let reply = ask(&mut driver, VIRTIO_BLK_T_GET_ID, 0, &buffer);
        assert_eq!(reply, (0, written), "{room}");
    }
}

#[test]
fn a_readonly_disk_is_not_written() {
    let image = TempImage::new(MIB);
    let mut driver = image.driver(",readonly");
    driver.core.registers().device_select = 0;
    assert_ne!(
        driver.core.registers().device_features() & (1 << VIRTIO_BLK_F_RO),
        0
    );
    assert_eq!(write(&mut driver, 0, &[1; 512]), 1);
    assert_eq!(
        ranges(&mut driver, VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 1)]),
        1
    );
    assert_eq!(ranges(&mut driver, VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), 1);
    assert_eq!(read(&mut driver, 0, 512), Ok(vec![0; 512]));
}

#[test]
fn a_snapshot_leaves_the_image_alone() {
    let image = TempImage::new(MIB + 512);
    image.file().write_all_at(&[3; 20_000], 0).unwrap();
    let (mut one, mut other) = (image.driver(",snapshot=on"), image.driver(",snapshot=on"));
    // Parts of clusters, whole clusters, and the last cluster, which is incomplete.
    assert_eq!(write(&mut one, 9, &[5; 512]), 0);
    assert_eq!(write(&mut one, 16, &[6; 8192]), 0);
    assert_eq!(write(&mut one, 2048, &[7; 512]), 0);
    let bytes = read(&mut one, 0, 20_480).unwrap();
    for (sector, bytes) in bytes.chunks(512).enumerate().take(39) {
        let want = match sector {
            9 => 5,
            16..32 => 6,
            _ => 3,
        };
        assert!(bytes.iter().all(|byte| *byte == want), "sector {sector}");
    }
    assert_eq!(read(&mut one, 2048, 512), Ok(vec![7; 512]));
    assert_eq!(read(&mut other, 9, 512), Ok(vec![3; 512]));
    assert_eq!(ask(&mut one, VIRTIO_BLK_T_FLUSH, 0, &[]), (0, 1));
    assert_eq!(image.bytes(0, 20_000), vec![3; 20_000]);
}

#[test]
fn a_truncated_image_is_an_error_and_does_not_grow() {
    let image = TempImage::new(MIB);
    let mut driver = image.driver("");
    image.file().set_len(4096).unwrap();
    assert_eq!(read(&mut driver, 1024, 512), Err(1));
    assert_eq!(read(&mut driver, 7, 1024), Err(1));
    assert_eq!(write(&mut driver, 1024, &[1; 512]), 1);
    assert_eq!(write(&mut driver, 0, &[1; 512]), 1);
    assert_eq!(fs::metadata(&image.0).unwrap().len(), 4096);
    assert_eq!(read(&mut driver, 7, 512), Ok(vec![0; 512]));
    // Once the file has its size again, writes succeed.
    image.file().set_len(MIB).unwrap();
    assert_eq!(write(&mut driver, 1024, &[1; 512]), 0);
}

#[test]
fn sectors_behind_the_last_whole_one_are_not_the_guests() {
    let image = TempImage::new(MIB + 100);
    let mut driver = image.driver("");
    let mut capacity = [0; 8];
    driver.core.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2048);
    assert_eq!(read(&mut driver, 2048, 512), Err(1));
}

#[test]
fn the_configuration_space_ends() {
    let image = TempImage::new(MIB);
    let driver = image.driver("");
    for offset in [0, 1, 35, 57, 59, 60, 1000, u64::MAX] {
        for count in [1, 2, 4, 8] {
            let mut data = [0; 8];
            driver.core.read_config(offset, &mut data[..count]);
            if offset >= 60 {
                assert_eq!(data, [0; 8], "{offset}");
            }
        }
    }
}

/// Without flushes, each write must be durable before its request ends.
#[test]
fn a_driver_without_flushes_can_write() {
    let image = TempImage::new(MIB);
    let disk = Disk::new("disk0", image.open("").unwrap(), 1);
    let shared = Arc::clone(&disk.shared);
    let mut driver = Driver::of(Box::new(disk));
    for (features, through) in [(!(1 << VIRTIO_BLK_F_FLUSH), true), (u64::MAX, false)] {
        driver.core.set_status(0);
        driver.negotiate(features);
        driver.set_up(0, rings(0));
        driver.become_ready();
        assert_eq!(shared.through.load(Ordering::Acquire), through);
        assert_eq!(write(&mut driver, 5, &[4; 512]), 0);
        assert_eq!(image.bytes(5 * 512, 512), [4; 512]);
    }
}

/// Room that nothing was written to does not count as written, so the status after it does not
/// count either (VIRTIO 1.2, section 2.7.8.2).
#[test]
fn used_lengths_are_what_was_written() {
    let image = TempImage::new(MIB);
    let mut driver = image.driver("");
    let room = [(DATA, 512, WRITE)];
    for (kind, sector, status) in [
        (VIRTIO_BLK_T_IN, u64::MAX, 1),
        (VIRTIO_BLK_T_FLUSH, 0, 0),
        (VIRTIO_BLK_T_OUT, 0, 0),
        (VIRTIO_BLK_T_DISCARD, 0, 2),
        (VIRTIO_BLK_T_WRITE_ZEROES, 0, 2),
        (99, 0, 2),
    ] {
        assert_eq!(ask(&mut driver, kind, sector, &room), (status, 0), "{kind}");
        assert_eq!(ask(&mut driver, kind, u64::MAX, &[]).1, 1, "{kind}");
    }
}

/// Reading a part of the base image that was cut off is an error. It does not read as zeros.
#[test]
fn a_snapshot_of_a_truncated_image() {
    let image = TempImage::new(MIB);
    let mut driver = image.driver(",snapshot=on");
    image.file().set_len(512).unwrap();
    assert_eq!(
        write(&mut driver, 1, &[1; 512]),
        1,
        "the rest of its cluster was cut off"
    );
    assert_eq!(read(&mut driver, 1, 512), Err(1));
    assert_eq!(
        write(&mut driver, 8, &[1; 4096]),
        0,
        "a whole cluster does not need the image"
    );
    assert_eq!(read(&mut driver, 8, 4096), Ok(vec![1; 4096]));
}

/// 1025 pieces, one more than a request may have.
#[test]
fn hostile_pieces_without_number() {
    let image = TempImage::new(MIB);
    let mut driver = image.driver("");
    let table = BUFFERS + 0x10_0000;
    for index in 0..1025 {
        let (addr, len, flags, next) = (DATA, 1, NEXT | WRITE, index + 1);
        driver.describe_at(
            table,
            index,
            Desc {
                addr,
                len,
                flags,
                next,
            },
        );
    }
    let (addr, len, flags, next) = (table, 16 * 1025, INDIRECT, 0);
    driver.describe(
        0,
        0,
        Desc {
            addr,
            len,
            flags,
            next,
        },
    );
    driver.offer(0, 0);
    driver.breaks_and_recovers(|d| assert_eq!(write(d, 0, &[1; 512]), 0));
}
