//! The files of kernel and initrd: opens them, checks them, and reads them into guest RAM.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::kernel::{self, HEAD_SIZE, Kernel, KernelError, LoadError, Segment, Source};
use crate::config::KernelFormat;
use crate::memory::GuestMemory;
use crate::util::ByteSize;

/// Why a boot file cannot be used.
#[derive(Debug, Error)]
pub enum FileError {
    /// The host could not open or read the file.
    #[error("Failed to {act} {what} {path:?}")]
    Io {
        /// "open" or "read".
        act: &'static str,
        /// "kernel", "initrd" or "symbols".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The file is not a kernel that rvmm can load.
    #[error("Failed to load kernel {path:?}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What the file is instead, or what is wrong with it.
        source: KernelError,
    },
    /// A file that is not the kernel is empty.
    #[error("Failed to load {what} {path:?}: the file is empty")]
    Empty {
        /// "initrd" or "symbols".
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The path is not a regular file.
    #[error("Failed to open {what} {path:?}: {kind}, not a file")]
    NotAFile {
        /// "kernel", "initrd" or "symbols".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What it is instead, such as "a directory".
        kind: &'static str,
    },
}

/// An open boot file. It stays open, so that rvmm loads the file that it checked even if the path
/// is replaced meanwhile.
#[derive(Debug)]
pub struct BootFile {
    file: File,
    what: &'static str,
    path: PathBuf,
    size: u64,
}

impl BootFile {
    /// Opens `path`. `what` is "kernel", "initrd" or "symbols"; errors name it.
    ///
    /// # Errors
    /// Fails if the file cannot be opened or is not a regular file.
    pub fn open(what: &'static str, path: &Path) -> Result<Self, FileError> {
        let failed = |source| FileError::Io {
            act: "open",
            what,
            path: path.to_owned(),
            source,
        };
        // Check the kind before opening: opening a pipe could block for ever.
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if metadata.is_dir() {
            return Err(FileError::NotAFile {
                what,
                path: path.to_owned(),
                kind: "a directory",
            });
        }
        // /dev/null reads as an empty file, so the error is that the file is empty.
        if !metadata.is_file() && path != Path::new("/dev/null") {
            return Err(FileError::NotAFile {
                what,
                path: path.to_owned(),
                kind: "a device, pipe or socket",
            });
        }
        let file = File::open(path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        Ok(Self {
            file,
            what,
            path: path.to_owned(),
            size,
        })
    }

    /// The path by which the file was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the file in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Parses the file as a kernel, for a guest with `ram` bytes of RAM at guest-physical address
    /// `base`.
    ///
    /// # Errors
    /// Fails if the file cannot be read or is not a kernel that rvmm can load.
    pub fn kernel(
        &self,
        format: KernelFormat,
        base: u64,
        ram: ByteSize,
    ) -> Result<Kernel, FileError> {
        kernel::open(self, format, base, ram).map_err(|error| match error {
            LoadError::Read(source) => self.failed_read(source),
            LoadError::Kernel(source) => FileError::Kernel {
                path: self.path.clone(),
                source,
            },
        })
    }

    /// Loads `kernel`, which was parsed from this file, into RAM at guest-physical address `base`.
    ///
    /// # Errors
    /// Fails if the file cannot be read, has shrunk, or does not fit in RAM.
    pub(crate) fn load_kernel(
        &self,
        kernel: &Kernel,
        ram: &GuestMemory,
        base: u64,
    ) -> Result<(), FileError> {
        let loaded = kernel.segments.iter().filter(|s| !s.source.is_empty());
        for Segment { source, at, .. } in loaded {
            let gpa = GuestAddress(base + at);
            let loaded = match &kernel.expanded {
                Some(bytes) => slice(bytes, source).and_then(|bytes| write_sparse(ram, bytes, gpa)),
                None => self.read_to(ram, gpa, source),
            };
            loaded.map_err(|source| self.failed_read(source))?;
        }
        Ok(())
    }

    /// Returns the file if it is not empty.
    ///
    /// # Errors
    /// Fails if the file is empty.
    pub(crate) fn not_empty(self) -> Result<Self, FileError> {
        match self.size {
            0 => Err(FileError::Empty {
                what: self.what,
                path: self.path,
            }),
            _ => Ok(self),
        }
    }

    /// Reads the whole file into guest RAM, to the start of the guest-physical `range`.
    ///
    /// # Errors
    /// Fails if the file cannot be read, has shrunk, or does not fit in RAM.
    pub(crate) fn load(&self, ram: &GuestMemory, range: &Range<u64>) -> Result<(), FileError> {
        self.read_to(ram, GuestAddress(range.start), &(0..self.size))
            .map_err(|source| self.failed_read(source))
    }

    /// The file, at its start.
    ///
    /// # Errors
    /// Fails if the file cannot be read.
    pub(crate) fn rewound(&self) -> Result<&File, FileError> {
        let mut file = &self.file;
        file.rewind().map_err(|source| self.failed_read(source))?;
        Ok(file)
    }

    fn read_to(&self, ram: &GuestMemory, gpa: GuestAddress, from: &Range<u64>) -> io::Result<()> {
        let length = usize::try_from(from.end - from.start).unwrap_or(usize::MAX);
        let mut file = &self.file;
        file.seek(SeekFrom::Start(from.start))?;
        ram.read_exact_volatile_from(gpa, &mut file, length)
            .map_err(io::Error::other)
    }

    fn failed_read(&self, source: io::Error) -> FileError {
        FileError::Io {
            act: "read",
            what: self.what,
            path: self.path.clone(),
            source,
        }
    }
}

impl Source for BootFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn head(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(HEAD_SIZE);
        self.reader()?
            .take(HEAD_SIZE as u64)
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn reader(&self) -> io::Result<Box<dyn Read + '_>> {
        let mut file = &self.file;
        file.rewind()?;
        Ok(Box::new(file))
    }
}

/// Writes `bytes`, without 64 KiB pieces that are all zero: guest RAM is zero already.
fn write_sparse(ram: &GuestMemory, bytes: &[u8], gpa: GuestAddress) -> io::Result<()> {
    const PIECE: usize = 64 << 10;
    for (index, piece) in bytes.chunks(PIECE).enumerate() {
        if piece.iter().any(|byte| *byte != 0) {
            let at = GuestAddress(gpa.0 + (index * PIECE) as u64);
            ram.write_slice(piece, at).map_err(io::Error::other)?;
        }
    }
    Ok(())
}

fn slice<'a>(bytes: &'a [u8], range: &Range<u64>) -> io::Result<&'a [u8]> {
    let start = usize::try_from(range.start).ok();
    let end = usize::try_from(range.end).ok();
    let bytes = start
        .zip(end)
        .and_then(|(start, end)| bytes.get(start..end));
    bytes.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemConfig;
    use crate::memory;

    #[test]
    fn a_file_lands_where_it_should() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("LICENSE");
        let file = BootFile::open("initrd", &path).unwrap();
        let ram = memory::create(
            GuestAddress(0x8000_0000),
            MemConfig::new(ByteSize::mib(1)),
            memory::Backing::Private,
        )
        .unwrap();
        let log = memory::dirty_log(&ram);
        log.start().unwrap();
        file.load(&ram, &(0x8000_1000..0x8008_0000)).unwrap();
        let mut loaded = vec![0; usize::try_from(file.size()).unwrap()];
        ram.read_slice(&mut loaded, GuestAddress(0x8000_1000))
            .unwrap();
        assert_eq!(loaded, std::fs::read(&path).unwrap());
        let pages = loaded.len().div_ceil(4096);
        let marked: Vec<_> = memory::pages_of(&log.take()).collect();
        assert_eq!(marked, (1..=pages).collect::<Vec<_>>());
        // Pieces of a decompressed kernel that are all zero are not written.
        let mut bytes = vec![0; 3 << 16];
        bytes[2 << 16] = 1;
        write_sparse(&ram, &bytes, GuestAddress(0x8000_0000)).unwrap();
        let marked: Vec<_> = memory::pages_of(&log.take()).collect();
        assert_eq!(marked, (32..48).collect::<Vec<_>>());
    }

    #[test]
    fn errors_name_act_and_object() {
        let line = |path: &str| {
            let error = BootFile::open("kernel", Path::new(path)).unwrap_err();
            format!("{:#}", anyhow::Error::from(error))
        };
        assert_eq!(
            line("/nope"),
            "Failed to open kernel \"/nope\": No such file or directory (os error 2)"
        );
        assert_eq!(
            line("/"),
            "Failed to open kernel \"/\": a directory, not a file"
        );
        assert!(line("/dev/zero").contains("a device"));
        let empty = BootFile::open("initrd", Path::new("/dev/null")).unwrap();
        assert_eq!(
            empty.not_empty().unwrap_err().to_string(),
            "Failed to load initrd \"/dev/null\": the file is empty"
        );
    }
}
