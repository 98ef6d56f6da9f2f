//! The interface between a virtio device and its transport.

use std::io;
use std::sync::Arc;

use super::notify::Fault;
use super::queue::Virtq;
use super::stop::StopFor;
use crate::memory::GuestMemory;
use crate::snapshot::{LoadError, Parts, SaveError, Saved};

/// A kind of virtio device (VIRTIO 1.2, chapter 5).
///
/// The methods about the type and the configuration space may be called at any time and on any
/// thread, even while the device starts or stops. They must not block. [`VirtioDevice::activate`],
/// [`VirtioDevice::stop`] and [`VirtioDevice::deactivate`] are called in this order, one at a time;
/// `activate` and `deactivate` on the devices thread.
pub trait VirtioDevice: Send + Sync {
    /// The device type, VIRTIO_ID_*.
    fn kind(&self) -> u32;

    /// The device's name for users, such as `disk0`.
    fn name(&self) -> &str;

    /// The features that this device offers. The transport adds those that every device has.
    fn features(&self) -> u64;

    /// The largest size of each virtqueue: powers of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads the configuration space at `offset`. `data` is zeroed by the caller; bytes beyond the
    /// end of the space stay zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space at `offset`. Most devices ignore this.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// Starts serving the queues.
    ///
    /// # Errors
    /// Fails if the host has no resources for this, or if the driver left out a queue that the
    /// device needs. The driver then finds DEVICE_NEEDS_RESET. A failed start leaves nothing
    /// behind.
    fn activate(&self, activation: Activation) -> io::Result<()>;

    /// Stops serving. When this returns, the device's threads have finished and no longer access
    /// guest RAM.
    ///
    /// For a pause, the device first completes every request that it has begun. The state that it
    /// needs to go on stays in the device or in its queues until the next
    /// [`VirtioDevice::activate`].
    ///
    /// Runs on the thread that asks for the stop. That is mostly a vCPU's thread, so this must
    /// neither create a thread nor open a file. It may wait for the host's disk; no other method
    /// may.
    fn stop(&self, why: StopFor);

    /// Undoes [`VirtioDevice::activate`], and returns the queues in their present state. Called
    /// after [`VirtioDevice::stop`], with the same `why`.
    fn deactivate(&self, why: StopFor) -> Vec<Virtq>;

    /// The state that the device has beside its registers and queues, which are the transport's.
    /// Called only while the device does not serve its queues: it is paused, or was never started.
    ///
    /// # Errors
    /// Fails if the host refuses to read a part of the state.
    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        Ok(Vec::new())
    }

    /// Takes over what [`VirtioDevice::save`] returned in another process. Called once at most,
    /// before the first [`VirtioDevice::activate`]. That call then has `resumes` set if the device
    /// was paused. [`VirtioDevice::features`] may change by this; the transport asks again.
    ///
    /// The state may come from a stranger: see [`Device::load`](crate::bus::Device::load).
    ///
    /// # Errors
    /// Fails if the state is not complete, or if this device cannot have it.
    fn load(&self, _parts: &mut Parts) -> Result<(), LoadError> {
        Ok(())
    }
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Guest RAM.
    pub ram: Arc<GuestMemory>,
    /// The features that device and driver agreed on.
    pub features: u64,
    /// The queues that the driver enabled, in ascending order. Some may be missing.
    pub queues: Vec<Virtq>,
    /// Reports later faults and configuration changes to the driver.
    pub fault: Fault,
    /// Whether the device goes on after a pause. Then these are the queues that it returned, and
    /// the features and the state that it keeps for its driver are unchanged. After a
    /// [`VirtioDevice::load`], queues and features are those of the device that was saved.
    pub resumes: bool,
}

impl Activation {
    /// Whether device and driver agreed on feature bit `bit`.
    pub fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }
}

/// Copies the bytes of `space` at `offset` to `data`. Bytes of `data` beyond the end of `space`
/// stay unchanged.
pub fn read_bytes(space: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = space.get(from..).unwrap_or_default();
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}
