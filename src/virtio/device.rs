//! What a virtio device is to its transport, and a transport to its device.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};
use vmm_sys_util::eventfd::EventFd;

use super::queue::Virtq;
use super::worker::StopFor;
use crate::memory::GuestMemory;
use crate::util::{RateLimit, guest_warn};

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

/// A device's interrupts, as its transport makes them.
pub trait Interrupt: Send + Sync {
    /// Used buffers are in queue `index`.
    fn queue(&self, index: u16);

    /// The configuration, or DEVICE_NEEDS_RESET, changed.
    fn config(&self);

    /// A descriptor whose signals are [`Interrupt::queue`] without userspace, where there is such
    /// a way.
    fn queue_fd(&self, index: u16) -> Option<EventFd>;

    /// The driver resets the device, which has stopped: no cause of an interrupt is left.
    fn reset(&self);
}

/// State that a device's threads change while its driver reads it.
#[derive(Default)]
pub(super) struct Shared {
    /// VIRTIO_CONFIG_S_*.
    pub(super) status: AtomicU8,
    /// Changes with the configuration space.
    pub(super) generation: AtomicU32,
}

/// How a device that runs tells its driver that something went wrong or changed.
#[derive(Clone)]
pub struct Fault(Arc<Inner>);

struct Inner {
    name: String,
    shared: Arc<Shared>,
    interrupt: Arc<dyn Interrupt>,
    warnings: RateLimit,
}

impl Fault {
    pub(super) fn new(name: &str, shared: &Arc<Shared>, interrupt: Arc<dyn Interrupt>) -> Self {
        Self(Arc::new(Inner {
            name: name.to_owned(),
            shared: Arc::clone(shared),
            interrupt,
            warnings: RateLimit::named(format!("{name} needs a reset")),
        }))
    }

    /// The device cannot go on until its driver resets it (VIRTIO 1.2, section 2.1.1).
    pub fn needs_reset(&self, why: impl fmt::Display) {
        let Inner { name, .. } = self.0.as_ref();
        guest_warn!(self.0.warnings, "{name} needs a reset by its driver: {why}");
        let bit = NEEDS_RESET;
        let before = self.0.shared.status.fetch_or(bit, Ordering::AcqRel);
        // Told once until it is reset.
        if before & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK {
            self.0.interrupt.config();
        }
    }

    /// The configuration space has changed.
    pub fn config_changed(&self) {
        self.0.shared.generation.fetch_add(1, Ordering::AcqRel);
        self.0.interrupt.config();
    }

    pub(super) fn interrupt(&self) -> &Arc<dyn Interrupt> {
        &self.0.interrupt
    }
}

/// A bit of the status, which is a byte.
pub(super) const fn status_bit(bit: u32) -> u8 {
    bit.to_le_bytes()[0]
}

pub(super) const DRIVER_OK: u8 = status_bit(VIRTIO_CONFIG_S_DRIVER_OK);
pub(super) const NEEDS_RESET: u8 = status_bit(VIRTIO_CONFIG_S_NEEDS_RESET);

/// A flag of a ring or a descriptor, which has 16 bits.
pub(super) const fn word(bit: u32) -> u16 {
    let [low, high, ..] = bit.to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// A set of feature bits.
pub const fn features(bits: &[u32]) -> u64 {
    let (mut set, mut index) = (0, 0);
    while index < bits.len() {
        set |= 1 << bits[index];
        index += 1;
    }
    set
}

/// Reads `data` from a configuration space of these bytes; what is beyond them stays as it is.
pub fn read_bytes(space: &[u8], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = space.get(from..).unwrap_or_default();
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
}
