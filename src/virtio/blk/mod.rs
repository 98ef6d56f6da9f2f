//! A disk: virtio-blk (VIRTIO 1.2, section 5.2).
//!
//! `request` parses requests and `image` is the disk's content. `serve` is the thread of each
//! queue, which connects the two; `execute` serves a single request. This file has the device's
//! registers.
//!
//! `image` uses: `file` for system calls on any file, `direct` for files past the page cache,
//! `overlay` for snapshots, `durable` for syncs and lost data, `lock` against other processes.

mod direct;
mod durable;
mod execute;
mod file;
mod format;
pub mod image;
mod lock;
mod overlay;
mod request;
mod serve;

use std::io;
use std::iter::zip;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use self::image::Image;
pub use self::overlay::{Overlay, SavedOverlay};
use self::request::{RANGE_MAX, RANGES_MAX, SECTOR, SECTOR_BYTES};
use super::bits::features;
use super::device::{Activation, VirtioDevice, read_bytes};
use super::queue::Virtq;
use super::stop::{Stop, StopFor};
use super::worker::{Worker, Workers};
use crate::snapshot::{LoadError, Parts, SaveError, Saved, State};
use crate::trace::Slot;
use crate::util::thread::Kind;
use crate::util::{ByteSize, RateLimit};

/// Entries of each queue. A request takes three descriptors, or one with an indirect table.
const QUEUE_SIZE: u16 = 256;
/// The most pieces of data in one request. Header and status take two more descriptors.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// The block size that file systems typically write.
const PHYSICAL_BLOCK: u32 = 4096;

/// A disk of the guest.
pub struct Disk {
    shared: Arc<Shared>,
    workers: Workers,
}

/// The state that the threads of all queues share.
struct Shared {
    name: String,
    image: Arc<Image>,
    queues: u16,
    /// Requests are recorded once this has a tracer.
    tracer: Slot,
    /// The name for traces.
    track: Arc<str>,
    /// Whether each write must be durable before its request ends.
    through: AtomicBool,
    failures: RateLimit,
}

impl Disk {
    /// Returns a disk with this `image`, and at least one queue.
    pub fn new(name: &str, image: Arc<Image>, queues: u16) -> Self {
        Self::traced(name, image, queues, Slot::default())
    }

    /// As [`Disk::new`]. Requests are recorded once `tracer` has a tracer.
    pub fn traced(name: &str, image: Arc<Image>, queues: u16, tracer: Slot) -> Self {
        Self {
            shared: Arc::new(Shared {
                name: name.to_owned(),
                image,
                queues: queues.max(1),
                tracer,
                track: name.into(),
                through: AtomicBool::new(false),
                failures: RateLimit::named(name),
            }),
            workers: Workers::default(),
        }
    }

    fn known(&self) -> SavedDisk {
        let image = &self.shared.image;
        SavedDisk {
            size: image.len(),
            block_size: image.block_size(),
            queues: self.shared.queues,
            read_only: image.is_read_only(),
        }
    }

    /// struct virtio_blk_config, up to the write-zeroes fields.
    fn config(&self) -> [u8; 60] {
        let image = &self.shared.image;
        let mut space = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(image.len() / SECTOR).to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &image.block_size().to_le_bytes());
        let blocks = (PHYSICAL_BLOCK / image.block_size()).max(1);
        put(24, &[blocks.ilog2().to_le_bytes()[0]]);
        put(34, &self.shared.queues.to_le_bytes());
        put(36, &RANGE_MAX.to_le_bytes());
        put(40, &RANGES_MAX.to_le_bytes());
        put(44, &(image.block_size() / SECTOR_BYTES).to_le_bytes());
        put(48, &RANGE_MAX.to_le_bytes());
        put(52, &RANGES_MAX.to_le_bytes());
        put(56, &[1]);
        space
    }
}

/// What a driver knows about its disk, so it has to be the same after a load. A disk has no other
/// state: its content is in the image, and in the overlay ([`Image::overlay`]).
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedDisk {
    /// In bytes.
    pub size: u64,
    /// In bytes.
    block_size: u32,
    queues: u16,
    read_only: bool,
}

impl State for SavedDisk {
    const KIND: &'static str = "virtio-blk";
    const VERSION: u32 = 1;
}

impl SavedDisk {
    /// Checks that `now` is the same disk.
    ///
    /// # Errors
    /// Fails if it is not, with the first difference.
    fn check(&self, now: &Self) -> Result<(), LoadError> {
        let facts = |disk: &Self| {
            let access = if disk.read_only {
                "read-only"
            } else {
                "writable"
            };
            [
                format!("has {} ({} bytes)", ByteSize(disk.size), disk.size),
                format!("has blocks of {} bytes", disk.block_size),
                format!("has {} queues", disk.queues),
                format!("is {access}"),
            ]
        };
        let mut facts = zip(facts(self), facts(now));
        match facts.find(|(there, here)| there != here) {
            Some((there, here)) => Err(LoadError::Unfit(format!(
                "it {there} in the snapshot, and {here} now"
            ))),
            None => Ok(()),
        }
    }
}

impl VirtioDevice for Disk {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> &str {
        &self.shared.name
    }

    fn features(&self) -> u64 {
        let image = &self.shared.image;
        let writes = if image.is_read_only() {
            features(&[VIRTIO_BLK_F_RO])
        } else {
            features(&[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES])
        };
        let flush = if image.has_write_cache() {
            features(&[VIRTIO_BLK_F_FLUSH])
        } else {
            0
        };
        let always = features(&[
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_MQ,
        ]);
        always | writes | flush
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.shared.queues.into()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn activate(&self, activation: Activation) -> io::Result<()> {
        // A driver that does not flush assumes that a completed write is durable.
        let through = self.shared.image.is_durable() && !activation.has(VIRTIO_BLK_F_FLUSH);
        self.shared.through.store(through, Ordering::Release);
        for queue in activation.queues {
            let shared = Arc::clone(&self.shared);
            let name = format!("{}.{}", self.shared.name, queue.index());
            let serve = move |queues: &mut [Virtq], stop: &Stop| shared.serve(&mut queues[0], stop);
            let worker = Worker::serve(Kind::Disk, &name, vec![queue], serve)
                .inspect_err(|_| drop(self.workers.take_back()))?;
            self.workers.add(worker);
        }
        Ok(())
    }

    fn stop(&self, why: StopFor) {
        self.workers.stop(why);
    }

    fn deactivate(&self, _: StopFor) -> Vec<Virtq> {
        self.workers.take_back()
    }

    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        Ok(vec![Saved::of(&self.known())?])
    }

    fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        parts.take::<SavedDisk>()?.check(&self.known())
    }
}

#[cfg(test)]
mod tests;
