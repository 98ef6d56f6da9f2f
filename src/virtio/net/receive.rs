//! From the tap to the guest.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::time::Duration;

use super::Shared;
use crate::memory::Pieces;
use crate::util::poll::{borrow, wait_readable, wait_readable_for};
use crate::util::tap::TapQueue;
use crate::virtio::queue::{Broken, Virtq};
use crate::virtio::worker::{Stop, wait};

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

impl Shared {
    /// Receives from `tap` to `queue` until the worker is to stop.
    pub(super) fn receive(
        &self,
        tap: &TapQueue,
        room: Room,
        queue: &mut Virtq,
        stop: &Stop,
    ) -> Result<(), Broken> {
        let mut buffers = Buffers {
            chains: VecDeque::new(),
            room: queue.no_pieces(),
        };
        while !stop.is_asked() {
            if !buffers.gather(queue, room)? {
                // The guest is slow: its next buffers come with a notification. If none come, those that
                // are there may do for the next packet, or it is lost.
                let kick = borrow(queue.kick());
                if buffers.chains.is_empty() || wait_readable_for(kick, PATIENCE) {
                    wait(queue.kick());
                    continue;
                }
            }
            let more = self.receive_some(tap, room, queue, &mut buffers)?;
            queue.tell()?;
            if self.link.is_gone() {
                wait(queue.kick());
            } else if !more {
                let [kicked, _] = wait_readable([borrow(queue.kick()), tap.as_fd()]);
                if kicked {
                    wait(queue.kick());
                }
            }
        }
        Ok(())
    }

    /// Receives some packets; false when the tap had no more.
    fn receive_some(
        &self,
        tap: &TapQueue,
        room: Room,
        queue: &mut Virtq,
        buffers: &mut Buffers,
    ) -> Result<bool, Broken> {
        for _ in 0..BATCH {
            if buffers.chains.is_empty() {
                return Ok(true);
            }
            match buffers.place(room).read_from(tap.as_fd()) {
                Ok(count) => {
                    buffers.used(queue, count, room)?;
                    if count < FULL {
                        // Seldom is there more behind a small one: to wait tells as soon.
                        return Ok(false);
                    }
                    if !buffers.gather(queue, room)? {
                        return Ok(true);
                    }
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(false),
                    // Too large for the guest's buffers: lost, as on a wire.
                    Some(libc::EINTR | libc::EFAULT | libc::EINVAL) => {}
                    _ => {
                        self.failed(&error);
                        return Ok(false);
                    }
                },
            }
        }
        Ok(true)
    }
}

impl Buffers {
    /// Takes buffers of the guest until a packet of any size fits. False when they are too few, and
    /// the driver was asked to notify of more.
    fn gather(&mut self, queue: &mut Virtq, room: Room) -> Result<bool, Broken> {
        loop {
            while !self.fits(room) && self.chains.len() < usize::from(queue.size()) {
                let Some(chain) = queue.pop()? else { break };
                if chain.writable.is_empty() {
                    return Err(Broken::NoRequest(chain.head));
                }
                self.chains.push_back((chain.head, chain.writable.len()));
                self.room.append(&chain.writable);
            }
            if self.fits(room) {
                return Ok(true);
            }
            if !queue.ask_for_kick()? {
                // A guest with few buffers gets what fits in them.
                return Ok(self.chains.len() >= usize::from(queue.size()));
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

    /// Where the next packet goes: all there is, or the first buffer.
    fn place(&self, room: Room) -> Cow<'_, Pieces> {
        if room.mergeable {
            return Cow::Borrowed(&self.room);
        }
        let mut first = self.room.clone();
        first.split_off(self.chains.front().map_or(0, |(_, length)| *length));
        Cow::Owned(first)
    }

    /// A packet of `count` bytes, its header among them, lies in the first buffers.
    fn used(&mut self, queue: &mut Virtq, count: usize, room: Room) -> Result<(), Broken> {
        let buffers = if room.mergeable {
            self.count_for(count)
        } else {
            1
        };
        self.room.copy_from_at(NUM_BUFFERS, &buffers.to_le_bytes());
        let (mut left, mut gone) = (count, 0);
        for (head, length) in self.chains.drain(..usize::from(buffers)) {
            let here = length.min(left);
            left -= here;
            gone += length;
            queue.push(head, here)?;
        }
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
