//! Recognizes image formats by their first bytes. rvmm supports raw images only.

use std::fs::File;
use std::io;
use std::path::Path;

use super::file::read_up_to;

/// Number of bytes to look at.
const HEAD: usize = 512;

/// Formats of other programs: name, offset of the magic number, magic number.
const KNOWN: [(&str, usize, &[u8]); 9] = [
    // From QEMU's docs/interop/qcow2.rst. Version 1 has the same magic number.
    ("qcow2", 0, b"QFI\xfb"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vdi", 64, &[0x7f, 0x10, 0xda, 0xbe]),
    ("vhdx", 0, b"vhdxfile"),
    // A dynamic image. A fixed image is a raw image followed by 512 bytes.
    ("vpc", 0, b"conectix"),
    ("parallels", 0, b"WithoutFreeSpace"),
];

/// Returns qemu-img's name for the format of the image at `path`. `None` if the format is raw or
/// unknown.
///
/// # Errors
/// Fails if the image cannot be opened or read.
pub(super) fn foreign(path: &Path) -> io::Result<Option<&'static str>> {
    let mut head = [0; HEAD];
    let count = read_up_to(&File::open(path)?, 0, &mut head)?;
    Ok(named(&head[..count]))
}

fn named(head: &[u8]) -> Option<&'static str> {
    let known = KNOWN.into_iter();
    let mut found = known.filter(|(_, at, magic)| {
        let bytes = head.get(*at..).unwrap_or_default();
        bytes.starts_with(magic)
    });
    found.next().map(|(name, ..)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_have_their_magic_numbers() {
        for (name, at, magic) in KNOWN {
            let mut head = vec![0; at];
            head.extend_from_slice(magic);
            assert_eq!(named(&head), Some(name));
            head.insert(0, 0);
            assert_eq!(named(&head), None);
        }
        for raw in [&b""[..], b"QFI", &[0; 512]] {
            assert_eq!(named(raw), None);
        }
    }
}
