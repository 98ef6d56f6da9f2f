//! Kernels by content: an accepted kernel fits in RAM, and memory use is bounded.
//!
//! Image, ELF, gzip, zstd and zboot. The parts of an accepted kernel are inside the file and inside
//! RAM, do not overlap, and the entry point is in one of them. No file makes rvmm use more memory
//! than RAM allows.
//!
//! An input is a recipe of five letters, as in `gi8a-`, and data:
//!
//! ```text
//! 0 container:  g gzip, z zstd, G zboot with gzip, Z zboot with zstd; else nothing
//! 1 kernel:     i Image, p Image with PE headers, e ELF, v vmlinux, b more zeros than RAM has
//!               bytes; else the data is the file
//! 2 RAM:        0 to 9, 16 KiB to 8 MiB
//! 3 format:     i Image, e ELF, f flat; else detected by content
//! 4 initrd:     0 to 9, 1 KiB to 512 KiB; else there is none
//! 5 changes:    a place (2 bytes) and the 8 bytes that are written there, in the kernel or, from
//!               0x8000 on, in the container around it; any number of them
//! ```

use std::io::Write;
use std::ops::Range;
use std::sync::OnceLock;

use rvmm::boot::kernel::{self, Kernel};
use rvmm::boot::placement::{Placement, fdt_room};
use rvmm::config::KernelFormat;
use rvmm::util::ByteSize;

const BASE: u64 = 0x8000_0000;

/// A change at this place or later is in the container around the kernel.
const OUTSIDE: u16 = 0x8000;

fuzz_engine::fuzz_target!(|data: &[u8]| {
    let Some((letters, rest)) = data.split_first_chunk::<5>() else {
        return;
    };
    let [around, what, ram, format, initrd] = *letters;
    let ram = ByteSize::kib(16 << digit(ram).unwrap_or(8));
    let format = match format {
        b'i' => KernelFormat::Image,
        b'e' => KernelFormat::Elf,
        b'f' => KernelFormat::Flat,
        _ => KernelFormat::Auto,
    };
    let initrd = digit(initrd).map(|digit| 1024 << digit);
    let file = file(around, what, rest);
    let open = || kernel::open(&file.as_slice(), format, BASE, ram);
    let (opened, held) = fuzz_engine::most_memory(open);
    assert!(held <= most(ram), "{held} bytes for {ram} of RAM");
    match opened {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(kernel) => check(&kernel, &file, ram, initrd),
    }
});

/// The compressed and the decompressed data, each in a vector that has grown by doubling, and the
/// memory of the decoders.
fn most(ram: ByteSize) -> usize {
    let ram = usize::try_from(ram.bytes()).expect("RAM is small here");
    4 * ram + (256 << 10)
}

fn check(kernel: &Kernel, file: &[u8], ram: ByteSize, initrd: Option<u64>) {
    let source = kernel.expanded.as_deref().unwrap_or(file).len() as u64;
    let extent = kernel.extent();
    for segment in &kernel.segments {
        let bytes = &segment.source;
        assert!(bytes.start <= bytes.end, "{segment:?}");
        assert!(bytes.is_empty() || bytes.end <= source, "{segment:?}");
        assert!(bytes.end - bytes.start <= segment.size, "{segment:?}");
        let end = segment.at.checked_add(segment.size);
        assert!(extent.start <= segment.at && end <= Some(extent.end));
    }
    assert!(!kernel.segments.is_empty());
    no_overlap(kernel.segments.iter().map(|s| s.at..s.at + s.size));
    // An empty file has no parts. Otherwise the entry point is in one of them.
    let begins_in = |range: Range<u64>| range.contains(&kernel.entry);
    assert!(
        kernel
            .segments
            .iter()
            .any(|s| begins_in(s.at..s.at + s.size))
    );

    let Ok(at) = Placement::plan(BASE, ram, kernel, initrd, fdt_room(1, 20)) else {
        return;
    };
    let end = BASE + ram.bytes();
    let ranges = [
        Some(at.kernel.clone()),
        at.initrd.clone(),
        Some(at.fdt.clone()),
    ];
    for range in ranges.iter().flatten() {
        assert!(BASE <= range.start && range.end <= end, "{at:x?} in {ram}");
    }
    no_overlap(ranges.into_iter().flatten());
    assert!(at.kernel.contains(&at.entry), "{at:x?}");
}

fn no_overlap(ranges: impl Iterator<Item = Range<u64>>) {
    let mut ranges: Vec<_> = ranges.collect();
    ranges.sort_by_key(|range| range.start);
    assert!(
        ranges.windows(2).all(|two| two[0].end <= two[1].start),
        "{ranges:x?}"
    );
}

fn digit(letter: u8) -> Option<u32> {
    char::from(letter).to_digit(10)
}

/// The file that a recipe describes.
fn file(around: u8, what: u8, rest: &[u8]) -> Vec<u8> {
    let mut kernel = match what {
        b'i' => image(0),
        b'p' => pe(),
        b'e' => elf(
            [BASE + 0x1000, BASE + 0x3000],
            [BASE + 0x1000, BASE + 0x3000],
        ),
        b'v' => elf([0, 0x3000], [0xffff_ffff_8000_0000, 0xffff_ffff_8000_3000]),
        b'b' => return bomb(around, rest),
        _ => rest.to_vec(),
    };
    let is_made = b"ipev".contains(&what);
    let changes = || rest.chunks_exact(10).filter(|_| is_made).map(change);
    for (at, bytes) in changes().filter(|(at, _)| *at < OUTSIDE) {
        write(&mut kernel, at, bytes);
    }
    let mut file = wrap(around, &kernel);
    for (at, bytes) in changes().filter(|(at, _)| *at >= OUTSIDE) {
        write(&mut file, at - OUTSIDE, bytes);
    }
    file
}

fn change(bytes: &[u8]) -> (u16, &[u8]) {
    (u16::from_le_bytes([bytes[0], bytes[1]]), &bytes[2..])
}

fn write(file: &mut [u8], at: u16, bytes: &[u8]) {
    let places = file.iter_mut().skip(usize::from(at));
    places.zip(bytes).for_each(|(place, byte)| *place = *byte);
}

/// A few bytes that decompress to 9 MiB, more than RAM. Made once.
fn bomb(around: u8, changes: &[u8]) -> Vec<u8> {
    static BOMBS: OnceLock<[Vec<u8>; 4]> = OnceLock::new();
    let letters = *b"gzGZ";
    let bombs = BOMBS.get_or_init(|| letters.map(|letter| wrap(letter, &vec![0; 9 << 20])));
    let index = letters.iter().position(|letter| *letter == around);
    let mut file = bombs[index.unwrap_or(0)].clone();
    for (at, bytes) in changes.chunks_exact(10).map(change) {
        write(&mut file, at % OUTSIDE, bytes);
    }
    file
}

fn wrap(around: u8, kernel: &[u8]) -> Vec<u8> {
    match around {
        b'g' => gzip(kernel),
        b'z' => zstd(kernel),
        b'G' => zboot("gzip", &gzip(kernel)),
        b'Z' => zboot("zstd", &zstd(kernel)),
        _ => kernel.to_vec(),
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).expect("a vector takes it");
    encoder.finish().expect("a vector takes it")
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 1).expect("memory takes it")
}

/// The layout of `zboot-header.S`.
fn zboot(compression: &str, payload: &[u8]) -> Vec<u8> {
    const OFFSET: u32 = 64;
    let mut file = vec![0; OFFSET as usize];
    let size = u32::try_from(payload.len()).expect("payloads are small here");
    file[..8].copy_from_slice(b"MZ\0\0zimg");
    file[8..12].copy_from_slice(&OFFSET.to_le_bytes());
    file[12..16].copy_from_slice(&size.to_le_bytes());
    file[24..24 + compression.len()].copy_from_slice(compression.as_bytes());
    file.extend(payload);
    file
}

/// An Image of 512 bytes with as much BSS.
fn image(text_offset: u64) -> Vec<u8> {
    let mut image = vec![0x13; 512];
    image[..64].fill(0);
    image[8..16].copy_from_slice(&text_offset.to_le_bytes());
    image[16..24].copy_from_slice(&1024u64.to_le_bytes());
    image[32..36].copy_from_slice(&2u32.to_le_bytes());
    image[56..60].copy_from_slice(b"RSC\x05");
    image
}

/// An Image with an EFI stub's headers, and two sections.
fn pe() -> Vec<u8> {
    let mut image = image(2 << 20);
    image[..2].copy_from_slice(b"MZ");
    image[60..64].copy_from_slice(&64u32.to_le_bytes());
    image[64..68].copy_from_slice(b"PE\0\0");
    image[70..72].copy_from_slice(&2u16.to_le_bytes());
    image[84..86].copy_from_slice(&16u16.to_le_bytes());
    for section in [104, 144] {
        image[section + 16..section + 20].copy_from_slice(&128u32.to_le_bytes());
        image[section + 20..section + 24].copy_from_slice(&256u32.to_le_bytes());
    }
    image
}

/// An ELF of two segments with 16 bytes each, and BSS.
fn elf(physical: [u64; 2], virt: [u64; 2]) -> Vec<u8> {
    let mut file = vec![0; 256];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let half = |file: &mut [u8], at: usize, value: u16| {
        file[at..at + 2].copy_from_slice(&value.to_le_bytes());
    };
    let double = |file: &mut [u8], at: usize, value: u64| {
        file[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    half(&mut file, 16, 2);
    half(&mut file, 18, 243);
    half(&mut file, 20, 1);
    double(&mut file, 24, virt[0]);
    double(&mut file, 32, 64);
    half(&mut file, 52, 64);
    half(&mut file, 54, 56);
    half(&mut file, 56, 2);
    for (index, (paddr, vaddr)) in physical.into_iter().zip(virt).enumerate() {
        let at = 64 + 56 * index;
        half(&mut file, at, 1);
        let fields = [176 + 16 * index as u64, vaddr, paddr, 16, 0x1000];
        for (field, value) in fields.into_iter().enumerate() {
            double(&mut file, at + 8 + 8 * field, value);
        }
    }
    file
}
