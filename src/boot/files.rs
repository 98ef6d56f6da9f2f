//! Kernel and initrd: opened, checked, and read into guest RAM.

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
    /// The host refused.
    #[error("Failed to {act} {what} {path:?}")]
    Io {
        /// "open", "read".
        act: &'static str,
        /// "kernel", "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// The file is no kernel.
    #[error("Failed to load kernel {path:?}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        source: KernelError,
    },
    /// The initrd has no bytes.
    #[error("Failed to load initrd {0:?}: the file is empty")]
    EmptyInitrd(PathBuf),
    /// Not a regular file.
    #[error("Failed to open {what} {path:?}: {kind}, not a file")]
    NotAFile {
        /// "kernel", "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// "a directory".
        kind: &'static str,
    },
}

/// A boot file, open. What is loaded is what was checked, whatever happens to its name.
#[derive(Debug)]
pub struct BootFile {
    file: File,
    what: &'static str,
    path: PathBuf,
    size: u64,
}

impl BootFile {
    /// Opens `path`; `what` is "kernel" or "initrd", for errors.
    ///
    /// # Errors
    /// It cannot be opened, or is no regular file.
    pub fn open(what: &'static str, path: &Path) -> Result<Self, FileError> {
        let failed = |source| FileError::Io {
            act: "open",
            what,
            path: path.to_owned(),
            source,
        };
        // Before opening: that could wait for ever, on a pipe.
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if metadata.is_dir() {
            return Err(FileError::NotAFile {
                what,
                path: path.to_owned(),
                kind: "a directory",
            });
        }
        // /dev/null reads as an empty file, and is told as one.
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

    /// The name it was opened by.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Finds out what kernel the file is, for a guest with `ram` of RAM at `base`.
    ///
    /// # Errors
    /// It cannot be read, or is none.
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

    /// Loads `kernel`, which is this file, into RAM at `base`.
    ///
    /// # Errors
    /// The file cannot be read, has shrunk, or leaves RAM.
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

    /// Refuses an empty initrd.
    ///
    /// # Errors
    /// The file has no bytes.
    pub(crate) fn not_empty(self) -> Result<Self, FileError> {
        match self.size {
            0 => Err(FileError::EmptyInitrd(self.path)),
            _ => Ok(self),
        }
    }

    /// Reads the whole file to the start of `range` of guest RAM.
    ///
    /// # Errors
    /// The file cannot be read, has shrunk, or leaves RAM.
    pub(crate) fn load(&self, ram: &GuestMemory, range: &Range<u64>) -> Result<(), FileError> {
        self.read_to(ram, GuestAddress(range.start), &(0..self.size))
            .map_err(|source| self.failed_read(source))
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

/// Writes `bytes` but for pages of zeros, which guest RAM has already.
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
        // Of an expanded kernel, pages of zeros are left out.
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
