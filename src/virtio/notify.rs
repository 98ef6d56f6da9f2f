//! How a device reaches its driver: by interrupts, and by the device status.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};
use vmm_sys_util::eventfd::EventFd;

use crate::util::{RateLimit, guest_warn};

/// A device's interrupts, as its transport raises them.
pub trait Interrupt: Send + Sync {
    /// Interrupts the driver: queue `index` has used buffers.
    fn queue(&self, index: u16);

    /// Interrupts the driver: the configuration space or DEVICE_NEEDS_RESET has changed.
    fn config(&self);

    /// Returns an eventfd that interrupts the driver like [`Interrupt::queue`], without userspace.
    /// `None` if only userspace can raise this interrupt.
    fn queue_fd(&self, index: u16) -> Option<EventFd>;

    /// Clears all pending interrupts. Called when the driver resets the device, after the device
    /// has stopped.
    fn reset(&self);
}

/// State that a device's threads change while its driver reads it.
#[derive(Default)]
pub(super) struct Shared {
    /// The device status, VIRTIO_CONFIG_S_*.
    pub(super) status: AtomicU8,
    /// Incremented with each change of the configuration space.
    pub(super) generation: AtomicU32,
}

/// Lets a running device report faults and configuration changes to its driver.
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

    /// Sets DEVICE_NEEDS_RESET and logs `why`: the device cannot go on until its driver resets it
    /// (VIRTIO 1.2, section 2.1.1).
    pub fn needs_reset(&self, why: impl fmt::Display) {
        let Inner { name, .. } = self.0.as_ref();
        guest_warn!(self.0.warnings, "{name} needs a reset by its driver: {why}");
        let bit = NEEDS_RESET;
        let before = self.0.shared.status.fetch_or(bit, Ordering::AcqRel);
        // Interrupts the driver only once until the next reset.
        if before & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK {
            self.0.interrupt.config();
        }
    }

    /// Interrupts the driver because the configuration space has changed.
    pub fn config_changed(&self) {
        self.0.shared.generation.fetch_add(1, Ordering::AcqRel);
        self.0.interrupt.config();
    }

    pub(super) fn interrupt(&self) -> &Arc<dyn Interrupt> {
        &self.0.interrupt
    }
}

/// Converts a status flag to 8 bits, the width of the status.
pub(super) const fn status_bit(bit: u32) -> u8 {
    bit.to_le_bytes()[0]
}

pub(super) const DRIVER_OK: u8 = status_bit(VIRTIO_CONFIG_S_DRIVER_OK);
pub(super) const NEEDS_RESET: u8 = status_bit(VIRTIO_CONFIG_S_NEEDS_RESET);
