//! Tests opening images: locks against other processes, and files that cannot be a disk.

use std::os::fd::AsFd;

use super::*;
use crate::util::filelock::{is_byte_locked, share_byte};

#[test]
fn one_writer_or_many_readers() {
    let image = TempImage::new(MIB);
    {
        let _writer = image.open("").unwrap();
        for flags in ["", ",readonly", ",snapshot=on"] {
            let line = image.open(flags).err().unwrap().to_string();
            assert!(line.contains("another process"), "{line}");
        }
    }
    let _readers = [
        image.open(",readonly").unwrap(),
        image.open(",snapshot=on").unwrap(),
    ];
    assert!(image.open("").is_err());
}

/// Uses locks as QEMU does (`block/file-posix.c`): byte 100 + n for a permission that it holds, 200
/// + n for one that it denies to others. Permission 0 is reading, 1 writing, 3 resizing.
#[test]
fn qemus_locks_are_seen_and_shown() {
    const WRITER: [i64; 4] = [100, 101, 201, 203];
    const READER: [i64; 3] = [100, 201, 203];
    let image = TempImage::new(MIB);
    let all_but = |locked: &[i64]| {
        let qemu = image.file();
        let seen = |at: &i64| is_byte_locked(qemu.as_fd(), *at).unwrap();
        let found: Vec<i64> = (0..300).filter(seen).collect();
        assert_eq!(found, locked);
    };
    for (flags, shown) in [
        ("", WRITER.as_slice()),
        (",readonly", &READER),
        (",snapshot=on", &READER),
    ] {
        let _open = image.open(flags).unwrap();
        all_but(shown);
    }
    all_but(&[]);
    for (theirs, may_read) in [(WRITER.as_slice(), false), (&READER, true)] {
        let qemu = image.file();
        theirs
            .iter()
            .for_each(|at| share_byte(qemu.as_fd(), *at).unwrap());
        let line = image.open("").err().unwrap().to_string();
        assert!(line.contains("another process uses it"), "{line}");
        for flags in [",readonly", ",snapshot=on"] {
            assert_eq!(image.open(flags).is_ok(), may_read, "{flags} {theirs:?}");
        }
    }
    assert!(image.open("").is_ok());
}

#[test]
fn a_snapshot_goes_where_it_is_told_to() {
    let image = TempImage::new(MIB);
    let line = |place: &str| {
        let flags = format!(",snapshot=on,snapshot-dir={place}");
        image.open(&flags).err().map(|error| error.to_string())
    };
    let refused = line("/nope").unwrap();
    assert!(refused.contains("\"/nope\": No such file"), "{refused}");
    assert!(refused.contains("snapshot-dir=DIR"), "{refused}");
    assert_eq!(line(std::env::temp_dir().to_str().unwrap()), None);
}

#[test]
fn what_cannot_be_a_disk_is_told() {
    let line = |path: &str| {
        let config: DiskConfig = path.parse().unwrap();
        Image::open(&config).err().unwrap().to_string()
    };
    let missing = line("/nope/x.img");
    assert!(missing.starts_with("Failed to open disk \"/nope/x.img\": No such file"));
    assert!(line("/").contains("neither a file nor a block device"));
    assert!(line("/dev/null").contains("neither a file nor a block device"));
    let small = TempImage::new(511);
    let small = small.0.to_str().unwrap();
    assert!(line(small).contains("the right file"));
    let foreign = TempImage::new(MIB);
    foreign.file().write_all_at(b"QFI\xfb", 0).unwrap();
    let path = foreign.0.to_str().unwrap();
    let refused = line(path);
    assert!(
        refused.contains("qcow2") && refused.contains("qemu-img convert -O raw"),
        "{refused}"
    );
    assert!(foreign.open(",format=raw").is_ok());
    let denied = OpenError::Open {
        path: path.into(),
        writes: false,
        error: io::Error::from_raw_os_error(libc::EACCES),
    };
    assert!(!denied.to_string().contains("readonly"), "{denied}");
}
