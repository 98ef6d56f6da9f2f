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
}

impl State for RamState {
    const KIND: &'static str = "ram";
    const VERSION: u32 = 1;
}

impl RamState {
    /// The state of RAM at `base` with `size` bytes and these checksums.
    pub fn new(base: u64, size: u64, sums: &Sums) -> Self {
        let bytes = sums.sums.iter().flatten();
        Self {
            base,
            size,
            chunk: sums.chunk,
            sums: Hex(bytes.flat_map(|half| half.to_le_bytes()).collect()),
        }
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
