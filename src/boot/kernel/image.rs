//! The Image of a RISC-V Linux: `Documentation/arch/riscv/boot-image-header.rst`.
//!
//! ```text
//!  0 code0, code1   16 image_size   32 version        48 magic  "RISCV\0\0\0" (old)
//!  8 text_offset    24 flags        36 reserved, 12   56 magic2 "RSC\x05"   60 PE header's offset
//! ```

use super::{HEAD_SIZE, KernelError, u16_at, u32_at, u64_at};

const HEADER_SIZE: usize = 64;
const MAGIC2: &[u8] = b"RSC\x05";
const FLAG_BIG_ENDIAN: u64 = 1;
/// `text_offset` and the place of the kernel follow 2 MiB pages on rv64.
const TEXT_ALIGN: u64 = 2 << 20;
/// No RISC-V machine has as much memory (Sv57x4 ends here): such a size is a lie.
const SIZE_LIMIT: u64 = 1 << 59;

/// A kernel Image whose header was found true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    /// Where the kernel wants to be, from the start of RAM. A multiple of 2 MiB.
    pub(crate) text_offset: u64,
    /// Bytes the kernel occupies once it runs, its BSS included; at least `file_size`.
    pub(crate) image_size: u64,
    /// Bytes of the file.
    pub(crate) file_size: u64,
}

impl Image {
    /// Whether a file starts so.
    pub(super) fn is(head: &[u8]) -> bool {
        head.get(56..60) == Some(MAGIC2)
    }

    /// Checks the header of a file of `file_size` bytes that starts with `head`, its first
    /// [`HEAD_SIZE`] bytes or all it has.
    ///
    /// # Errors
    /// What the file is instead, or what is wrong with its header.
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

    /// An EFI-stub kernel is a PE file too, and its section table tells where the file ends.
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

/// How many bytes a file that starts with `head` has at least, as far as its PE headers tell: the
/// end of the last section's bytes, or of the headers themselves where `head` ends before them
/// (PE Format, "COFF File Header" and "Section Table"). 0 for an Image that is no PE file.
fn pe_file_end(head: &[u8]) -> u64 {
    const COFF_SIZE: usize = 24;
    const SECTION_SIZE: usize = 40;
    let pe = u32_at(head, 60) as usize;
    // Headers beyond the part that was read are left alone: no kernel has them there.
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
