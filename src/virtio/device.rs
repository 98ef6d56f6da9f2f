//! What a virtio device is to its transport, and a transport to its device.

use std::io;
use std::sync::Arc;

use super::notify::Fault;
use super::queue::Virtq;
use super::stop::StopFor;
use crate::memory::GuestMemory;

/// A kind of virtio device (VIRTIO 1.2, chapter 5).
///
/// What is asked of its type and its configuration space may come at any time, on any thread, also while
/// it starts or stops: nothing of that waits. [`VirtioDevice::activate`], [`VirtioDevice::stop`] and
/// [`VirtioDevice::deactivate`] come one at a time, in turns, the first and the last on the devices thread.
pub trait VirtioDevice: Send + Sync {
    /// The device's type: VIRTIO_ID_*.
    fn kind(&self) -> u32;

    /// What people call this one: `disk0`.
    fn name(&self) -> &str;

    /// Features of this type that are offered. The transport adds what every device has.
    fn features(&self) -> u64;

    /// The largest size of each virtqueue, a power of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads the configuration space at `offset`. `data` is zeroed; beyond the end it stays so.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes it. Most have nothing to write.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// Starts serving.
    ///
    /// # Errors
    /// The host has no resources for it: the driver finds DEVICE_NEEDS_RESET. Nothing is left of the
    /// start then.
    fn activate(&self, activation: Activation) -> io::Result<()>;

    /// Stops serving, and returns when what was begun has ended: the device's threads make no access any
    /// more. For a pause, all that was begun is finished, and what the device has to know to go on stays
    /// in it or in its queues, until the next [`VirtioDevice::activate`]. On the thread of who wants that, a vCPU's mostly, which may neither make a thread nor open
    /// a file. This alone may wait for the host's disk.
    fn stop(&self, why: StopFor);

    /// After [`VirtioDevice::stop`]: takes apart what [`VirtioDevice::activate`] has made, and gives the
    /// queues back as they are then, for the same reason.
    fn deactivate(&self, why: StopFor) -> Vec<Virtq>;
}

/// What a device is given when its driver is ready.
pub struct Activation {
    /// Guest RAM.
    pub ram: Arc<GuestMemory>,
    /// The features that both sides agreed on.
    pub features: u64,
    /// The queues that the driver enabled, in order; some may be missing.
    pub queues: Vec<Virtq>,
    /// For what goes wrong later.
    pub fault: Fault,
    /// The device goes on after a pause: the queues are those that it gave back, features are as before,
    /// and what it did for its driver still holds.
    pub resumes: bool,
}

impl Activation {
    /// Whether feature bit `bit` was agreed on.
    pub fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }
}

/// Reads `data` from a configuration space of these bytes; what is beyond them stays as it is.
pub fn read_bytes(space: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = space.get(from..).unwrap_or_default();
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}
