//! What an image's first bytes say it is: rvmm reads raw ones only.

use std::fs::File;
use std::io;
use std::path::Path;

use super::file::read_up_to;

/// Bytes that tell.
const HEAD: usize = 512;

/// Formats of other programs, and what begins at which byte of them.
const KNOWN: [(&str, usize, &[u8]); 9] = [
    // docs/interop/qcow2.rst of QEMU; version 1 has the same bytes.
    ("qcow2", 0, b"QFI\xfb"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vdi", 64, &[0x7f, 0x10, 0xda, 0xbe]),
    ("vhdx", 0, b"vhdxfile"),
    // A dynamic one; a fixed one is a raw image with 512 bytes behind it.
    ("vpc", 0, b"conectix"),
    ("parallels", 0, b"WithoutFreeSpace"),
];

/// The name that qemu-img has for the format of the image at `path`, if it is a known one that is not raw.
///
/// # Errors
/// The host's.
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
