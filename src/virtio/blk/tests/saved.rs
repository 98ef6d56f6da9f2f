//! Tests what a snapshot has of a disk: what a driver knows of it, and an overlay's clusters.

use super::*;
use crate::snapshot::{Parts, State};

const CLUSTER: usize = 4096;

/// An image with the byte 3 everywhere.
fn base(len: u64) -> TempImage {
    let image = TempImage::new(len);
    let bytes = vec![3; usize::try_from(len).unwrap()];
    image.file().write_all_at(&bytes, 0).unwrap();
    image
}

fn overlay(image: &Image) -> &Overlay {
    image.overlay().unwrap()
}

fn filled(driver: &mut Driver, sector: u64, byte: u8) {
    assert_eq!(write(driver, sector, &[byte; 512]), 0);
}

#[test]
fn a_disk_is_the_same() {
    let (image, other) = (TempImage::new(MIB), TempImage::new(2 * MIB));
    let state = |image: &TempImage, flags: &str, queues| {
        let disk = Disk::new("disk0", image.open(flags).unwrap(), queues);
        disk.save().unwrap()
    };
    let refusal = |saved| {
        let disk = Disk::new("disk0", image.open("").unwrap(), 2);
        let loaded = disk.load(&mut Parts::new(saved));
        loaded.err().map(|error| error.to_string())
    };
    assert_eq!(refusal(state(&image, "", 2)), None);
    assert_eq!(refusal(state(&image, ",snapshot=on", 2)), None);
    let larger = "it has 2 MiB (2097152 bytes) in the snapshot, and has 1 MiB (1048576 bytes) now";
    assert_eq!(refusal(state(&other, "", 2)).unwrap(), larger);
    let queues = "it has 4 queues in the snapshot, and has 2 queues now";
    assert_eq!(refusal(state(&image, "", 4)).unwrap(), queues);
    let read_only = "it is read-only in the snapshot, and is writable now";
    assert_eq!(refusal(state(&image, ",readonly", 2)).unwrap(), read_only);
    let mut blocks = state(&image, "", 2);
    let json = String::from_utf8(blocks[0].json.clone()).unwrap();
    blocks[0].json = json.replace("512", "4096").into();
    let line = refusal(blocks).unwrap();
    assert!(line.contains("blocks of 4096 bytes"), "{line}");
}

/// Clusters that were written in part, whole ones, runs longer than a word of bits, and the last
/// cluster, which is incomplete.
#[test]
fn an_overlay_goes_on_over_the_same_image() {
    let image = base(2 * MIB + 512);
    let before = image.open(",snapshot=on").unwrap();
    let disk = Disk::new("disk0", Arc::clone(&before), 1);
    let mut driver = Driver::ready(Box::new(disk));
    let mut sectors = vec![9, 4096];
    sectors.extend((128..128 + 8 * 70).step_by(8));
    for sector in &sectors {
        filled(&mut driver, *sector, 7);
    }
    driver.core.pause();
    let file = TempImage::new(10 * MIB).file();
    let saved = overlay(&before).save_to(&file).unwrap();
    assert_eq!((saved.size, saved.clusters), (2 * MIB + 512, 72));
    let holds = 513 * CLUSTER as u64 + 9 * 8;
    assert_eq!(file.metadata().unwrap().len(), holds);

    let after = image.open(",snapshot=on").unwrap();
    overlay(&after).load_from(&file, &saved).unwrap();
    driver.replace(Box::new(Disk::new("disk0", Arc::clone(&after), 1)));
    driver.core.resume();
    for sector in [8, 9, 10, 127, 128, 129, 683, 688, 4088, 4096] {
        let byte = if sectors.contains(&sector) { 7 } else { 3 };
        let bytes = read(&mut driver, sector, 512);
        assert_eq!(bytes, Ok(vec![byte; 512]), "sector {sector}");
    }
    filled(&mut driver, 16, 8);
    driver.core.pause();
    let again = overlay(&after).save_to(&file).unwrap();
    assert_eq!(again.clusters, 73);
    assert_eq!(image.bytes(9 * 512, 512), [3; 512]);
}

#[test]
fn an_empty_overlay_is_saved() {
    let image = base(MIB);
    let file = TempImage::new(0).file();
    let saved = overlay(&image.open(",snapshot=on").unwrap())
        .save_to(&file)
        .unwrap();
    assert_eq!(saved.clusters, 0);
    let after = image.open(",snapshot=on").unwrap();
    overlay(&after).load_from(&file, &saved).unwrap();
    assert!(image.open("").is_err() && image.open(",readonly").unwrap().overlay().is_none());
}

/// An image of 100 clusters: two words of bits, of which 28 bits are spare.
#[test]
fn hostile_files_of_overlays() {
    const END: u64 = 100 * CLUSTER as u64;
    let image = base(END);
    let file = || {
        let file = TempImage::new(END + 16).file();
        file.write_all_at(&[5; CLUSTER], 0).unwrap();
        file.write_all_at(&[1], END).unwrap();
        file
    };
    let load = |file: &File, size, clusters| {
        let after = image.open(",snapshot=on").unwrap();
        let saved = SavedOverlay { size, clusters };
        let loaded = overlay(&after).load_from(file, &saved);
        loaded.err().map(|error| error.to_string())
    };
    assert_eq!(load(&file(), END, 1), None);
    let line = load(&file(), END + 512, 1).unwrap();
    assert!(line.contains("410112 bytes in the snapshot"), "{line}");
    let line = load(&file(), END, 2).unwrap();
    assert_eq!(line, "the file has 1 clusters, and 2 are expected");
    for len in [0, END, END + 15, END + 17, 1 << 40] {
        let file = file();
        file.set_len(len).unwrap();
        let line = load(&file, END, 1).unwrap();
        assert!(line.contains("409616 are expected"), "{len}: {line}");
    }
    for (at, cluster) in [(12, 100), (15, 127)] {
        let file = file();
        let bit = 1 << (cluster % 8);
        file.write_all_at(&[bit], END + at).unwrap();
        let line = load(&file, END, 2).unwrap();
        assert!(line.contains(&format!("cluster {cluster}")), "{line}");
    }
    let null = File::open("/dev/null").unwrap();
    assert!(load(&null, END, 0).unwrap().contains("expected"));
    // All clusters, which are holes: zeros.
    let holes = TempImage::new(END + 16).file();
    holes.write_all_at(&[0xff; 12], END).unwrap();
    holes.write_all_at(&[0x0f], END + 12).unwrap();
    assert_eq!(load(&holes, END, 100), None);
}

#[test]
fn an_overlays_state_has_all_its_fields() {
    assert_eq!(SavedOverlay::KIND, "disk-overlay");
    for json in [r#"{"size":1}"#, r#"{"size":1,"clusters":0,"x":0}"#] {
        assert!(serde_json::from_str::<SavedOverlay>(json).is_err());
    }
}
