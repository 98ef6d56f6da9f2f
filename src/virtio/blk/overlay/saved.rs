//! An overlay in a file of a snapshot.
//!
//! ```text
//! 0     the disk, of which only written clusters are there; the others are holes
//! end   one bit per cluster: whether it is written. Words of 64 bits, little-endian, the lowest
//!       bit first
//! ```
//!
//! `end` is the size of the disk in whole clusters.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{SeekFrom, copy_file_range, seek};
use rustix::io::{Errno, retry_on_intr};
use serde::{Deserialize, Serialize};

use super::super::file::read_up_to;
use super::{CLUSTER, Overlay};
use crate::snapshot::State;
use crate::util::sync::lock;

/// What is known of an overlay beside its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedOverlay {
    /// The size of the disk in bytes.
    pub size: u64,
    /// The number of clusters that the guest has written.
    pub clusters: u64,
}

impl State for SavedOverlay {
    const KIND: &'static str = "disk-overlay";
    const VERSION: u32 = 1;
}

impl SavedOverlay {
    /// Checks that `file` may be of this overlay: its size, and the number of its clusters.
    ///
    /// # Errors
    /// Fails if it is not, or if it cannot be read.
    pub fn check(&self, file: &File) -> io::Result<()> {
        let clusters = self.size.div_ceil(CLUSTER);
        let words = clusters.div_ceil(64);
        let end = clusters.saturating_mul(CLUSTER);
        let (wanted, found) = (end.saturating_add(words * WORD), file.metadata()?.len());
        if wanted != found {
            return Err(io::Error::other(format!(
                "the file has {found} bytes, and {wanted} are expected"
            )));
        }
        let (mut count, mut bytes) = (0u64, vec![0; WORDS * size_of::<u64>()]);
        let mut at = end;
        while at < wanted {
            let left = usize::try_from(wanted - at).unwrap_or(usize::MAX);
            let bytes = &mut bytes[..left.min(WORDS * size_of::<u64>())];
            file.read_exact_at(bytes, at)?;
            count += bytes
                .iter()
                .map(|byte| u64::from(byte.count_ones()))
                .sum::<u64>();
            at += bytes.len() as u64;
        }
        if count != self.clusters {
            let wanted = self.clusters;
            return Err(io::Error::other(format!(
                "the file has {count} clusters, and {wanted} are expected"
            )));
        }
        let mut last = [0; size_of::<u64>()];
        if clusters % 64 != 0 {
            file.read_exact_at(&mut last, wanted - WORD)?;
        }
        match u64::from_le_bytes(last) >> (clusters % 64) {
            0 => Ok(()),
            _ => Err(io::Error::other(
                "the file has a cluster behind the disk's end",
            )),
        }
    }
}

/// Bytes that the host copies at a time.
const STEP: usize = 1 << 30;
/// Bytes that are copied at a time where the host does not copy between files itself.
const CHUNK: usize = 1 << 20;
/// Words of bits that are read or written at a time.
const WORDS: usize = 4096;
/// Bytes of a word of bits.
const WORD: u64 = 8;

impl Overlay {
    /// Writes the clusters to `file`, in place of what it has. The disk must be paused. The file is
    /// sparse then, and has the size of the disk and a little more. Nothing is synced.
    ///
    /// # Errors
    /// Fails if the host cannot read the overlay or write the file.
    pub fn save_to(&self, file: &File) -> io::Result<SavedOverlay> {
        file.set_len(0)?;
        file.set_len(self.end() + self.bits_len())?;
        let mut clusters = 0;
        for run in self.runs() {
            clusters += run.end - run.start;
            copy(&self.file, file, self.bytes_of(&run))?;
        }
        for (index, words) in self.written.chunks(WORDS).enumerate() {
            let bytes = words.iter().flat_map(|word| value(word).to_le_bytes());
            let bytes: Vec<u8> = bytes.collect();
            file.write_all_at(&bytes, self.bits_at(index))?;
        }
        let size = self.len;
        Ok(SavedOverlay { size, clusters })
    }

    /// Takes over the clusters that [`Overlay::save_to`] wrote to `file`. The overlay must be new,
    /// and its disk must not have started. The file may come from a stranger.
    ///
    /// # Errors
    /// Fails if the file does not belong to `saved`, or if that is of a disk of another size. Also
    /// fails if the host cannot read the file or write the overlay. The overlay must be dropped
    /// then.
    pub fn load_from(&self, file: &File, saved: &SavedOverlay) -> io::Result<()> {
        if saved.size != self.len {
            let (there, here) = (saved.size, self.len);
            return Err(io::Error::other(format!(
                "the disk has {there} bytes in the snapshot, and {here} now"
            )));
        }
        let metadata = file.metadata()?;
        let (wanted, found) = (self.end() + self.bits_len(), metadata.len());
        if !metadata.is_file() || wanted != found {
            return Err(io::Error::other(format!(
                "the file has {found} bytes, and {wanted} are expected"
            )));
        }
        // Held as if all clusters were written for the first time.
        let _first = lock(&self.first_writes);
        self.load_bits(file)?;
        let runs = self.runs().map(|run| run.end - run.start);
        let found: u64 = runs.sum();
        if found != saved.clusters {
            let wanted = saved.clusters;
            return Err(io::Error::other(format!(
                "the file has {found} clusters, and {wanted} are expected"
            )));
        }
        self.runs()
            .try_for_each(|run| copy(file, &self.file, self.bytes_of(&run)))
    }

    fn load_bits(&self, file: &File) -> io::Result<()> {
        let mut bytes = vec![0; WORDS * size_of::<u64>()];
        for (index, words) in self.written.chunks(WORDS).enumerate() {
            let bytes = &mut bytes[..size_of_val(words)];
            file.read_exact_at(bytes, self.bits_at(index))?;
            for (word, bytes) in words.iter().zip(bytes.chunks_exact(size_of::<u64>())) {
                let bytes = bytes.try_into().map_err(io::Error::other)?;
                word.store(u64::from_le_bytes(bytes), Ordering::Release);
            }
        }
        let spare = (self.clusters()..self.written.len() as u64 * 64).find(|n| self.is_written(*n));
        match spare {
            Some(cluster) => Err(io::Error::other(format!(
                "the file has cluster {cluster}, which is behind the disk's end"
            ))),
            None => Ok(()),
        }
    }

    /// The number of clusters of the disk.
    fn clusters(&self) -> u64 {
        self.len.div_ceil(CLUSTER)
    }

    /// Where the bits begin in a snapshot's file.
    fn end(&self) -> u64 {
        self.clusters() * CLUSTER
    }

    /// The length of the bits in bytes.
    fn bits_len(&self) -> u64 {
        self.written.len() as u64 * WORD
    }

    /// Where chunk `index` of the bits is in a snapshot's file.
    fn bits_at(&self, index: usize) -> u64 {
        self.end() + (index * WORDS) as u64 * WORD
    }

    /// The runs of written clusters, in ascending order.
    fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = self.next(next, true)?;
            let end = self.next(start, false).unwrap_or_else(|| self.clusters());
            next = end;
            Some(start..end)
        })
    }

    /// The first cluster from `from` on that is written, or is not.
    fn next(&self, from: u64, written: bool) -> Option<u64> {
        let (first, all) = (usize::try_from(from / 64).ok()?, self.clusters());
        for (index, word) in self.written.iter().enumerate().skip(first) {
            let mut word = if written { value(word) } else { !value(word) };
            if index == first {
                word &= u64::MAX << (from % 64);
            }
            if word != 0 {
                let found = index as u64 * 64 + u64::from(word.trailing_zeros());
                return (found < all).then_some(found);
            }
        }
        None
    }

    /// The bytes of a run of clusters. The last cluster of the disk may be incomplete.
    fn bytes_of(&self, run: &Range<u64>) -> Range<u64> {
        run.start * CLUSTER..(run.end * CLUSTER).min(self.len)
    }
}

fn value(word: &AtomicU64) -> u64 {
    word.load(Ordering::Acquire)
}

/// Copies `bytes` from one file to the same place in another, which has only zeros there. Skips
/// holes, so that a sparse file stays one.
///
/// # Errors
/// Fails if the host cannot read or write a file, or if `from` ends before.
fn copy(from: &File, to: &File, bytes: Range<u64>) -> io::Result<()> {
    let mut at = bytes.start;
    while at < bytes.end {
        let (start, end) = match seek(from, SeekFrom::Data(at)) {
            Ok(start) if start < bytes.end => {
                let hole = seek(from, SeekFrom::Hole(start))?;
                (start, hole.min(bytes.end))
            }
            // There are only holes up to the end of the file.
            Ok(_) | Err(Errno::NXIO) => return Ok(()),
            // The file system does not know its holes.
            Err(_) => (at, bytes.end),
        };
        copy_data(from, to, start..end)?;
        at = end;
    }
    Ok(())
}

/// As [`copy`], for data without holes. The host does it if it can, without reading the data here,
/// and perhaps without a copy on its disk.
fn copy_data(from: &File, to: &File, bytes: Range<u64>) -> io::Result<()> {
    let mut at = bytes.start;
    while at < bytes.end {
        let (mut read, mut write) = (at, at);
        let most = usize::try_from(bytes.end - at).map_or(STEP, |left| left.min(STEP));
        let call = || copy_file_range(from, Some(&mut read), to, Some(&mut write), most);
        match retry_on_intr(call) {
            // Some file systems copy nothing, others refuse.
            Ok(0) => return copy_here(from, to, at..bytes.end),
            Ok(count) => at += count as u64,
            Err(errno) if is_to_copy_here(errno) => return copy_here(from, to, at..bytes.end),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Whether the host does not copy between these files, such as of two file systems.
fn is_to_copy_here(errno: Errno) -> bool {
    let refusals = [
        Errno::XDEV,
        Errno::OPNOTSUPP,
        Errno::NOSYS,
        Errno::INVAL,
        Errno::PERM,
    ];
    refusals.contains(&errno)
}

/// Reads the data, and writes it.
fn copy_here(from: &File, to: &File, bytes: Range<u64>) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut at = bytes.start;
    while at < bytes.end {
        let most = usize::try_from(bytes.end - at).map_or(CHUNK, |left| left.min(CHUNK));
        let chunk = &mut buffer[..most];
        if read_up_to(from, at, chunk)? < most {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        to.write_all_at(chunk, at)?;
        at += most as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    fn file(len: u64) -> File {
        let file: File = memfd_create("copy", MemfdFlags::CLOEXEC).unwrap().into();
        file.set_len(len).unwrap();
        file
    }

    fn bytes(file: &File, range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap()];
        file.read_exact_at(&mut bytes, range.start).unwrap();
        bytes
    }

    /// Both ways to copy do the same. Holes stay holes.
    #[test]
    fn a_copy_is_the_same() {
        const LEN: u64 = 3 << 20;
        let from = file(LEN);
        let content: Vec<u8> = (0..1_500_000u32).map(|n| n.to_le_bytes()[1]).collect();
        from.write_all_at(&content, 1 << 20).unwrap();
        for copy in [copy, copy_data, copy_here] {
            let to = file(LEN);
            let range = 4096..LEN - 512;
            copy(&from, &to, range.clone()).unwrap();
            assert!(bytes(&to, range.clone()) == bytes(&from, range));
            assert_eq!(bytes(&to, LEN - 512..LEN), [0; 512]);
        }
        let to = file(LEN);
        copy(&from, &to, 0..LEN).unwrap();
        let start = seek(&to, SeekFrom::Data(0)).unwrap();
        assert_eq!(start, 1 << 20, "the hole was copied");
    }

    #[test]
    fn a_file_that_ends_before_is_an_error() {
        let (from, to) = (file(4096), file(1 << 20));
        for copy in [copy_data, copy_here] {
            let error = copy(&from, &to, 0..8192).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
