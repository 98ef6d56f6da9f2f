//! From the tap to the guest.

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

/// Where `num_buffers` is in the header.
const NUM_BUFFERS: usize = 10;
/// Bytes of a packet that has others behind it: what Ethernet carries, at least.
const FULL: usize = 1_500;
/// How long a packet waits for more buffers than there are.
const PATIENCE: Duration = Duration::from_millis(10);
/// Packets taken from the tap before the guest is told of them.
const BATCH: usize = 64;

/// What the driver gave room for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Bytes of the header before each packet, of both directions.
    pub(super) header: usize,
    /// What the driver takes over from the host.
    pub(super) offloads: Offloads,
    /// A packet may lie in several buffers (VIRTIO_NET_F_MRG_RXBUF).
    pub(super) mergeable: bool,
    /// The largest packet that the tap may give, with its header.
    pub(super) packet: usize,
}

/// Buffers of the guest that wait for a packet.
struct Buffers {
    /// Heads and lengths of the chains, in order.
    chains: VecDeque<(u16, usize)>,
    /// All their pieces.
    room: Pieces,
}

/// What comes next for a receive queue.
#[derive(Clone, Copy)]
enum Next {
    /// There may be packets in the tap.
    Receive,
    /// There are none.
    Packet,
    /// The guest has not enough buffers for each of them. At the time given, what there is will do.
    Buffers(Option<Instant>),
}

/// A receive queue at work.
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

    /// How long its thread may wait for kicks and packets; None: until they come.
    pub(super) fn patience(&self) -> Option<Duration> {
        match self.next {
            Next::Receive => Some(Duration::ZERO),
            Next::Packet | Next::Buffers(None) => None,
            Next::Buffers(Some(until)) => Some(until.saturating_duration_since(Instant::now())),
        }
    }

    /// Whether a packet in the tap is news.
    pub(super) fn wants_tap(&self) -> bool {
        !matches!(self.next, Next::Buffers(_)) && !self.shared.link.is_gone()
    }

    /// The host does not tell of packets in the tap: why the queue cannot go on.
    pub(super) fn is_deaf(&self, error: &io::Error) -> Broken {
        let tap = &self.shared.tap;
        self.queue
            .refused(format_args!("Failed to wait for tap {tap}: {error}"))
    }

    /// Receives what there is: the driver notified of buffers, or the tap has packets.
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
            // The guest is slow: its next buffers come with a notification. If none come, those that
            // are there may do for the next packet, or it is lost.
            self.next = Next::Buffers(some.then(|| Instant::now() + PATIENCE));
            return Ok(());
        }
        self.next = self.receive_some(stop)?;
        self.queue.tell()
    }

    /// Puts the buffers back that wait for a packet: whoever serves the queue next finds them again.
    pub(super) fn give_back(&mut self) {
        for _ in self.buffers.chains.drain(..) {
            self.queue.unpop();
        }
        self.buffers.room = self.queue.no_pieces();
    }

    /// Receives some packets.
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
                        // Seldom is there more behind a small one: to wait tells as soon.
                        return Ok(Next::Packet);
                    }
                    if !self.buffers.gather(self.queue, self.room)? {
                        return Ok(Next::Receive);
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(Next::Packet),
                    // No header fits in the guest's buffers, or it has one that it cannot: lost, as on a wire.
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

    /// A packet was larger than the driver's buffers.
    fn lose(&self) {
        guest_warn!(
            self.shared.losses,
            "{}: a packet is larger than the guest's buffers, and dropped",
            self.shared.name
        );
    }
}

impl Buffers {
    /// Takes buffers of the guest until a packet of any size fits, or they are as many as there can be.
    /// False when they are too few, and the driver was asked to notify of more.
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
            // A guest with small buffers gets what fits in them, whatever else it offers.
            if self.fits(room) || self.chains.len() >= most {
                return Ok(true);
            }
            if !queue.ask_for_kick()? {
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

    /// Reads the next packet into all there is, or into the first buffer; None where it does not fit.
    fn read(&mut self, tap: &TapQueue, room: Room) -> io::Result<Option<usize>> {
        let count = if room.mergeable {
            self.room.read_message(tap.as_fd())?
        } else {
            let mut first = self.room.clone();
            first.split_off(self.chains.front().map_or(0, |(_, length)| *length));
            first.read_message(tap.as_fd())?
        };
        // A tap gives no packet without its header.
        Ok(count.filter(|count| *count >= room.header))
    }

    /// Whether the packet in the first buffers asks for nothing that the driver did not agree to
    /// (VIRTIO 1.2, section 5.1.6.4.1).
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

    /// A packet of `count` bytes, its header among them, lies in the first buffers.
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

    /// How many buffers a packet of `count` bytes takes.
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
