//! How a device reaches its driver: interrupts, and the status that both see.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};
use vmm_sys_util::eventfd::EventFd;

use crate::util::{RateLimit, guest_warn};

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
