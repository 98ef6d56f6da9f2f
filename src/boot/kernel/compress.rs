//! Compressed kernels. What they expand to is bounded by guest RAM: a few bytes may promise any
//! number of them.

use std::io::{BufReader, Read};

use super::KernelError;
use crate::util::ByteSize;

/// A compression that rvmm undoes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Zstd,
}

/// How a file starts that is compressed by one of them.
pub(super) fn kind(head: &[u8]) -> Option<Compression> {
    if head.starts_with(b"\x1f\x8b") {
        Some(Compression::Gzip)
    } else if head.starts_with(b"\x28\xb5\x2f\xfd") {
        Some(Compression::Zstd)
    } else {
        None
    }
}

/// The name of a compression that rvmm does not undo.
pub(super) fn other(head: &[u8]) -> Option<String> {
    let known = [
        (&b"\xfd7zXZ\0"[..], "xz"),
        (b"BZh", "bzip2"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"\x02\x21\x4c\x18", "lz4"),
        (b"\x89LZO", "lzo"),
    ];
    let found = known.iter().find(|(magic, _)| head.starts_with(magic));
    found.map(|(_, name)| (*name).into())
}

impl Compression {
    /// As zboot headers name it.
    pub(super) fn named(name: &str) -> Option<Self> {
        match name {
            "gzip" => Some(Self::Gzip),
            "zstd" | "zstd22" => Some(Self::Zstd),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    /// What `reader` expands to, at most `ram` bytes.
    pub(super) fn expand(
        self,
        reader: &mut dyn Read,
        ram: ByteSize,
    ) -> Result<Vec<u8>, KernelError> {
        let reader = BufReader::new(reader);
        match self {
            Self::Gzip => self.read(flate2::bufread::GzDecoder::new(reader), ram),
            Self::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(reader);
                let decoder =
                    decoder.map_err(|e| KernelError::Broken(self.name(), e.to_string()))?;
                // One frame is a kernel; what follows it is none of its.
                self.read(decoder.single_frame(), ram)
            }
        }
    }

    fn read(self, decoder: impl Read, ram: ByteSize) -> Result<Vec<u8>, KernelError> {
        let mut bytes = Vec::new();
        let mut bounded = decoder.take(ram.bytes().saturating_add(1));
        match bounded.read_to_end(&mut bytes) {
            Err(error) => Err(KernelError::Broken(self.name(), error.to_string())),
            Ok(_) if bytes.len() as u64 > ram.bytes() => {
                Err(KernelError::TooLarge(self.name(), ram))
            }
            Ok(_) if bytes.is_empty() => Err(KernelError::Empty),
            Ok(_) => Ok(bytes),
        }
    }
}
