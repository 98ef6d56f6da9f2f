//! Receives packets: from the tap to the guest.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

use super::Shared;
use super::tap::{Offloads, TapQueue};
use crate::memory::Pieces;
use crate::util::guest_warn;
use crate::virtio::queue::{Broken, Virtq};
use crate::virtio::stop::Stop;

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;
/// A packet of at least this many bytes is likely to have others behind it: the MTU of Ethernet.
const FULL: usize = 1_500;
/// How long the receiver waits for more buffers, if the buffers it has may be too small for the
/// next packet.
const PATIENCE: Duration = Duration::from_millis(10);
/// Most packets taken from the tap before the driver is notified.
const BATCH: usize = 64;

/// The packets that the driver is prepared for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Size in bytes of the virtio header before each packet, in both directions.
    pub(super) header: usize,
    /// The work that the driver takes over from the host.
    pub(super) offloads: Offloads,
    /// Whether a packet may lie in several buffers (VIRTIO_NET_F_MRG_RXBUF).
    pub(super) mergeable: bool,
    /// Size in bytes of the largest packet that the tap may give, with its virtio header.
    pub(super) packet: usize,
}

/// The guest's buffers that wait for a packet.
struct Buffers {
    /// Head and length of each chain, in order.
    chains: VecDeque<(u16, usize)>,
    /// The memory of all chains.
    room: Pieces,
}

/// What a receive queue waits for.
#[derive(Clone, Copy)]
enum Next {
    /// Nothing: the tap may have packets.
    Receive,
    /// A packet: the tap has none.
    Packet,
    /// More buffers: the buffers taken so far do not hold a packet of any size. After the given
    /// time the receiver makes do with them. `None`: there are no buffers at all.
    Buffers(Option<Instant>),
}

/// The state of a receive queue while a thread serves it.
pub(super) struct Receiver<'a> {
    shared: &'a Shared,
    tap: &'a TapQueue,
    room: Room,
    queue: &'a mut Virtq,
    buffers: Buffers,
    next: Next,
}

impl<'a> Receiver<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        tap: &'a TapQueue,
        room: Room,
        queue: &'a mut Virtq,
    ) -> Self {
        let buffers = Buffers {
            chains: VecDeque::new(),
            room: queue.no_pieces(),
        };
        Self {
            shared,
            tap,
            room,
            queue,
            buffers,
            next: Next::Receive,
        }
    }

    /// How long the thread may wait for kicks and packets. `None`: without a limit.
    pub(super) fn patience(&self) -> Option<Duration> {
        match self.next {
            Next::Receive => Some(Duration::ZERO),
            Next::Packet | Next::Buffers(None) => None,
            Next::Buffers(Some(until)) => Some(until.saturating_duration_since(Instant::now())),
        }
    }

    /// Whether a packet in the tap must end the thread's wait.
    pub(super) fn wants_tap(&self) -> bool {
        !matches!(self.next, Next::Buffers(_)) && !self.shared.link.is_gone()
    }

    /// The error for a tap that the thread cannot wait for. The queue cannot go on then.
    pub(super) fn tap_wait_failed(&self, error: &io::Error) -> Broken {
        let tap = &self.shared.tap;
        self.queue
            .refused(format_args!("Failed to wait for tap {tap}: {error}"))
    }

    /// Receives packets if that is possible now. `kicked`: the driver has sent a notification.
    /// `has_packets`: the tap has packets.
    pub(super) fn serve(
        &mut self,
        kicked: bool,
        has_packets: bool,
        stop: &Stop,
    ) -> Result<(), Broken> {
        let late = match self.next {
            Next::Buffers(until) => until.is_some_and(|until| until <= Instant::now()),
            _ => false,
        };
        let due = match self.next {
            Next::Receive => true,
            Next::Packet => has_packets,
            Next::Buffers(_) => kicked || late,
        };
        if !due {
            return Ok(());
        }
        let enough = self.buffers.gather(self.queue, self.room)?;
        let some = !self.buffers.chains.is_empty();
        let will_do = enough || (late && some);
        if !will_do {
            // The guest is slow, and notifies the device of its next buffers. If none come in time,
            // the packet is read into the buffers taken so far. It is dropped if it does not fit.
            self.next = Next::Buffers(some.then(|| Instant::now() + PATIENCE));
            return Ok(());
        }
        self.next = self.receive_some(stop)?;
        self.queue.notify()
    }

    /// Puts the buffers that wait for a packet back into the queue, so that the next thread finds
    /// them.
    pub(super) fn give_back(&mut self) {
        for _ in self.buffers.chains.drain(..) {
            self.queue.unpop();
        }
        self.buffers.room = self.queue.no_pieces();
    }

    /// Receives packets until it must wait. Returns what to wait for.
    fn receive_some(&mut self, stop: &Stop) -> Result<Next, Broken> {
        for _ in 0..BATCH {
            if self.buffers.chains.is_empty() || stop.is_asked() {
                return Ok(Next::Receive);
            }
            match self.buffers.read(self.tap, self.room) {
                Ok(None) => self.lose(),
                Ok(Some(_)) if !self.buffers.is_for(self.room.offloads) => {}
                Ok(Some(count)) => {
                    self.buffers.used(self.queue, count, self.room)?;
                    if count < FULL {
                        // A small packet seldom has others behind it. If it has, the next wait ends
                        // at once.
                        return Ok(Next::Packet);
                    }
                    if !self.buffers.gather(self.queue, self.room)? {
                        return Ok(Next::Receive);
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(Next::Packet),
                    // The guest's buffers are too small for a header, or the packet has an invalid
                    // header: drop it.
                    Some(libc::EINTR | libc::EFAULT | libc::EINVAL) => {}
                    _ => {
                        self.shared.failed(&error);
                        return Ok(Next::Packet);
                    }
                },
            }
        }
        Ok(Next::Receive)
    }

    /// Logs a packet that was larger than the driver's buffers.
    fn lose(&self) {
        guest_warn!(
            self.shared.losses,
            "{}: dropped a packet that is larger than the guest's buffers",
            self.shared.name
        );
    }
}

impl Buffers {
    /// Takes buffers from the queue until a packet of any size fits, or until there are as many as
    /// the queue has entries. Returns false if they do not suffice; the driver's next buffers then
    /// come with a notification.
    fn gather(&mut self, queue: &mut Virtq, room: Room) -> Result<bool, Broken> {
        let most = usize::from(queue.size());
        loop {
            while !self.fits(room) && self.chains.len() < most {
                let Some(chain) = queue.pop()? else { break };
                if chain.writable.is_empty() {
                    return Err(queue.no_request(chain.head));
                }
                self.chains.push_back((chain.head, chain.writable.len()));
                self.room.append(&chain.writable);
            }
            // The guest has small buffers. It gets what fits in them; no more buffers are taken.
            if self.fits(room) || self.chains.len() >= most {
                return Ok(true);
            }
            if !queue.enable_notifications()? {
                return Ok(false);
            }
        }
    }

    fn fits(&self, room: Room) -> bool {
        if room.mergeable {
            self.room.len() >= room.packet
        } else {
            !self.chains.is_empty()
        }
    }

    /// Reads the next packet into all buffers, or into the first one without mergeable buffers.
    /// Returns its length with the header; `None` if it does not fit.
    fn read(&mut self, tap: &TapQueue, room: Room) -> io::Result<Option<usize>> {
        let count = if room.mergeable {
            self.room.read_message(tap.as_fd())?
        } else {
            let mut first = self.room.clone();
            first.split_off(self.chains.front().map_or(0, |(_, length)| *length));
            first.read_message(tap.as_fd())?
        };
        // A tap never gives less than a header.
        Ok(count.filter(|count| *count >= room.header))
    }

    /// Whether the packet in the first buffers uses only offloads that the driver agreed to (VIRTIO
    /// 1.2, section 5.1.6.4.1).
    fn is_for(&self, offloads: Offloads) -> bool {
        let mut header = [0; 2];
        self.room.copy_to(&mut header);
        let [flags, segments] = header.map(u32::from);
        let kind = segments & !VIRTIO_NET_HDR_GSO_ECN;
        let is_kind = match kind {
            VIRTIO_NET_HDR_GSO_NONE => true,
            VIRTIO_NET_HDR_GSO_TCPV4 => offloads.tso4,
            VIRTIO_NET_HDR_GSO_TCPV6 => offloads.tso6,
            _ => false,
        };
        is_kind
            && (kind == segments || offloads.ecn)
            && (flags & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 || offloads.checksum)
    }

    /// Returns the first buffers to the driver: they hold a packet of `count` bytes, including its
    /// header.
    fn used(&mut self, queue: &mut Virtq, count: usize, room: Room) -> Result<(), Broken> {
        let buffers = if room.mergeable {
            self.count_for(count)
        } else {
            1
        };
        if room.header > NUM_BUFFERS {
            self.room.copy_from_at(NUM_BUFFERS, &buffers.to_le_bytes());
        }
        let (mut left, mut gone) = (count, 0);
        let chains = self.chains.drain(..usize::from(buffers));
        queue.push_together(chains.map(|(head, length)| {
            let here = length.min(left);
            left -= here;
            gone += length;
            (head, here)
        }))?;
        self.room.advance(gone);
        Ok(())
    }

    /// The number of buffers that a packet of `count` bytes takes.
    fn count_for(&self, count: usize) -> u16 {
        let (mut room, mut buffers) = (0, 0);
        for (_, length) in &self.chains {
            room += length;
            buffers += 1;
            if room >= count {
                break;
            }
        }
        buffers
    }
}
