//! A live virtqueue from the device's side: takes descriptor chains, returns used buffers, and
//! interrupts the driver once per batch.
//!
//! Implements split virtqueues (VIRTIO 1.2, section 2.7). The crate virtio-queue reads the
//! descriptors and the driver's ring.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::notify::{Fault, Interrupt};
use super::stop::Stop;
use super::used::UsedRing;
use crate::memory::{FlatRam, GuestMemory, Pieces};

/// A queue that the device cannot go on with, mostly through its driver's fault. The device needs a
/// reset.
#[derive(Debug, Error)]
#[error("queue {queue}: {how}")]
pub struct Broken {
    queue: u16,
    how: How,
}

/// How a queue broke. A number is that of the descriptor chain.
#[derive(Debug, Error)]
enum How {
    /// The rings are invalid.
    #[error("{0}")]
    Ring(virtio_queue::Error),
    /// A chain loops, leaves its table, nests indirect tables, is longer than 4 GiB, or has more
    /// than 1024 descriptors.
    #[error("descriptor chain {0} is malformed or too long")]
    Chain(u16),
    /// A buffer is not, or not wholly, in RAM.
    #[error("descriptor chain {0} has a buffer outside RAM")]
    NotRam(u16),
    /// The chain is not a request that the device knows.
    #[error("descriptor chain {0} is not a valid request")]
    NoRequest(u16),
    /// A device-readable buffer follows a device-writable one.
    #[error("descriptor chain {0} has a readable buffer after a writable one")]
    Order(u16),
    /// The host refused something that the device needs.
    #[error("{0}")]
    Host(String),
}

/// The most descriptors of one chain. QEMU has the same limit. Drivers use fewer, and one system
/// call (IOV_MAX) takes no more.
const DESCRIPTORS_MAX: usize = 1024;

/// A request: buffers that the device may read, then buffers that it may write. [`Virtq::push`]
/// returns it to the driver.
#[derive(Debug)]
pub struct Chain {
    /// The index of its first descriptor.
    pub head: u16,
    /// The bytes from the driver.
    pub readable: Pieces,
    /// Room for the bytes from the device.
    pub writable: Pieces,
}

impl fmt::Debug for Pieces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

/// How far a queue was served. Any values are safe: with wrong ones, the queue breaks, or its
/// driver finds used buffers where it expects none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// The available ring's index of the next request.
    pub next_available: u16,
    /// The used ring's index of the next used buffer.
    pub next_used: u16,
    /// Whether the queue must not be served: see [`Virtq::is_broken`].
    pub broken: bool,
}

/// One virtqueue of a running device. The thread that serves the queue owns it.
pub struct Virtq {
    index: u16,
    queue: Queue,
    used: UsedRing,
    ram: Arc<FlatRam>,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    fault: Fault,
    /// There are used buffers that the driver was not notified of.
    unnotified: bool,
    /// The device needs a reset, because this queue broke or another one that the same thread
    /// serves.
    broken: bool,
}

impl Virtq {
    pub(super) fn new(
        index: u16,
        queue: Queue,
        ram: &Arc<GuestMemory>,
        kick: &Arc<EventFd>,
        fault: &Fault,
    ) -> Self {
        Self {
            index,
            used: UsedRing::of(&queue),
            queue,
            ram: FlatRam::of(ram),
            kick: Arc::clone(kick),
            interrupt: Arc::clone(fault.interrupt()),
            fault: fault.clone(),
            unnotified: false,
            broken: false,
        }
    }

    /// The queue's number within the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The number of entries. No more requests than that can be in flight.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The eventfd that the driver's notifications signal. A request to stop the device's thread
    /// signals it too.
    pub fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// The rings' addresses and size, for the kernel (vhost) to serve.
    pub fn ring(&self) -> &Queue {
        &self.queue
    }

    /// Sets the queue's position after the kernel has served it: `next` is the available ring's
    /// index of the next request. The kernel must have returned all requests before that one. Reads
    /// the used ring's index from RAM.
    pub fn set_next_avail(&mut self, next: u16) {
        self.queue.set_next_avail(next);
        // Cannot fail: the ring was in RAM when the queue went live, and still is.
        let _ = self.used.follow(&self.ram);
    }

    /// How far the queue was served. All used buffers must have been notified of.
    pub(super) fn position(&self) -> Position {
        Position {
            next_available: self.queue.next_avail(),
            next_used: self.used.position(),
            broken: self.broken,
        }
    }

    /// Goes on at `position`. The queue must be new.
    pub(super) fn go_to(&mut self, position: Position) {
        self.queue.set_next_avail(position.next_available);
        self.used.go_to(position.next_used);
        self.broken = position.broken;
    }

    /// Returns a function that interrupts the driver, for a thread that does not own the queue.
    pub fn interrupter(&self) -> impl Fn() + Send + use<> {
        let (interrupt, index) = (Arc::clone(&self.interrupt), self.index);
        move || interrupt.queue(index)
    }

    /// Returns an eventfd that interrupts the driver for this queue, for the kernel to signal.
    /// `None` if only userspace can raise the interrupt.
    pub fn interrupt_fd(&self) -> Option<EventFd> {
        self.interrupt.queue_fd(self.index)
    }

    /// Returns an empty list, to which the buffers of several requests can be appended.
    pub fn no_pieces(&self) -> Pieces {
        Pieces::of(&self.ram)
    }

    /// Takes the next request from the available ring. `None` if there is none.
    ///
    /// # Errors
    /// Fails if the available ring or the chain is invalid.
    pub fn pop(&mut self) -> Result<Option<Chain>, Broken> {
        let broken = broken(self.index);
        let chains = self.queue.iter(self.ram.as_ref());
        let mut chains = chains.map_err(|error| broken(How::Ring(error)))?;
        let Some(chain) = chains.next() else {
            return Ok(None);
        };
        let head = chain.head_index();
        let mut request = Chain {
            head,
            readable: Pieces::of(&self.ram),
            writable: Pieces::of(&self.ram),
        };
        // The iterator also ends at an invalid descriptor. The chain is complete only if its last
        // descriptor has no successor.
        let mut whole = false;
        for (number, descriptor) in chain.enumerate() {
            if number == DESCRIPTORS_MAX {
                return Err(broken(How::Chain(head)));
            }
            whole = !descriptor.has_next();
            let pieces = if descriptor.is_write_only() {
                &mut request.writable
            } else if request.writable.is_empty() {
                &mut request.readable
            } else {
                return Err(broken(How::Order(head)));
            };
            pieces
                .push(descriptor.addr(), descriptor.len() as usize)
                .map_err(|_| broken(How::NotRam(head)))?;
        }
        if whole {
            Ok(Some(request))
        } else {
            Err(broken(How::Chain(head)))
        }
    }

    /// Puts the last request from [`Virtq::pop`] back; the next `pop` returns it again. Several
    /// requests can be put back, the last one first.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a request to the driver through the used ring. `written` is the number of bytes that
    /// were written from the start of its writable part. Does not interrupt the driver: see
    /// [`Virtq::notify`].
    ///
    /// # Errors
    /// Fails if the used ring cannot be accessed.
    pub fn push(&mut self, head: u16, written: usize) -> Result<(), Broken> {
        self.push_together([(head, written)])
    }

    /// Like [`Virtq::push`] for several requests that must become visible to the driver at once,
    /// such as the buffers of one packet (section 5.1.6.4). There must be no more of them than the
    /// queue has entries.
    ///
    /// # Errors
    /// Fails if the used ring cannot be accessed.
    pub fn push_together(
        &mut self,
        requests: impl IntoIterator<Item = (u16, usize)>,
    ) -> Result<(), Broken> {
        let mut count = 0;
        for (head, written) in requests {
            let written = u32::try_from(written).unwrap_or(u32::MAX);
            let pushed = self.used.write(&self.ram, count, head, written);
            pushed.map_err(self.ring_broken())?;
            count += 1;
        }
        if count == 0 {
            return Ok(());
        }
        let shown = self.used.show(&self.ram, count);
        shown.map_err(self.ring_broken())?;
        self.unnotified = true;
        Ok(())
    }

    /// Sends a used buffer notification (an interrupt) if there are used buffers since the last
    /// call and the driver wants one.
    ///
    /// # Errors
    /// Fails if the available ring cannot be accessed.
    pub fn notify(&mut self) -> Result<(), Broken> {
        if !std::mem::take(&mut self.unnotified) {
            return Ok(());
        }
        let wanted = self.used.wants_interrupt(&self.ram);
        if wanted.map_err(self.ring_broken())? {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }

    /// Asks the driver to send an available buffer notification for its next request. True if there
    /// is a request already, for which the driver may not have sent a notification.
    ///
    /// # Errors
    /// Fails if the rings cannot be accessed.
    pub fn enable_notifications(&mut self) -> Result<bool, Broken> {
        let more = self.queue.enable_notification(self.ram.as_ref());
        more.map_err(self.ring_broken())
    }

    /// Asks the driver not to send notifications. It may still send them.
    ///
    /// # Errors
    /// Fails if the used ring cannot be accessed.
    pub fn disable_notifications(&mut self) -> Result<(), Broken> {
        let muted = self.queue.disable_notification(self.ram.as_ref());
        muted.map_err(self.ring_broken())
    }

    /// Serves all available requests with `serve`, which returns the number of bytes it wrote.
    /// Notifies the driver once for the requests served together.
    ///
    /// Returns early when `stop` asks for it. Also returns after as many requests as the queue has
    /// entries, so that the caller can do other work. It then signals the kick, so the caller comes
    /// back.
    ///
    /// # Errors
    /// Fails if the rings or a chain are invalid, or if `serve` fails.
    pub fn drain(
        &mut self,
        stop: &Stop,
        mut serve: impl FnMut(Chain) -> Result<usize, Broken>,
    ) -> Result<(), Broken> {
        let mut left = self.size();
        loop {
            self.disable_notifications()?;
            while !stop.is_asked() {
                let Some(chain) = self.pop()? else { break };
                let head = chain.head;
                let written = serve(chain)?;
                self.push(head, written)?;
                left = left.saturating_sub(1);
                if left == 0 {
                    self.notify()?;
                    self.kick_again();
                    return Ok(());
                }
            }
            self.notify()?;
            if stop.is_asked() || !self.enable_notifications()? {
                return Ok(());
            }
        }
    }

    /// Signals the kick, because there is work left.
    pub fn kick_again(&self) {
        // Fails only with 2^64 signals pending.
        let _ = self.kick.write(1);
    }

    /// Sets DEVICE_NEEDS_RESET because of `why`.
    pub fn needs_reset(&mut self, why: &Broken) {
        self.broken = true;
        self.fault.needs_reset(why);
    }

    /// Whether [`Virtq::needs_reset`] was called. Such a queue must not be served.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The error for a chain that is not a request of this device.
    pub fn no_request(&self, head: u16) -> Broken {
        broken(self.index)(How::NoRequest(head))
    }

    /// The error for something that the device needs and the host refused.
    pub fn refused(&self, why: impl fmt::Display) -> Broken {
        broken(self.index)(How::Host(why.to_string()))
    }

    /// Every value of the used ring's index so far.
    #[cfg(test)]
    pub(super) fn shown(&self) -> &[u16] {
        &self.used.shown
    }

    fn ring_broken(&self) -> impl FnOnce(virtio_queue::Error) -> Broken + use<> {
        let queue = self.index;
        move |error| broken(queue)(How::Ring(error))
    }
}

fn broken(queue: u16) -> impl Fn(How) -> Broken {
    move |how| Broken { queue, how }
}
