//! The control queue, by which the driver sets how many pairs of queues it uses.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_net::{VIRTIO_NET_ERR, VIRTIO_NET_OK};

use super::Shared;
use crate::virtio::queue::{Broken, Chain, Virtq};
use crate::virtio::stop::Stop;
use crate::virtio::worker::wait;

/// VIRTIO_NET_CTRL_MQ and VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET (VIRTIO 1.2, section 5.1.6.5.6).
const CLASS_PAIRS: u8 = 4;
const SET_PAIRS: u8 = 0;

impl Shared {
    /// Answers commands until the worker must stop.
    pub(super) fn control(&self, queue: &mut Virtq, stop: &Stop) -> Result<(), Broken> {
        while !stop.is_asked() {
            queue.drain(stop, |chain| Ok(self.command(&chain)))?;
            wait(queue.kick());
        }
        Ok(())
    }

    fn command(&self, chain: &Chain) -> usize {
        let mut bytes = [0; 4];
        let count = chain.readable.copy_to(&mut bytes);
        let done = match bytes {
            [CLASS_PAIRS, SET_PAIRS, low, high] if count == bytes.len() => {
                self.use_pairs(u16::from_le_bytes([low, high]))
            }
            _ => false,
        };
        let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        chain.writable.copy_from(&answer.to_le_bytes()[..1])
    }

    /// Makes the tap pass packets to the first `count` pairs only. False if `count` is invalid or
    /// the tap refuses.
    pub(super) fn use_pairs(&self, count: u16) -> bool {
        let first = usize::from(count);
        if !(1..=self.pairs.len()).contains(&first) {
            return false;
        }
        let mut pairs = self.pairs.iter().enumerate();
        match pairs.try_for_each(|(index, tap)| tap.set_attached(index < first)) {
            Ok(()) => {
                self.pairs_in_use.store(count, Ordering::Release);
                true
            }
            Err(error) => {
                self.failed(&error);
                false
            }
        }
    }
}
