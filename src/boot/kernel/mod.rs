//! Kernels: detects the format of a file by its content, and finds where its parts go in RAM.
//!
//! ```text
//! image    a RISC-V Linux Image                zboot     an EFI image with a compressed Image
//! elf      an S-mode ELF, or a RISC-V vmlinux  compress  gzip and zstd around any of them
//! ```

mod compress;
mod elf;
mod image;
mod zboot;

use std::io;
use std::ops::Range;

use thiserror::Error;

use crate::config::KernelFormat;
use crate::util::ByteSize;
use image::Image;

/// Bytes at the start of a file that are enough to detect its format: they hold an Image's header
/// and, for a kernel with an EFI stub, the PE section table.
pub const HEAD_SIZE: usize = 4096;

/// Where a flat binary goes, as an offset from the start of RAM: where RISC-V firmware loads S-mode
/// software.
const FLAT_OFFSET: u64 = 2 << 20;

/// Why rvmm cannot load a file as a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KernelError {
    /// The file is empty.
    #[error("the file is empty")]
    Empty,
    /// An ELF file for another machine.
    #[error("an ELF file for {0}, not a RISC-V kernel")]
    ForeignElf(String),
    /// An ELF file that cannot be loaded.
    #[error("an ELF file that rvmm cannot load: {0}")]
    Elf(String),
    /// A file with a compression that rvmm cannot decompress.
    #[error("compressed with {0}, which rvmm cannot decompress: use gzip or zstd")]
    Compressed(String),
    /// A compressed file with corrupt data.
    #[error("compressed with {0}, but the data is corrupt: {1}")]
    Broken(&'static str, String),
    /// A compressed file that is larger than guest RAM when decompressed.
    #[error(
        "compressed with {0}, and decompressed it is larger than guest RAM ({1}): increase --mem \
         if it really is a kernel"
    )]
    TooLarge(&'static str, ByteSize),
    /// A compressed file that holds no kernel.
    #[error("compressed, but its content is not a RISC-V kernel")]
    NoneInside,
    /// An initramfs, plain or compressed.
    #[error("an initramfs, not a kernel: pass it with --initrd")]
    Initramfs,
    /// The format is unknown.
    #[error(
        "not a RISC-V kernel: no Image (\"RSC\\x05\" at byte 56), ELF, gzip or zstd; \
         --kernel-format flat loads any bytes"
    )]
    Unknown,
    /// An Image whose header is not at its place.
    #[error(
        "its Image header is {0} bytes too early: the assembler has compressed an instruction \
         before it; write `.option norvc` there"
    )]
    Shifted(usize),
    /// The file does not have the format that `--kernel-format` requires.
    #[error("not {0}, although --kernel-format requires it")]
    NotThat(&'static str),
    /// The header's version is not 0.x.
    #[error("its Image header has version {0}.{1}, but rvmm supports only 0.x")]
    Version(u32, u32),
    /// A big-endian kernel.
    #[error("a big-endian kernel (Image header flag 0): KVM's guests are little-endian")]
    BigEndian,
    /// `text_offset` is not valid.
    #[error("its Image header is wrong: text_offset {0:#x} is not a multiple of 2 MiB below 2^59")]
    TextOffset(u64),
    /// `image_size` is 0 or too large.
    #[error("its Image header is wrong: image_size is {0:#x}")]
    ImageSize(u64),
    /// `image_size` is smaller than the file.
    #[error("its Image header is wrong: image_size is {image} bytes, but the file has {file}")]
    ImageSmallerThanFile {
        /// `image_size` in bytes.
        image: u64,
        /// The file's size in bytes.
        file: u64,
    },
    /// The file is shorter than its headers say.
    #[error(
        "the file is truncated: according to its headers it has {promised} bytes, but it has {file}"
    )]
    Truncated {
        /// Least size according to the headers, in bytes.
        promised: u64,
        /// The file's size in bytes.
        file: u64,
    },
}

/// A part of the kernel that is loaded as one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The part's range in the file, or in the decompressed data.
    pub source: Range<u64>,
    /// Where the part goes, as an offset from the start of RAM.
    pub at: u64,
    /// Bytes that the part takes in RAM. Bytes beyond the end of `source` are zero.
    pub size: u64,
}

/// A parsed kernel: what to load where, and the entry point. Offsets are from the start of RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The parts to load. There is at least one.
    pub segments: Vec<Segment>,
    /// Offset of the first instruction.
    pub entry: u64,
    /// Whether this is a Linux, an Image or a vmlinux. It boots as
    /// `Documentation/arch/riscv/boot.rst` describes, and uses no RAM behind its extent before it
    /// has read the device tree.
    pub is_linux: bool,
    /// The decompressed data, if the file was compressed. Segments refer to it then.
    pub expanded: Option<Vec<u8>>,
}

impl Kernel {
    /// The range from the kernel's first byte in RAM to its last, BSS included, as offsets from the
    /// start of RAM.
    pub fn extent(&self) -> Range<u64> {
        let start = self.segments.iter().map(|segment| segment.at).min();
        let ends = self.segments.iter().map(|s| s.at.saturating_add(s.size));
        start.unwrap_or(0)..ends.max().unwrap_or(0)
    }

    fn one_piece(source: u64, at: u64, size: u64, is_linux: bool) -> Self {
        let segment = Segment {
            source: 0..source,
            at,
            size,
        };
        Self {
            segments: vec![segment],
            entry: at,
            is_linux,
            expanded: None,
        }
    }
}

/// Access to a kernel's file, to detect its format and to decompress it.
pub trait Source {
    /// Size of the file in bytes.
    fn size(&self) -> u64;
    /// The first [`HEAD_SIZE`] bytes of the file, or the whole file if it is shorter.
    ///
    /// # Errors
    /// Fails if the host cannot read the file.
    fn head(&self) -> io::Result<Vec<u8>>;
    /// A reader that starts at the first byte of the file.
    ///
    /// # Errors
    /// Fails if the host cannot read the file.
    fn reader(&self) -> io::Result<Box<dyn io::Read + '_>>;
}

/// A file in memory.
impl Source for &[u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn head(&self) -> io::Result<Vec<u8>> {
        Ok(self[..self.len().min(HEAD_SIZE)].to_vec())
    }

    fn reader(&self) -> io::Result<Box<dyn io::Read + '_>> {
        Ok(Box::new(*self))
    }
}

/// Why a kernel cannot be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// Fails if the host cannot read the file.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// The file is not a kernel that rvmm can load.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// Detects the format of `source` and parses it. Guest RAM starts at guest-physical address `base`
/// and has `ram` bytes; decompressed data never takes more than that.
///
/// # Errors
/// Fails if the file cannot be read or is not a kernel that rvmm can load.
pub fn open(
    source: &dyn Source,
    format: KernelFormat,
    base: u64,
    ram: ByteSize,
) -> Result<Kernel, LoadError> {
    let head = source.head()?;
    if head.is_empty() {
        return Err(KernelError::Empty.into());
    }
    if format == KernelFormat::Flat {
        let size = source.size();
        return Ok(Kernel::one_piece(size, FLAT_OFFSET, size, false));
    }
    let expanded = match compress::kind(&head) {
        Some(kind) => Some(kind.expand(&mut source.reader()?, ram)?),
        None if zboot::is(&head) => Some(zboot::expand(&head, source, ram)?),
        None => None,
    };
    let kernel = match expanded {
        Some(bytes) => {
            let head = &bytes[..bytes.len().min(HEAD_SIZE)];
            let kernel = plain(head, bytes.len() as u64, format, base);
            let mut kernel = kernel.map_err(|error| match error {
                KernelError::Unknown => KernelError::NoneInside,
                error => error,
            })?;
            kernel.expanded = Some(bytes);
            kernel
        }
        None => plain(&head, source.size(), format, base)?,
    };
    Ok(kernel)
}

/// Parses a kernel that is not compressed, or that was decompressed.
fn plain(head: &[u8], size: u64, format: KernelFormat, base: u64) -> Result<Kernel, KernelError> {
    if elf::is(head) {
        expect(format, KernelFormat::Elf)?;
        return elf::parse(head, size, base);
    }
    if Image::is(head) {
        expect(format, KernelFormat::Image)?;
        let image = Image::parse(head, size)?;
        let (at, memory) = (image.text_offset, image.image_size);
        return Ok(Kernel::one_piece(size, at, memory, true));
    }
    if let Some(early) = Image::shifted(head) {
        return Err(KernelError::Shifted(early));
    }
    // `Documentation/driver-api/early-userspace/buffer-format.rst`.
    if head.starts_with(b"070701") || head.starts_with(b"070702") {
        return Err(KernelError::Initramfs);
    }
    Err(compress::other(head).map_or(KernelError::Unknown, KernelError::Compressed))
}

fn expect(wanted: KernelFormat, found: KernelFormat) -> Result<(), KernelError> {
    match wanted {
        KernelFormat::Auto => Ok(()),
        _ if wanted == found => Ok(()),
        KernelFormat::Elf => Err(KernelError::NotThat("an ELF file")),
        _ => Err(KernelError::NotThat("an Image")),
    }
}

/// Reads a little-endian number. The callers have checked the length.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | (u32::from(u16_at(bytes, at + 2)) << 16)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | (u64::from(u32_at(bytes, at + 4)) << 32)
}

#[cfg(test)]
mod tests;
