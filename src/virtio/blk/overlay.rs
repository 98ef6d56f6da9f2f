//! What a guest writes to a disk with `snapshot=on`: kept in a temporary file without a name. The
//! image itself is only read. `saved` writes the clusters to a snapshot, and reads them back.

mod saved;

use std::env;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use super::file::{read_all, read_up_to};
use crate::memory::Pieces;
use crate::util::sync::lock;
pub use saved::SavedOverlay;

/// A cluster is the unit that is read either from the image or from the overlay, in bytes.
const CLUSTER: u64 = CLUSTER_BYTES as u64;
const CLUSTER_BYTES: usize = 4096;

/// The clusters that the guest has written.
pub struct Overlay {
    file: File,
    /// Size of the image in bytes.
    len: u64,
    /// One bit per cluster: whether it is in the overlay.
    written: Vec<AtomicU64>,
    /// Held while a cluster is written for the first time. Otherwise one of two writes to it could
    /// be lost.
    first_writes: Mutex<()>,
}

impl Overlay {
    /// Returns an empty overlay for an image of `len` bytes. Its file is in `directory`.
    ///
    /// # Errors
    /// Fails if the host cannot create the file there.
    pub(super) fn new(len: u64, directory: &Path) -> io::Result<Self> {
        let clusters = len.div_ceil(CLUSTER);
        let words = usize::try_from(clusters.div_ceil(64)).map_err(io::Error::other)?;
        let file = temporary(directory)?;
        file.set_len(len)?;
        Ok(Self {
            file,
            len,
            written: (0..words).map(|_| AtomicU64::new(0)).collect(),
            first_writes: Mutex::new(()),
        })
    }

    /// The file with the written clusters.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Fills `pieces` with the bytes at `offset`: from the overlay if the guest has written them,
    /// otherwise from `image`.
    ///
    /// # Errors
    /// Fails if the host cannot read a file, or if the image ends before.
    pub(super) fn read(
        &self,
        image: &File,
        pieces: &mut Pieces,
        mut offset: u64,
    ) -> io::Result<()> {
        while !pieces.is_empty() {
            let (here, length) = self.run(offset, pieces.len() as u64);
            let rest = pieces.split_off(usize::try_from(length).unwrap_or(usize::MAX));
            let file = if here { &self.file } else { image };
            read_all(file.as_fd(), pieces, offset)?;
            *pieces = rest;
            offset += length;
        }
        Ok(())
    }

    /// Calls `write`, which must write all of the `length` bytes at `offset` to the given file, the
    /// overlay's. Copies the rest of clusters that are covered in part from `image` first.
    ///
    /// # Errors
    /// Fails if `write` fails, or if a cluster cannot be copied.
    pub(super) fn write(
        &self,
        image: &File,
        offset: u64,
        length: u64,
        write: impl FnOnce(&File) -> io::Result<()>,
    ) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        if self.run(offset, length) == (true, length) {
            return write(&self.file);
        }
        let _first = lock(&self.first_writes);
        let (from, to) = (offset / CLUSTER, (offset + length).div_ceil(CLUSTER));
        if offset % CLUSTER != 0 {
            self.copy_up(image, from)?;
        }
        if (offset + length) % CLUSTER != 0 {
            self.copy_up(image, to - 1)?;
        }
        write(&self.file)?;
        (from..to).for_each(|cluster| self.mark(cluster));
        Ok(())
    }

    /// Copies a cluster from the image, unless it is in the overlay already.
    fn copy_up(&self, image: &File, cluster: u64) -> io::Result<()> {
        if self.is_written(cluster) {
            return Ok(());
        }
        let mut bytes = [0; CLUSTER_BYTES];
        let count = read_up_to(image, cluster * CLUSTER, &mut bytes)?;
        // The image was truncated. Zeros in place of the lost bytes would hide that.
        if (count as u64) < CLUSTER.min(self.len - cluster * CLUSTER) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.file.write_all_at(&bytes[..count], cluster * CLUSTER)?;
        self.mark(cluster);
        Ok(())
    }

    /// Whether the cluster at `offset` is in the overlay, and for how many of the `length` bytes
    /// from there the answer is the same.
    fn run(&self, offset: u64, length: u64) -> (bool, u64) {
        let first = offset / CLUSTER;
        let here = self.is_written(first);
        let mut next = first + 1;
        while next * CLUSTER < offset + length && self.is_written(next) == here {
            next += 1;
        }
        (here, length.min(next * CLUSTER - offset))
    }

    fn is_written(&self, cluster: u64) -> bool {
        let (word, bit) = place(cluster);
        let word = self.written.get(word);
        word.is_some_and(|word| word.load(Ordering::Acquire) & bit != 0)
    }

    fn mark(&self, cluster: u64) {
        let (word, bit) = place(cluster);
        if let Some(word) = self.written.get(word) {
            word.fetch_or(bit, Ordering::Release);
        }
    }
}

fn place(cluster: u64) -> (usize, u64) {
    let word = usize::try_from(cluster / 64).unwrap_or(usize::MAX);
    (word, 1 << (cluster % 64))
}

/// The default directory for overlays: $TMPDIR, or /var/tmp, or /tmp if there is no /var/tmp.
/// /var/tmp is preferred because it is on a disk, where /tmp may be in RAM.
pub(super) fn default_directory() -> PathBuf {
    let chosen = env::var_os("TMPDIR").filter(|path| !path.is_empty());
    let on_disk = Path::new("/var/tmp");
    match chosen {
        Some(path) => path.into(),
        None if on_disk.is_dir() => on_disk.into(),
        None => env::temp_dir(),
    }
}

/// Creates a file in `directory` that disappears when its last descriptor is closed.
fn temporary(directory: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match openat(CWD, directory, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        // Some file systems do not support files without a name.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => unlinked(directory),
        Err(errno) => Err(errno.into()),
    }
}

/// Like [`temporary`], but the file has a name for a moment.
fn unlinked(directory: &Path) -> io::Result<File> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let mut options = File::options();
    options.read(true).write(true).create_new(true).mode(0o600);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!(".rvmm-snapshot-{}-{number}", std::process::id());
        let path = directory.join(name);
        match options.open(&path) {
            // Left by a killed rvmm with the same process id, or made by one in another container.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            file => return file.and_then(|file| fs::remove_file(&path).map(|()| file)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overlay_leaves_no_name() {
        let directory = env::temp_dir().join(format!("rvmm-overlay-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        for file in [temporary(&directory), unlinked(&directory)] {
            file.unwrap().write_all_at(b"x", 9).unwrap();
            assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        }
        fs::remove_dir(&directory).unwrap();
        assert!(temporary(&directory).is_err(), "no other directory is used");
    }
}
