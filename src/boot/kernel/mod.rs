//! Kernels: which of the formats a file has, told by its content, and where its parts go in RAM.
//!
//! ```text
//! image    a RISC-V Linux Image                  zboot     an EFI image with a compressed Image in it
//! elf      an S-mode ELF, or a RISC-V vmlinux    compress  gzip and zstd around any of them
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

/// Bytes at the start of a file that tell what it is: an Image's header and, of an EFI-stub kernel,
/// the PE section table.
pub const HEAD_SIZE: usize = 4096;

/// Where a flat binary goes, from the start of RAM: where a RISC-V boot loader puts S-mode.
const FLAT_OFFSET: u64 = 2 << 20;

/// Why a file is no kernel that rvmm can load.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KernelError {
    /// No bytes.
    #[error("the file is empty")]
    Empty,
    /// An ELF file for another machine.
    #[error("an ELF file for {0}, not a RISC-V kernel")]
    ForeignElf(String),
    /// An ELF file that cannot be loaded.
    #[error("an ELF file that rvmm cannot load: {0}")]
    Elf(String),
    /// A compressed file that rvmm does not decompress.
    #[error("compressed with {0}, which rvmm does not know: gzip and zstd it does")]
    Compressed(String),
    /// A compressed file that is broken.
    #[error("compressed with {0}, and broken: {1}")]
    Broken(&'static str, String),
    /// More bytes than RAM.
    #[error(
        "compressed with {0}, and it expands to more than the {1} of guest RAM: give more with \
         --mem if it really is a kernel"
    )]
    TooLarge(&'static str, ByteSize),
    /// A compressed file of something else.
    #[error("compressed, and what is in it is no RISC-V kernel")]
    NoneInside,
    /// An initramfs, plain or compressed.
    #[error("an initramfs and no kernel: give it with --initrd")]
    Initramfs,
    /// None of the formats.
    #[error(
        "not a RISC-V kernel: no Image (\"RSC\\x05\" at byte 56), ELF, gzip or zstd; \
         --kernel-format flat loads any bytes"
    )]
    Unknown,
    /// Not what `--kernel-format` says.
    #[error("not {0}, which --kernel-format asks for")]
    NotThat(&'static str),
    /// The header's version is not 0.x.
    #[error("its Image header has version {0}.{1}, and rvmm knows 0.x")]
    Version(u32, u32),
    /// A big-endian kernel.
    #[error("a big-endian kernel (Image header flag 0): KVM's guests are little-endian")]
    BigEndian,
    /// `text_offset` is not what a kernel can be linked for.
    #[error("its Image header lies: text_offset {0:#x} is no multiple of 2 MiB below 2^59")]
    TextOffset(u64),
    /// `image_size` is nothing a kernel can have.
    #[error("its Image header lies: image_size is {0:#x}")]
    ImageSize(u64),
    /// `image_size` is less than the file.
    #[error("its Image header lies: image_size is {image} bytes, the file has {file}")]
    ImageSmallerThanFile {
        /// The header's claim.
        image: u64,
        /// The file's size.
        file: u64,
    },
    /// The file ends before its parts do.
    #[error("the file is truncated: its header promises {promised} bytes, it has {file}")]
    Truncated {
        /// Where the last part ends.
        promised: u64,
        /// The file's size.
        file: u64,
    },
}

/// Bytes of the source that go to one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where they are in the file, or in what it expanded to.
    pub source: Range<u64>,
    /// Where they go, from the start of RAM.
    pub at: u64,
    /// Bytes they take in RAM: what is more than the source's is zero.
    pub size: u64,
}

/// What to load where, and where to begin. Offsets are from the start of RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// At least one; none is outside [`Kernel::extent`].
    pub segments: Vec<Segment>,
    /// The first instruction.
    pub entry: u64,
    /// An Image or a vmlinux: it boots as `Documentation/arch/riscv/boot.rst` says, and takes no RAM
    /// behind its extent before it has read the device tree.
    pub is_linux: bool,
    /// What the file expanded to, if it was compressed: the segments' source.
    pub expanded: Option<Vec<u8>>,
}

impl Kernel {
    /// From the first byte of the kernel to its last, BSS included.
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

/// A kernel's file, as far as telling its format needs it.
pub trait Source {
    /// Bytes of the file.
    fn size(&self) -> u64;
    /// Its first [`HEAD_SIZE`] bytes, or all it has.
    ///
    /// # Errors
    /// The host could not read it.
    fn head(&self) -> io::Result<Vec<u8>>;
    /// A reader of it, from its first byte.
    ///
    /// # Errors
    /// The host could not read it.
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

/// Why there is no kernel: the file, or the host that should read it.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The host could not read it.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// It is no kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// Finds out what `source` is. Never holds more than `ram` bytes of it, the guest's RAM, which
/// starts at `base`.
///
/// # Errors
/// What the file is instead, or what is wrong with it.
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

/// A kernel that is not compressed, or not any more.
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

/// Little-endian numbers; the callers have checked the length.
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
