//! The first section of a snapshot: which machine it is of, and how to make that machine again.

use serde::{Deserialize, Serialize};

use super::State;
use crate::config::VmConfig;
use crate::memory::image::Sums;
use crate::util::Hex;

/// The name of the part that the sections of the whole machine belong to.
pub const MACHINE: &str = "machine";

/// Which machine the snapshot is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The version of rvmm that wrote it.
    pub rvmm: String,
    /// The kernel release of the host.
    pub host_kernel: String,
    /// A random number for this snapshot, 16 bytes.
    pub id: Hex,
    /// When the guest was frozen: nanoseconds since 1970, by the host's clock.
    pub taken_ns: u64,
    /// The id of the snapshot that this one has the changes since. None if it has everything.
    pub parent: Option<Hex>,
    /// The configuration. Paths are absolute, and what rvmm has chosen by itself is filled in.
    pub config: VmConfig,
}

impl State for Header {
    const KIND: &'static str = "machine";
    const VERSION: u32 = 1;
}

/// The guest's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimeState {
    /// The value of the `time` CSR.
    pub time: u64,
    /// Its frequency in Hz.
    pub frequency: u64,
}

impl State for TimeState {
    const KIND: &'static str = "time";
    const VERSION: u32 = 1;
}

/// Guest RAM, which is in the file `memory`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RamState {
    /// The guest-physical address of its first byte.
    pub base: u64,
    /// Its size in bytes, which is the size of the file.
    pub size: u64,
    /// The number of bytes that each checksum is of.
    pub chunk: u64,
    /// The checksums, 16 bytes for each chunk: see [`Sums`].
    pub sums: Hex,
    /// If the file has only the pages that were changed since the parent: one bit for each page of
    /// RAM. Bit 0 of the first byte is the first page.
    pub changed: Option<Hex>,
}

impl State for RamState {
    const KIND: &'static str = "ram";
    const VERSION: u32 = 2;
}

impl RamState {
    /// The state of RAM at `base` with `size` bytes, still without checksums.
    pub fn unsummed(base: u64, size: u64) -> Self {
        Self {
            base,
            size,
            chunk: 0,
            sums: Hex::default(),
            changed: None,
        }
    }

    /// The state of RAM at `base` with `size` bytes and these checksums.
    pub fn new(base: u64, size: u64, sums: &Sums) -> Self {
        let mut state = Self::unsummed(base, size);
        state.set_sums(sums);
        state
    }

    /// Sets the checksums.
    pub fn set_sums(&mut self, sums: &Sums) {
        let bytes = sums.sums.iter().flatten();
        self.chunk = sums.chunk;
        self.sums = Hex(bytes.flat_map(|half| half.to_le_bytes()).collect());
    }

    /// Whether there are checksums.
    pub fn is_summed(&self) -> bool {
        self.chunk != 0
    }

    /// The same, of which the file has only the pages that are marked in `pages`, as
    /// [`pages_of`](crate::memory::pages_of) counts them.
    #[must_use]
    pub fn with_changes(mut self, pages: &[u64]) -> Self {
        let bytes = pages.iter().flat_map(|word| word.to_le_bytes());
        self.changed = Some(Hex(bytes.collect()));
        self
    }

    /// The pages that the file has, if it has only the changed ones.
    pub fn changes(&self) -> Option<Vec<u64>> {
        let word = |bytes: &[u8]| {
            let mut all = [0; 8];
            all[..bytes.len()].copy_from_slice(bytes);
            u64::from_le_bytes(all)
        };
        let bytes = &self.changed.as_ref()?.0;
        Some(bytes.chunks(8).map(word).collect())
    }

    /// The offsets in RAM of the chunks whose checksum in `sums` is another one.
    pub fn differing(&self, sums: &Sums) -> Vec<u64> {
        let other = Self::new(self.base, self.size, sums);
        let ours = self.sums.0.chunks(16);
        let theirs = other.sums.0.chunks(16);
        if self.chunk != other.chunk || ours.len() != theirs.len() {
            return vec![0];
        }
        let both = (0u64..).zip(ours.zip(theirs));
        let differing = both.filter(|(_, (ours, theirs))| ours != theirs);
        differing.map(|(index, _)| index * self.chunk).collect()
    }
}
