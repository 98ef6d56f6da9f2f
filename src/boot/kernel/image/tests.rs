use super::*;

const FILE: u64 = 4096;

/// A valid header for a file of [`FILE`] bytes.
fn header() -> Vec<u8> {
    let mut head = vec![0; HEAD_SIZE];
    put(&mut head, 8, &0x20_0000u64.to_le_bytes());
    put(&mut head, 16, &0x3000u64.to_le_bytes());
    put(&mut head, 32, &2u32.to_le_bytes());
    put(&mut head, 48, b"RISCV\0\0\0");
    put(&mut head, 56, b"RSC\x05");
    head
}

/// [`header`] as a PE file whose only section ends at `end`.
fn efi_stub(end: u32) -> Vec<u8> {
    let mut head = header();
    put(&mut head, 0, b"MZ");
    put(&mut head, 60, &64u32.to_le_bytes());
    put(&mut head, 64, b"PE\0\0");
    put(&mut head, 64 + 6, &1u16.to_le_bytes());
    put(&mut head, 64 + 20, &16u16.to_le_bytes());
    let section = 64 + 24 + 16;
    put(&mut head, section + 16, &(end - 0x400).to_le_bytes());
    put(&mut head, section + 20, &0x400u32.to_le_bytes());
    head
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn with(at: usize, value: &[u8]) -> Result<Image, KernelError> {
    let mut head = header();
    put(&mut head, at, value);
    Image::parse(&head, FILE)
}

#[test]
fn a_true_header_is_taken() {
    let image = Image::parse(&header(), FILE).unwrap();
    assert_eq!(image.text_offset, 0x20_0000);
    assert_eq!(image.image_size, 0x3000);
    assert_eq!(image.file_size, FILE);
    // The kernel's documentation allows the old magic to be absent.
    assert!(with(48, &[0; 8]).is_ok());
}

#[test]
fn a_header_that_lies_is_told() {
    use KernelError as E;
    let cases = [
        (8, 0x1000u64, E::TextOffset(0x1000)),
        (8, 1 << 60, E::TextOffset(1 << 60)),
        (16, 0, E::ImageSize(0)),
        (16, u64::MAX, E::ImageSize(u64::MAX)),
        (
            16,
            FILE - 1,
            E::ImageSmallerThanFile {
                image: FILE - 1,
                file: FILE,
            },
        ),
        (24, 1, E::BigEndian),
        (32, 0x0003_0001, E::Version(3, 1)),
    ];
    for (at, value, expected) in cases {
        assert_eq!(with(at, &value.to_le_bytes()), Err(expected));
    }
}

#[test]
fn a_truncated_file_is_told() {
    assert_eq!(
        Image::parse(&header()[..62], 62),
        Err(KernelError::Truncated {
            promised: 64,
            file: 62
        })
    );
    assert!(Image::parse(&efi_stub(4096), FILE).is_ok());
    for (length, promised) in [(64, 88), (87, 88), (88, 144), (143, 144)] {
        assert_eq!(
            Image::parse(&efi_stub(4096)[..length], length as u64),
            Err(KernelError::Truncated {
                promised,
                file: length as u64
            })
        );
    }
    assert_eq!(
        Image::parse(&efi_stub(4608), FILE),
        Err(KernelError::Truncated {
            promised: 4608,
            file: FILE
        })
    );
}

#[test]
fn no_header_makes_the_parser_panic() {
    // Try every short length, and set every single byte of a PE header to its extremes.
    for length in 60..300 {
        let _ = Image::parse(&efi_stub(4096)[..length], length as u64);
    }
    for at in 0..256 {
        for value in [0, 0x7f, 0x80, 0xff] {
            let mut head = efi_stub(4096);
            head[at] = value;
            let _ = Image::parse(&head, FILE);
            let _ = Image::parse(&head[..256], 256);
        }
    }
}
