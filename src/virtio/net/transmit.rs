//! From the guest to the tap.

use std::io;
use std::os::fd::AsFd;

use super::Shared;
use super::tap::{HEADER, TapQueue};
use crate::memory::Pieces;
use crate::util::{RateLimit, guest_warn};
use crate::virtio::queue::{Broken, Virtq};
use crate::virtio::stop::Stop;

/// The largest packet a tap takes: 64 KiB of segments to come, and headers.
const PACKET_MAX: usize = 65_562 + HEADER;

impl Shared {
    /// Sends what `queue` has to `tap`: packets with so many bytes of header before each.
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

    /// Sends one packet, or drops it, as a wire does.
    fn send(&self, tap: &TapQueue, header: usize, packet: &Pieces) {
        if !(header..=PACKET_MAX).contains(&packet.len()) || self.link.is_gone() {
            return;
        }
        let Err(error) = packet.write_to(tap.as_fd()) else {
            return;
        };
        match error.raw_os_error() {
            // The tap's queue is full; or a header that no packet has, which is the guest's own loss.
            Some(libc::EAGAIN | libc::EINTR | libc::EINVAL) => {}
            _ => self.failed(&error),
        }
    }

    /// What a tap says when it is no more is final; all else may pass, with the loss of a packet.
    pub(super) fn failed(&self, error: &io::Error) {
        match error.raw_os_error() {
            Some(libc::EBADFD | libc::ENODEV) => self.lose_link(error),
            _ => guest_warn!(self.failures, "{}: tap {}: {error}", self.name, self.tap),
        }
    }

    /// The tap has gone: the guest finds its link down.
    pub(super) fn lose_link(&self, error: &io::Error) {
        if self.link.lose() {
            let (name, tap) = (&self.name, &self.tap);
            guest_warn!(
                RateLimit::named(format!("{name} link")),
                "{name}: tap {tap} has gone ({error}): the guest's link is down"
            );
        }
    }
}
