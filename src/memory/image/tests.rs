use std::os::unix::fs::MetadataExt;

use super::*;
use crate::memory::{Backing, clear};
use crate::util::ByteSize;
use vm_memory::Bytes;

const BASE: GuestAddress = GuestAddress(0x8000_0000);
const CONFIG: MemConfig = MemConfig::new(ByteSize::mib(3));

fn file() -> File {
    let path = std::env::temp_dir().join(format!("rvmm-image-{:?}", std::thread::current().id()));
    let options = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path);
    std::fs::remove_file(&path).unwrap();
    options.unwrap()
}

fn at(offset: u64) -> GuestAddress {
    GuestAddress(BASE.0 + offset)
}

/// Offsets of pages with something in them.
const USED: [u64; 5] = [0, 0x1000, 0x5000, 0x10_0000, 0x2f_f000];

fn used() -> Arc<GuestMemory> {
    let ram = create(BASE, CONFIG, Backing::Private).unwrap();
    for offset in USED {
        ram.write_obj(offset + 1, at(offset + 8)).unwrap();
    }
    // A page that was touched and is zero.
    ram.write_obj(0u64, at(0x20_0000)).unwrap();
    ram
}

#[test]
fn an_image_has_the_bytes_and_holes() {
    let file = file();
    let sums = save(&used(), &file).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 3 << 20);
    let ranges = data(&file, 0..3 << 20).unwrap();
    let pages: Vec<u64> = ranges.iter().map(|range| range.start as u64).collect();
    assert_eq!(pages, [0, 0x5000, 0x10_0000, 0x2f_f000]);
    assert_eq!(data_bytes(&file).unwrap(), 5 * 4096);
    assert_eq!(super::sums(&file, 3 << 20).unwrap(), sums);
    assert_eq!((sums.chunk, sums.sums.len()), (1 << 20, 3));
    assert!(sums.sums.iter().all(|sum| *sum != [0; 2]));
}

#[test]
fn each_flipped_bit_and_each_swap_changes_a_sum() {
    let file = file();
    let sums = save(&used(), &file).unwrap();
    for (offset, other) in [
        (0x1008, 0x1003u64),
        (0x5008, 0),
        (0x5010, 1),
        (0x10_0000, 1 << 63),
    ] {
        let mut before = [0; 8];
        file.read_exact_at(&mut before, offset).unwrap();
        file.write_all_at(&other.to_le_bytes(), offset).unwrap();
        assert_ne!(super::sums(&file, 3 << 20).unwrap(), sums, "{offset:#x}");
        file.write_all_at(&before, offset).unwrap();
    }
    // The same words in another order.
    file.write_all_at(&0x1001u64.to_le_bytes(), 0x8).unwrap();
    file.write_all_at(&1u64.to_le_bytes(), 0x1008).unwrap();
    assert_ne!(super::sums(&file, 3 << 20).unwrap(), sums);
    assert!(super::sums(&file, 4 << 20).is_err());
}

#[test]
fn ram_is_a_copy_on_write_of_the_image() {
    let file = file();
    save(&used(), &file).unwrap();
    let ram = open(BASE, CONFIG, file.try_clone().unwrap()).unwrap();
    for offset in USED {
        assert_eq!(ram.read_obj::<u64>(at(offset + 8)).unwrap(), offset + 1);
    }
    ram.write_obj(77u64, at(0x5008)).unwrap();
    ram.write_obj(78u64, at(0x6000)).unwrap();
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 0x5008).unwrap();
    assert_eq!(u64::from_ne_bytes(bytes), 0x5001, "the file is unchanged");

    // A second image has what was written, and what was never touched.
    let second = self::file();
    let sums = save(&ram, &second).unwrap();
    assert_eq!(super::sums(&second, 3 << 20).unwrap(), sums);
    let again = open(BASE, CONFIG, second).unwrap();
    let expected = [
        (0x8, 1),
        (0x1008, 0x1001),
        (0x5008, 77),
        (0x6000, 78),
        (0x10_0008, 0x10_0001),
    ];
    for (offset, value) in expected {
        assert_eq!(
            again.read_obj::<u64>(at(offset)).unwrap(),
            value,
            "{offset:#x}"
        );
    }

    // A reset of the guest zeroes all of it.
    clear(&again, CONFIG).unwrap();
    for offset in USED {
        assert_eq!(again.read_obj::<u64>(at(offset + 8)).unwrap(), 0);
    }
    again.write_obj(5u64, at(0x2000)).unwrap();
    let third = self::file();
    save(&again, &third).unwrap();
    assert_eq!(data_bytes(&third).unwrap(), 4096);
}

#[test]
fn an_image_of_another_size_is_refused() {
    let file = file();
    file.set_len(2 << 20).unwrap();
    let error = open(BASE, CONFIG, file).unwrap_err().to_string();
    assert!(
        error.ends_with("the snapshot's memory has 2097152 bytes, and not 3145728"),
        "{error}"
    );
}

/// The sums do not read memory that was never touched.
#[test]
fn untouched_pages_stay_untouched() {
    let ram = used();
    let region = ram.iter().next().unwrap();
    let present = || {
        let mut touched = Touched::of(region).unwrap();
        let mut count = 0;
        while let Some(pages) = touched.next().unwrap() {
            count += pages.len();
        }
        count
    };
    let before = present();
    let file = file();
    save(&ram, &file).unwrap();
    assert_eq!(present(), before);
    assert!(file.metadata().unwrap().blocks() * 512 <= 8 * 4096);
}

#[test]
fn many_pages_have_few_sums() {
    for (size, chunk, count) in [
        (4096, 1 << 20, 1),
        (1 << 26, 1 << 20, 64),
        (1 << 40, 1 << 34, 64),
    ] {
        let sums = Sums::of_zeros(size);
        assert_eq!((sums.chunk, sums.sums.len()), (chunk, count));
    }
}

/// A page that became zero is in the file too.
#[test]
fn marked_pages_are_written_whatever_is_in_them() {
    let base = file();
    let ram = used();
    save(&ram, &base).unwrap();
    ram.write_obj(0u64, at(0x1008)).unwrap();
    ram.write_obj(9u64, at(0x7000)).unwrap();
    ram.write_obj(10u64, at(0x9000)).unwrap();
    let pages = [(1 << 1) | (1 << 7), 0, 0, 0, u64::MAX];
    let changes = file();
    save_marked(&ram, &changes, &pages[..1]).unwrap();
    assert_eq!(data_bytes(&changes).unwrap(), 2 * 4096);
    let merged = file();
    copy_all(&base, &merged, 3 << 20).unwrap();
    assert_eq!(
        super::sums(&merged, 3 << 20).unwrap(),
        super::sums(&base, 3 << 20).unwrap()
    );
    // Marks beyond the end are ignored.
    copy_marked(
        &changes,
        &merged,
        &[pages[0], 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        3 << 20,
    )
    .unwrap();
    let after = open(BASE, CONFIG, merged).unwrap();
    let expected = [
        (0x8, 1),
        (0x1008, 0),
        (0x5008, 0x5001),
        (0x7000, 9),
        (0x9000, 0),
    ];
    for (offset, value) in expected {
        assert_eq!(
            after.read_obj::<u64>(at(offset)).unwrap(),
            value,
            "{offset:#x}"
        );
    }
}
