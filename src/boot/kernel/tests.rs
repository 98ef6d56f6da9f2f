//! Tests of the kernel formats, with files that the tests build byte by byte.

use std::io::Write;

use super::*;

const BASE: u64 = 0x8000_0000;
const RAM: ByteSize = ByteSize::mib(4);

fn load(bytes: &[u8]) -> Result<Kernel, String> {
    load_as(bytes, KernelFormat::Auto)
}

fn load_as(bytes: &[u8], format: KernelFormat) -> Result<Kernel, String> {
    open(&bytes, format, BASE, RAM).map_err(|error| error.to_string())
}

/// An Image of 8 KiB with 4 KiB of BSS.
fn image() -> Vec<u8> {
    let mut image = vec![0x13; 0x2000];
    image[..64].fill(0);
    image[8..16].copy_from_slice(&0x20_0000u64.to_le_bytes());
    image[16..24].copy_from_slice(&0x3000u64.to_le_bytes());
    image[32..36].copy_from_slice(&2u32.to_le_bytes());
    image[56..60].copy_from_slice(b"RSC\x05");
    image
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 3).unwrap()
}

/// A zboot image, laid out as in `zboot-header.S`.
fn zboot(compression: &str, payload: &[u8]) -> Vec<u8> {
    const OFFSET: u32 = 0x200;
    let mut file = vec![0; OFFSET as usize];
    file[..2].copy_from_slice(b"MZ");
    file[4..8].copy_from_slice(b"zimg");
    file[8..12].copy_from_slice(&OFFSET.to_le_bytes());
    file[12..16].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
    file[24..24 + compression.len()].copy_from_slice(compression.as_bytes());
    file.extend(payload);
    // Bytes after the payload must be ignored.
    file.extend([0xee; 100]);
    file
}

struct Load {
    vaddr: u64,
    paddr: u64,
    memory: u64,
}

/// An ELF64 file for `machine` whose segments have 16 bytes each.
fn elf(machine: u16, entry: u64, loads: &[Load]) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[6] = 1;
    file[16..18].copy_from_slice(&2u16.to_le_bytes());
    file[18..20].copy_from_slice(&machine.to_le_bytes());
    file[20..24].copy_from_slice(&1u32.to_le_bytes());
    file[24..32].copy_from_slice(&entry.to_le_bytes());
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[52..54].copy_from_slice(&64u16.to_le_bytes());
    file[54..56].copy_from_slice(&56u16.to_le_bytes());
    file[56..58].copy_from_slice(&u16::try_from(loads.len()).unwrap().to_le_bytes());
    for (index, load) in loads.iter().enumerate() {
        let at = 64 + 56 * index;
        file[at..at + 4].copy_from_slice(&1u32.to_le_bytes());
        let offset = 0x800 + 16 * index as u64;
        for (field, value) in [
            (8, offset),
            (16, load.vaddr),
            (24, load.paddr),
            (32, 16),
            (40, load.memory),
        ] {
            file[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
    file
}

const RISCV: u16 = 243;

/// What an assembler makes of a header behind a jump that it compresses.
#[test]
fn a_header_that_has_moved_is_explained() {
    let whole = image();
    assert!(load(&whole).is_ok());
    let reason = load(&whole[2..]).unwrap_err();
    assert!(reason.contains("2 bytes too early"), "{reason}");
    assert!(reason.contains("`.option norvc`"), "{reason}");
    let reason = load(&whole[8..]).unwrap_err();
    assert!(reason.starts_with("not a RISC-V kernel"), "{reason}");
}

#[test]
fn an_image_is_the_same_however_it_is_wrapped() {
    let plain = load(&image()).unwrap();
    assert_eq!(plain.extent(), 0x20_0000..0x20_3000);
    assert_eq!(plain.entry, 0x20_0000);
    assert!(plain.is_linux);
    assert_eq!(plain.expanded, None);
    for wrapped in [
        gzip(&image()),
        zstd(&image()),
        zboot("gzip", &gzip(&image())),
        zboot("zstd", &zstd(&image())),
    ] {
        let kernel = load(&wrapped).unwrap();
        assert_eq!(kernel.segments, plain.segments);
        assert_eq!(kernel.entry, plain.entry);
        assert!(kernel.is_linux);
        assert_eq!(kernel.expanded, Some(image()));
    }
}

#[test]
fn a_bomb_is_defused() {
    // 8 MiB of zeros, for a guest with 4 MiB of RAM.
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut zstd_encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    for _ in 0..8 {
        encoder.write_all(&[0; 1 << 20]).unwrap();
        zstd_encoder.write_all(&[0; 1 << 20]).unwrap();
    }
    for bomb in [encoder.finish().unwrap(), zstd_encoder.finish().unwrap()] {
        let line = load(&bomb).unwrap_err();
        assert!(
            line.contains("larger than guest RAM (4 MiB)") && line.contains("--mem"),
            "{line}"
        );
    }
}

#[test]
fn broken_and_unknown_compression_is_told() {
    let mut broken = gzip(&image());
    broken.truncate(broken.len() / 2);
    assert!(
        load(&broken)
            .unwrap_err()
            .contains("gzip, but the data is corrupt")
    );
    let mut broken = zstd(&image());
    broken.truncate(broken.len() / 2);
    assert!(
        load(&broken)
            .unwrap_err()
            .contains("zstd, but the data is corrupt")
    );
    assert!(load(&zboot("lzma", b"?")).unwrap_err().contains("lzma"));
    let mut short = zboot("gzip", &gzip(&image()));
    short.truncate(0x210);
    assert!(load(&short).unwrap_err().contains("truncated"));
    assert!(
        load(b"\xfd7zXZ\0\0\0")
            .unwrap_err()
            .contains("compressed with xz")
    );
    assert!(
        load(&gzip(b"hello"))
            .unwrap_err()
            .contains("its content is not")
    );
    for initramfs in [b"070701".to_vec(), gzip(b"070701")] {
        assert!(load(&initramfs).unwrap_err().contains("--initrd"));
    }
    assert!(load(&gzip(b"")).unwrap_err().contains("empty"));
}

#[test]
fn an_elf_goes_where_it_says() {
    let physical = |vaddr, paddr, memory| Load {
        vaddr,
        paddr,
        memory,
    };
    let kernel = load(&elf(
        RISCV,
        0x8020_0008,
        &[
            physical(0x8020_0000, 0x8020_0000, 16),
            physical(0x8030_0000, 0x8030_0000, 0x100),
        ],
    ));
    let kernel = kernel.unwrap();
    assert_eq!(kernel.entry, 0x20_0008);
    assert_eq!(kernel.extent(), 0x20_0000..0x30_0100);
    assert_eq!(kernel.segments[1].source, 0x810..0x820);
    assert!(!kernel.is_linux);

    // A kernel with high virtual and low physical addresses: its entry point is a virtual address.
    let high = load(&elf(
        RISCV,
        0xffff_ffc0_0020_0008,
        &[physical(0xffff_ffc0_0020_0000, 0x8020_0000, 16)],
    ));
    let high = high.unwrap();
    assert_eq!((high.entry, high.is_linux), (0x20_0008, false));

    // A kernel that is linked for address 0, and runs at any address.
    let zero = load(&elf(RISCV, 8, &[physical(0, 0, 16)])).unwrap();
    assert_eq!((zero.entry, zero.is_linux), (0x20_0008, false));
}

#[test]
fn a_vmlinux_is_placed() {
    let segment = |offset| Load {
        vaddr: 0xffff_ffff_8000_0000 + offset,
        paddr: offset,
        memory: 0x1000,
    };
    let file = elf(
        RISCV,
        0xffff_ffff_8000_0000,
        &[segment(0), segment(0x10_0000)],
    );
    for file in [file.clone(), gzip(&file)] {
        let kernel = load(&file).unwrap();
        assert_eq!(kernel.entry, 0x20_0000, "at 0x8020_0000");
        assert_eq!(kernel.extent(), 0x20_0000..0x30_1000);
        assert!(kernel.is_linux);
    }
}

#[test]
fn an_elf_that_cannot_be_is_told() {
    let at = |paddr| Load {
        vaddr: paddr,
        paddr,
        memory: 16,
    };
    for (file, part) in [
        (elf(62, 0, &[at(BASE)]), "x86-64"),
        (elf(9999, 0, &[at(BASE)]), "machine 9999"),
        (elf(RISCV, 0, &[]), "no segment to load"),
        (elf(RISCV, 0x1000, &[at(0x1000)]), "no RAM"),
        (
            elf(RISCV, BASE - 1, &[at(BASE)]),
            "outside all of its segments",
        ),
        (elf(RISCV, BASE, &[at(BASE), at(BASE + 8)]), "overlap"),
        (elf(RISCV, u64::MAX - 20, &[at(u64::MAX - 20)]), "no RAM"),
    ] {
        let line = load(&file).unwrap_err();
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn no_file_makes_it_panic() {
    let files = [
        elf(
            RISCV,
            BASE,
            &[Load {
                vaddr: BASE,
                paddr: BASE,
                memory: 16,
            }],
        ),
        zboot("gzip", &gzip(&image())),
        zstd(&image()),
        gzip(&image()),
    ];
    for file in files {
        for length in 0..file.len().min(200) {
            let _ = load(&file[..length]);
        }
        for at in 0..file.len().min(128) {
            for value in [0, 0x7f, 0xff] {
                let mut file = file.clone();
                file[at] = value;
                let _ = load(&file);
            }
        }
    }
}

#[test]
fn the_format_can_be_demanded() {
    let flat = load_as(b"any bytes", KernelFormat::Flat).unwrap();
    assert_eq!(
        (flat.entry, flat.extent()),
        (0x20_0000, 0x20_0000..0x20_0009)
    );
    assert!(!flat.is_linux);
    assert!(
        load_as(&image(), KernelFormat::Elf)
            .unwrap_err()
            .contains("not an ELF file")
    );
    let elf = elf(
        RISCV,
        BASE,
        &[Load {
            vaddr: BASE,
            paddr: BASE,
            memory: 16,
        }],
    );
    assert!(
        load_as(&elf, KernelFormat::Image)
            .unwrap_err()
            .contains("not an Image")
    );
    assert!(
        load(b"any bytes")
            .unwrap_err()
            .contains("--kernel-format flat")
    );
    assert!(load(b"").unwrap_err().contains("empty"));
}
