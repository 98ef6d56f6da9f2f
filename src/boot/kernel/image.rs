//! The Image format of RISC-V Linux: `Documentation/arch/riscv/boot-image-header.rst`.
//!
//! ```text
//!  0 code0, code1   16 image_size   32 version        48 magic  "RISCV\0\0\0" (old)
//!  8 text_offset    24 flags        36 reserved, 12   56 magic2 "RSC\x05"   60 PE header's offset
//! ```

use super::{HEAD_SIZE, KernelError, u16_at, u32_at, u64_at};

const HEADER_SIZE: usize = 64;
const MAGIC2: &[u8] = b"RSC\x05";
const FLAG_BIG_ENDIAN: u64 = 1;
/// On rv64, `text_offset` and the address of the kernel are multiples of 2 MiB.
const TEXT_ALIGN: u64 = 2 << 20;
/// No RISC-V machine has as much memory: a guest-physical address of Sv57x4 has 59 bits.
const SIZE_LIMIT: u64 = 1 << 59;

/// A kernel Image with a valid header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    /// Where the kernel must be loaded, as an offset from the start of RAM. A multiple of 2 MiB.
    pub(crate) text_offset: u64,
    /// Bytes that the kernel occupies in RAM, its BSS included. At least `file_size`.
    pub(crate) image_size: u64,
    /// Size of the file in bytes.
    pub(crate) file_size: u64,
}

impl Image {
    /// Whether a file that starts with `head` is an Image.
    pub(super) fn is(head: &[u8]) -> bool {
        head.get(56..60) == Some(MAGIC2)
    }

    /// How many bytes too early the header is. None if there is none. The assembler compresses the
    /// jump before the header to two bytes unless it is told otherwise.
    pub(super) fn shifted(head: &[u8]) -> Option<usize> {
        let early = [2, 4, 6];
        early
            .into_iter()
            .find(|early| head.get(56 - early..60 - early) == Some(MAGIC2))
    }

    /// Checks the header of a file of `file_size` bytes. `head` is its first [`HEAD_SIZE`] bytes,
    /// or the whole file if it is shorter.
    ///
    /// # Errors
    /// Fails if the header is invalid or the file is truncated.
    pub(crate) fn parse(head: &[u8], file_size: u64) -> Result<Self, KernelError> {
        if head.len() < HEADER_SIZE {
            return Err(KernelError::Truncated {
                promised: HEADER_SIZE as u64,
                file: file_size,
            });
        }
        let image = Self {
            text_offset: u64_at(head, 8),
            image_size: u64_at(head, 16),
            file_size,
        };
        image.check_header(u64_at(head, 24), u32_at(head, 32))?;
        image.check_sections(head)?;
        Ok(image)
    }

    fn check_header(&self, flags: u64, version: u32) -> Result<(), KernelError> {
        let (major, minor) = (version >> 16, version & 0xffff);
        if major != 0 {
            return Err(KernelError::Version(major, minor));
        }
        if flags & FLAG_BIG_ENDIAN != 0 {
            return Err(KernelError::BigEndian);
        }
        if self.text_offset % TEXT_ALIGN != 0 || self.text_offset >= SIZE_LIMIT {
            return Err(KernelError::TextOffset(self.text_offset));
        }
        if self.image_size == 0 || self.image_size >= SIZE_LIMIT {
            return Err(KernelError::ImageSize(self.image_size));
        }
        if self.image_size < self.file_size {
            return Err(KernelError::ImageSmallerThanFile {
                image: self.image_size,
                file: self.file_size,
            });
        }
        Ok(())
    }

    /// Checks that the file is not truncated. A kernel with an EFI stub is a PE file too, and its
    /// section table has the size of the file.
    fn check_sections(&self, head: &[u8]) -> Result<(), KernelError> {
        match pe_file_end(head) {
            promised if promised > self.file_size => Err(KernelError::Truncated {
                promised,
                file: self.file_size,
            }),
            _ => Ok(()),
        }
    }
}

/// The least size of a file that starts with `head`, according to its PE headers: the end of the
/// last section's data, or the end of the headers if `head` ends before them (PE Format, "COFF File
/// Header" and "Section Table"). Returns 0 for an Image that is not a PE file.
fn pe_file_end(head: &[u8]) -> u64 {
    const COFF_SIZE: usize = 24;
    const SECTION_SIZE: usize = 40;
    let pe = u32_at(head, 60) as usize;
    // Ignore headers beyond `HEAD_SIZE`: no kernel has them there.
    if !head.starts_with(b"MZ") || pe == 0 || pe > HEAD_SIZE / 2 {
        return 0;
    }
    let Some(coff) = head.get(pe..pe + COFF_SIZE) else {
        return (pe + COFF_SIZE) as u64;
    };
    if !coff.starts_with(b"PE\0\0") {
        return 0;
    }
    let (sections, optional) = (usize::from(u16_at(coff, 6)), usize::from(u16_at(coff, 20)));
    let start = pe + COFF_SIZE + optional;
    let end = start + SECTION_SIZE * sections;
    let Some(table) = head.get(start..end) else {
        return if end > HEAD_SIZE { 0 } else { end as u64 };
    };
    let ends = table
        .chunks_exact(SECTION_SIZE)
        .map(|section| u64::from(u32_at(section, 16)) + u64::from(u32_at(section, 20)));
    ends.max().unwrap_or(0)
}

#[cfg(test)]
mod tests;
