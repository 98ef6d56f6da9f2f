//! Sends packets: from the guest to the tap.

use std::io;
use std::os::fd::AsFd;

use super::Shared;
use super::tap::{HEADER, TapQueue};
use crate::memory::Pieces;
use crate::util::{RateLimit, guest_warn};
use crate::virtio::queue::{Broken, Virtq};
use crate::virtio::stop::Stop;

/// The largest packet that a tap takes: 64 KiB that are yet to be split into TCP segments, and
/// headers.
const PACKET_MAX: usize = 65_562 + HEADER;

impl Shared {
    /// Sends the packets in `queue` to `tap`. Each has `header` bytes of virtio header before it.
    pub(super) fn transmit(
        &self,
        tap: &TapQueue,
        header: usize,
        queue: &mut Virtq,
        stop: &Stop,
    ) -> Result<(), Broken> {
        queue.drain(stop, |chain| {
            self.send(tap, header, &chain.readable);
            Ok(0)
        })
    }

    /// Sends one packet. Drops it if the tap does not take it.
    fn send(&self, tap: &TapQueue, header: usize, packet: &Pieces) {
        if !(header..=PACKET_MAX).contains(&packet.len()) || self.link.is_gone() {
            return;
        }
        let Err(error) = packet.write_to(tap.as_fd()) else {
            return;
        };
        match error.raw_os_error() {
            // The tap's queue is full; or the header is invalid, which is the guest's own fault.
            Some(libc::EAGAIN | libc::EINTR | libc::EINVAL) => {}
            _ => self.failed(&error),
        }
    }

    /// Handles an error of the tap. If the tap was deleted, the link goes down for good. After
    /// other errors, only the packet is lost.
    pub(super) fn failed(&self, error: &io::Error) {
        match error.raw_os_error() {
            Some(libc::EBADFD | libc::ENODEV) => self.lose_link(error),
            _ => guest_warn!(self.failures, "{}: tap {}: {error}", self.name, self.tap),
        }
    }

    /// Sets the guest's link down, because the tap was deleted.
    pub(super) fn lose_link(&self, error: &io::Error) {
        if self.link.lose() {
            let (name, tap) = (&self.name, &self.tap);
            guest_warn!(
                RateLimit::named(format!("{name} link")),
                "{name}: tap {tap} is gone ({error}): the guest's link is down"
            );
        }
    }
}
