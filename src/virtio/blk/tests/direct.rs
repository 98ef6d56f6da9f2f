//! Tests disks with O_DIRECT, where the host takes only whole units of memory and file.

use super::*;
use crate::config::MemConfig;
use crate::memory::{self, FlatRam, Pieces};
use crate::util::ByteSize;
use crate::virtio::blk::direct::{Direct, Units};

fn config<const N: usize>(driver: &Driver, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    driver.core.read_config(at, &mut bytes);
    bytes
}

#[test]
fn direct_does_not_change_the_disk() {
    let image = TempImage::new(MIB + 512);
    let spaces = ["", ",direct"].map(|flags| config::<60>(&image.driver(flags), 0));
    assert_eq!(spaces[0], spaces[1]);
    assert_eq!(spaces[0][20..24], 512u32.to_le_bytes());
}

/// Offsets, addresses and lengths are not multiples of the host's units, and the disk does not end
/// with a whole unit.
#[test]
fn direct_takes_what_the_host_does_not() {
    let image = TempImage::new(MIB + 512);
    let mut driver = image.driver(",direct");
    let content: Vec<u8> = (0..=MIB + 511)
        .map(|at| (at / 512).to_le_bytes()[0])
        .collect();
    image.file().write_all_at(&content, 0).unwrap();
    for (sector, sectors) in [
        (0, 1),
        (1, 7),
        (7, 9),
        (3, 200),
        (2047, 1),
        (2048, 1),
        (2040, 9),
    ] {
        let (from, len) = (sector * 512, sectors * 512);
        let want = &content[from..from + len];
        let half = u32::try_from(len / 2 + 3).unwrap();
        let rest = u32::try_from(len).unwrap() - half;
        let pieces = [(DATA + 1, half, WRITE), (DATA + 0x4_0001, rest, WRITE)];
        let reply = ask(&mut driver, VIRTIO_BLK_T_IN, sector as u64, &pieces);
        assert_eq!(reply, (0, half + rest + 1), "{sector}");
        let mut read = vec![0; len];
        let (first, second) = read.split_at_mut(half as usize);
        driver
            .ram
            .read_slice(first, GuestAddress(DATA + 1))
            .unwrap();
        driver
            .ram
            .read_slice(second, GuestAddress(DATA + 0x4_0001))
            .unwrap();
        assert!(read == want, "{sector}");
        // Write the same bytes back, each increased by 1.
        let more: Vec<u8> = want.iter().map(|byte| byte.wrapping_add(1)).collect();
        let (first, second) = more.split_at(half as usize);
        driver
            .ram
            .write_slice(first, GuestAddress(DATA + 1))
            .unwrap();
        driver
            .ram
            .write_slice(second, GuestAddress(DATA + 0x4_0001))
            .unwrap();
        let pieces = pieces.map(|(at, len, _)| (at, len, 0));
        let reply = ask(&mut driver, VIRTIO_BLK_T_OUT, sector as u64, &pieces);
        assert_eq!(reply, (0, 1), "{sector}");
        let mut expected = content.clone();
        expected[from..from + len].copy_from_slice(&more);
        assert!(image.bytes(0, content.len()) == expected, "{sector}");
        image.file().write_all_at(&content, 0).unwrap();
    }
    assert_eq!(
        fs::metadata(&image.0).unwrap().len(),
        MIB + 512,
        "the image grew"
    );
}

const WRITERS: u8 = 8;
const ROUNDS: u8 = 100;

/// Returns access to a file with units of eight sectors, and RAM to write from.
fn coarse(image: &TempImage) -> (File, Direct, Arc<FlatRam>) {
    let file = image.file();
    let (memory, unit) = (4096, 4096);
    let units = Units { memory, file: unit };
    let none = |_: &_| unreachable!("the last unit is whole");
    let direct = Direct::new(units, MIB, 512, true, none).unwrap();
    let config = MemConfig::new(ByteSize::mib(1));
    let ram = memory::create(GuestAddress(RAM), config, memory::Backing::Private).unwrap();
    (file, direct, FlatRam::of(&ram))
}

/// Writes `round` to `sectors` sectors of the first unit, starting at `sector`.
fn rewrite(disk: &(File, Direct, Arc<FlatRam>), sector: u8, sectors: u8, round: u8) {
    let (file, direct, ram) = disk;
    let bytes = vec![round; 512 * usize::from(sectors)];
    let mut pieces = Pieces::of(ram);
    let place = GuestAddress(RAM + 4096 * u64::from(sector));
    pieces.push(place, bytes.len()).unwrap();
    pieces.copy_from(&bytes);
    direct
        .write(file, &mut pieces, 512 * u64::from(sector))
        .unwrap();
}

/// Each sector of a unit has its own writer. No writer may undo what another has written.
#[test]
fn changes_of_a_unit_do_not_undo_each_other() {
    let image = TempImage::new(MIB);
    let disk = coarse(&image);
    std::thread::scope(|scope| {
        for sector in 0..WRITERS {
            let (disk, image) = (&disk, &image);
            scope.spawn(move || {
                for round in 1..=ROUNDS {
                    rewrite(disk, sector, 1, round);
                    let now = image.bytes(512 * u64::from(sector), 512);
                    assert_eq!(now, [round; 512], "sector {sector}");
                }
            });
        }
    });
}

/// One thread writes the whole unit, another only its first sector. The other sectors must stay as
/// the first thread wrote them.
#[test]
fn a_change_of_a_unit_does_not_undo_a_write_of_all_of_it() {
    let image = TempImage::new(MIB);
    let disk = coarse(&image);
    let (changes, ended) = (AtomicU32::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Acquire) {
                rewrite(&disk, 0, 1, 255);
                changes.fetch_add(1, Ordering::AcqRel);
            }
        });
        let mut whole = true;
        // Repeat often enough for the two threads to meet.
        while whole && changes.load(Ordering::Acquire) < 5000 {
            for round in 1..=ROUNDS {
                rewrite(&disk, 0, WRITERS, round);
                let mut now = [0; 7 * 512];
                disk.0.read_exact_at(&mut now, 512).unwrap();
                whole &= now == [round; 7 * 512];
            }
        }
        ended.store(true, Ordering::Release);
        assert!(whole);
    });
}
