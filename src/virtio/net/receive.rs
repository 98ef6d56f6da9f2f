//! From the tap to the guest.

use std::collections::VecDeque;
use std::os::fd::AsFd;

use super::Shared;
use crate::memory::Pieces;
use crate::util::poll::{borrow, wait_readable};
use crate::util::tap::TapQueue;
use crate::virtio::queue::{Broken, Chain, Virtq};
use crate::virtio::worker::{Stop, wait};

/// Where `num_buffers` is in the header.
const NUM_BUFFERS: usize = 10;
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
    chains: VecDeque<Chain>,
    bytes: usize,
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
            bytes: 0,
        };
        while !stop.is_asked() {
            if !buffers.gather(queue, room)? {
                // The guest is slow: its next buffers come with a notification.
                wait(queue.kick());
                continue;
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
            if !buffers.gather(queue, room)? {
                return Ok(true);
            }
            let Some(pieces) = buffers.pieces(room) else {
                return Ok(true);
            };
            match pieces.read_from(tap.as_fd()) {
                Ok(count) => buffers.used(queue, count, room)?,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => return Ok(false),
                    // Too large for the guest's buffers: lost, as on a wire.
                    Some(libc::EINTR | libc::EFAULT | libc::EINVAL) => {}
                    _ => {
                        self.lose_link(&error);
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
            while !self.fits(room) {
                let Some(chain) = queue.pop()? else { break };
                self.bytes += chain.writable.len();
                self.chains.push_back(chain);
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
            self.bytes >= room.packet
        } else {
            !self.chains.is_empty()
        }
    }

    /// Where the next packet goes.
    fn pieces(&self, room: Room) -> Option<Pieces> {
        let mut chains = self.chains.iter();
        let mut pieces = chains.next()?.writable.clone();
        for chain in chains {
            if !room.mergeable || pieces.len() >= room.packet {
                break;
            }
            pieces.append(&chain.writable);
        }
        Some(pieces)
    }

    /// A packet of `count` bytes, its header among them, lies in the first buffers.
    fn used(&mut self, queue: &mut Virtq, count: usize, room: Room) -> Result<(), Broken> {
        let buffers = if room.mergeable {
            self.count_for(count)
        } else {
            1
        };
        self.write_count(buffers);
        let mut left = count;
        for _ in 0..buffers {
            let Some(chain) = self.chains.pop_front() else {
                break;
            };
            self.bytes -= chain.writable.len();
            let here = chain.writable.len().min(left);
            left -= here;
            queue.push(chain.head, here)?;
        }
        Ok(())
    }

    /// How many buffers a packet of `count` bytes takes.
    fn count_for(&self, count: usize) -> u16 {
        let (mut room, mut buffers) = (0, 0);
        for chain in &self.chains {
            room += chain.writable.len();
            buffers += 1;
            if room >= count {
                break;
            }
        }
        buffers
    }

    /// Writes `num_buffers` to the header, which may itself be in several buffers.
    fn write_count(&self, buffers: u16) {
        let mut skip = NUM_BUFFERS;
        let mut bytes = &buffers.to_le_bytes()[..];
        for chain in &self.chains {
            let length = chain.writable.len();
            if skip >= length {
                skip -= length;
                continue;
            }
            let mut place = chain.writable.clone();
            place.advance(skip);
            let done = place.copy_from(bytes);
            (skip, bytes) = (0, &bytes[done..]);
            if bytes.is_empty() {
                return;
            }
        }
    }
}
