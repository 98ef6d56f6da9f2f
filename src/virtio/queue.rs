//! A live virtqueue, as a device sees it: chains out, used buffers in, one interrupt for a batch.
//!
//! Split virtqueues of Virtual I/O Device (VIRTIO) 1.2, section 2.7; the descriptors and the driver's ring
//! are read by the crate virtio-queue.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::notify::{Fault, Interrupt};
use super::stop::Stop;
use super::used::UsedRing;
use crate::memory::{FlatRam, GuestMemory, Pieces};

/// There is no way to go on with a queue, mostly by its driver's fault: the device needs a reset.
#[derive(Debug, Error)]
#[error("queue {queue}: {how}")]
pub struct Broken {
    queue: u16,
    how: How,
}

/// How a queue was broken; by the number of a descriptor chain, mostly.
#[derive(Debug, Error)]
enum How {
    /// The rings themselves.
    #[error("{0}")]
    Ring(virtio_queue::Error),
    /// A chain that loops, leaves its table, nests indirect tables, is longer than 4 GiB, or has more
    /// than 1024 descriptors.
    #[error("descriptor chain {0} has no end")]
    Chain(u16),
    /// A buffer, wholly or in part.
    #[error("descriptor chain {0} names what is not RAM")]
    NotRam(u16),
    /// No request of the device's.
    #[error("descriptor chain {0} is no request")]
    NoRequest(u16),
    /// A device-readable buffer behind a device-writable one.
    #[error("descriptor chain {0} is out of order")]
    Order(u16),
    /// The host refused what the device cannot do without.
    #[error("{0}")]
    Host(String),
}

/// Descriptors of one chain, as QEMU has it too: more than drivers use, and what one call of the host's
/// takes.
const DESCRIPTORS_MAX: usize = 1024;

/// A request: what the device may read, then what it may write. Give it back with [`Virtq::push`].
#[derive(Debug)]
pub struct Chain {
    /// Its number in the descriptor table.
    pub head: u16,
    /// The driver's bytes.
    pub readable: Pieces,
    /// Room for the device's.
    pub writable: Pieces,
}

impl fmt::Debug for Pieces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

/// One virtqueue of a running device. It belongs to the thread that serves it.
pub struct Virtq {
    index: u16,
    queue: Queue,
    used: UsedRing,
    ram: Arc<FlatRam>,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    fault: Fault,
    /// Used buffers that the driver was not told of.
    untold: bool,
    /// The device was given up for what is wrong with this queue, or with another that its thread serves.
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
            untold: false,
            broken: false,
        }
    }

    /// Its number among the device's queues.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Its entries: no more requests can be on their way.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Signalled by the driver's notifications, and to stop whoever waits for them.
    pub fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }

    /// The ring, for what serves it in the kernel.
    pub fn ring(&self) -> &Queue {
        &self.queue
    }

    /// What served the ring in the kernel has taken its requests up to `next` (an index of the
    /// available ring), and returned all that it took.
    pub fn took_until(&mut self, next: u16) {
        self.queue.set_next_avail(next);
        // Its ring was in RAM when the queue went live, and still is.
        let _ = self.used.follow(&self.ram);
    }

    /// How to interrupt the driver, for who does not own the queue.
    pub fn interrupter(&self) -> impl Fn() + Send + use<> {
        let (interrupt, index) = (Arc::clone(&self.interrupt), self.index);
        move || interrupt.queue(index)
    }

    /// The interrupt of this queue, for what serves it in the kernel: none where only userspace can
    /// make it.
    pub fn interrupt_fd(&self) -> Option<EventFd> {
        self.interrupt.queue_fd(self.index)
    }

    /// For buffers of several requests.
    pub fn no_pieces(&self) -> Pieces {
        Pieces::of(&self.ram)
    }

    /// The next request.
    ///
    /// # Errors
    /// The driver broke the queue.
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
        // The iterator just ends where a chain goes wrong: only a chain whose last descriptor says
        // so is whole.
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

    /// Puts back the request that [`Virtq::pop`] gave last, to be given again. Several can be put back,
    /// the last one first.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a request, with the number of bytes that were written from the start of its writable
    /// part. [`Virtq::tell`] lets the driver know.
    ///
    /// # Errors
    /// The driver broke the queue.
    pub fn push(&mut self, head: u16, written: usize) -> Result<(), Broken> {
        self.push_together([(head, written)])
    }

    /// The same for several requests that the driver has to find together, as the buffers of one packet
    /// (section 5.1.6.4). They are at most as many as the queue has entries.
    ///
    /// # Errors
    /// The driver broke the queue.
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
        self.untold = true;
        Ok(())
    }

    /// Interrupts the driver for all that was pushed since the last time, if it wants that.
    ///
    /// # Errors
    /// The driver broke the queue.
    pub fn tell(&mut self) -> Result<(), Broken> {
        if !std::mem::take(&mut self.untold) {
            return Ok(());
        }
        let wanted = self.used.wants_interrupt(&self.ram);
        if wanted.map_err(self.ring_broken())? {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }

    /// Asks the driver for a notification of its next request. True when one came already, and
    /// perhaps without a notification.
    ///
    /// # Errors
    /// The driver broke the queue.
    pub fn ask_for_kick(&mut self) -> Result<bool, Broken> {
        let more = self.queue.enable_notification(self.ram.as_ref());
        more.map_err(self.ring_broken())
    }

    /// Tells the driver that nobody needs notifications now; it may still send them.
    ///
    /// # Errors
    /// The driver broke the queue.
    pub fn mute_kicks(&mut self) -> Result<(), Broken> {
        let muted = self.queue.disable_notification(self.ram.as_ref());
        muted.map_err(self.ring_broken())
    }

    /// Serves every request there is with `serve`, which gives back how much it wrote; tells the
    /// driver once. Ends early when `stop` is asked, and after as many requests as the queue has entries,
    /// with another kick to come: its caller may have other work.
    ///
    /// # Errors
    /// The driver broke the queue.
    pub fn drain(
        &mut self,
        stop: &Stop,
        mut serve: impl FnMut(Chain) -> Result<usize, Broken>,
    ) -> Result<(), Broken> {
        let mut left = self.size();
        loop {
            self.mute_kicks()?;
            while !stop.is_asked() {
                let Some(chain) = self.pop()? else { break };
                let head = chain.head;
                let written = serve(chain)?;
                self.push(head, written)?;
                left = left.saturating_sub(1);
                if left == 0 {
                    self.tell()?;
                    self.kick_again();
                    return Ok(());
                }
            }
            self.tell()?;
            if stop.is_asked() || !self.ask_for_kick()? {
                return Ok(());
            }
        }
    }

    /// Signals the kick, for work that is left.
    pub fn kick_again(&self) {
        // It fails only when 2^64 signals wait.
        let _ = self.kick.write(1);
    }

    /// The device is broken for `why`: its driver finds DEVICE_NEEDS_RESET.
    pub fn needs_reset(&mut self, why: &Broken) {
        self.broken = true;
        self.fault.needs_reset(why);
    }

    /// Whether [`Virtq::needs_reset`] was called: there is no use in serving it.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The chain that starts at `head` is nothing that the device knows.
    pub fn no_request(&self, head: u16) -> Broken {
        broken(self.index)(How::NoRequest(head))
    }

    /// The host refused what the device cannot do without.
    pub fn refused(&self, why: impl fmt::Display) -> Broken {
        broken(self.index)(How::Host(why.to_string()))
    }

    /// Each index of the used ring that the driver could see.
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
