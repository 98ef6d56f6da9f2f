//! Compressed kernels. The decompressed size is limited to guest RAM, because a small file can
//! decompress to any size.

use std::io::{BufReader, Read};

use zstd::zstd_safe;

use super::KernelError;
use crate::util::ByteSize;

/// Buffer for a zstd frame whose header does not have the decompressed size. No kernel is as large.
const UNKNOWN_SIZE_MAX: ByteSize = ByteSize::mib(1024);

/// A compression that rvmm can decompress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Zstd,
}

/// The compression of a file that starts with `head`, if rvmm can decompress it.
pub(super) fn kind(head: &[u8]) -> Option<Compression> {
    if head.starts_with(b"\x1f\x8b") {
        Some(Compression::Gzip)
    } else if head.starts_with(b"\x28\xb5\x2f\xfd") {
        Some(Compression::Zstd)
    } else {
        None
    }
}

/// The name of the compression of a file that starts with `head`, if rvmm knows it but cannot
/// decompress it.
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
    /// The compression by its name in a zboot header.
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

    /// Decompresses `reader`, to at most `ram` bytes.
    pub(super) fn expand(
        self,
        reader: &mut dyn Read,
        ram: ByteSize,
    ) -> Result<Vec<u8>, KernelError> {
        match self {
            Self::Gzip => self.read(flate2::bufread::GzDecoder::new(BufReader::new(reader)), ram),
            Self::Zstd => self.expand_zstd(reader, ram),
        }
    }

    /// Decompresses the frame in one call: a streaming decoder would need a window of up to 128 MiB
    /// in addition to the output.
    fn expand_zstd(self, reader: &mut dyn Read, ram: ByteSize) -> Result<Vec<u8>, KernelError> {
        let broken = |why: String| KernelError::Broken(self.name(), why);
        let packed = self.read(reader, ram)?;
        let of_frame = |code| broken(zstd_safe::get_error_name(code).into());
        let length = zstd_safe::find_frame_compressed_size(&packed).map_err(of_frame)?;
        // The kernel is one frame. Ignore what follows it.
        let frame = packed.get(..length).unwrap_or(&packed);
        let size = zstd_safe::get_frame_content_size(frame);
        let size = size.map_err(|error| broken(error.to_string()))?;
        let room = size.unwrap_or(ram.bytes().min(UNKNOWN_SIZE_MAX.bytes()));
        if room > ram.bytes() {
            return Err(KernelError::TooLarge(self.name(), ram));
        }
        let mut bytes = Vec::new();
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let reserved = bytes.try_reserve_exact(room);
        reserved.map_err(|error| broken(error.to_string()))?;
        match zstd_safe::decompress(&mut bytes, frame) {
            Ok(0) => Err(KernelError::Empty),
            Ok(_) => Ok(bytes),
            Err(code) => match zstd_safe::get_error_name(code) {
                "Destination buffer is too small" => Err(KernelError::TooLarge(self.name(), ram)),
                other => Err(broken(other.into())),
            },
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
