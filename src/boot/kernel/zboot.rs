//! EFI zboot: an EFI application whose payload is a compressed Image
//! (`drivers/firmware/efi/libstub/zboot-header.S`).
//!
//! ```text
//! 0 "MZ"    4 "zimg"    8 payload's offset   12 payload's size   24 compression, NUL-terminated
//! ```

use std::io::Read;

use super::compress::Compression;
use super::{KernelError, LoadError, Source, u32_at};
use crate::util::ByteSize;

const HEADER_SIZE: usize = 64;
const NAME: std::ops::Range<usize> = 24..56;

/// Whether a file that starts with `head` is a zboot image.
pub(super) fn is(head: &[u8]) -> bool {
    head.len() >= HEADER_SIZE && head.starts_with(b"MZ") && head[4..8] == *b"zimg"
}

/// Decompresses the payload, to at most `ram` bytes.
pub(super) fn expand(
    head: &[u8],
    source: &dyn Source,
    ram: ByteSize,
) -> Result<Vec<u8>, LoadError> {
    let (offset, size) = (u64::from(u32_at(head, 8)), u64::from(u32_at(head, 12)));
    let (promised, file) = (offset + size, source.size());
    if promised > file {
        return Err(KernelError::Truncated { promised, file }.into());
    }
    let name = head[NAME]
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    let name = String::from_utf8_lossy(name);
    let Some(compression) = Compression::named(&name) else {
        return Err(KernelError::Compressed(format!("{name:?}")).into());
    };
    let mut reader = source.reader()?;
    std::io::copy(&mut reader.by_ref().take(offset), &mut std::io::sink())?;
    Ok(compression.expand(&mut reader.take(size), ram)?)
}
