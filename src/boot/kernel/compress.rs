//! Compressed kernels. What they expand to is bounded by guest RAM: a few bytes may promise any
//! number of them.

use std::io::{BufReader, Read};

use zstd::zstd_safe;

use super::KernelError;
use crate::util::ByteSize;

/// Room for a zstd frame that does not tell its size. No kernel is as large.
const UNTOLD_MAX: ByteSize = ByteSize::mib(1024);

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
        match self {
            Self::Gzip => self.read(flate2::bufread::GzDecoder::new(BufReader::new(reader)), ram),
            Self::Zstd => self.expand_zstd(reader, ram),
        }
    }

    /// In one piece: a stream would need a window of up to 128 MiB beside what it expands to.
    fn expand_zstd(self, reader: &mut dyn Read, ram: ByteSize) -> Result<Vec<u8>, KernelError> {
        let broken = |why: String| KernelError::Broken(self.name(), why);
        let packed = self.read(reader, ram)?;
        let of_frame = |code| broken(zstd_safe::get_error_name(code).into());
        let length = zstd_safe::find_frame_compressed_size(&packed).map_err(of_frame)?;
        // One frame is a kernel; what follows it is none of its.
        let frame = packed.get(..length).unwrap_or(&packed);
        let told = zstd_safe::get_frame_content_size(frame);
        let told = told.map_err(|error| broken(error.to_string()))?;
        let room = told.unwrap_or(ram.bytes().min(UNTOLD_MAX.bytes()));
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
