//! A network interface: virtio-net on a tap (VIRTIO 1.2, section 5.1).
//!
//! Queues come in pairs, receive and transmit, and a control queue behind them all. `receive`,
//! `transmit` and `control` are the threads that serve them; with `vhost` the host's kernel serves
//! the pairs instead.

mod control;
mod receive;
mod transmit;
mod vhost;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::*;

use self::control::Pairs;
use super::device::{Activation, Fault, VirtioDevice, read_bytes};
use super::queue::Virtq;
use super::worker::Worker;
use crate::config::Mac;
use crate::util::RateLimit;
use crate::util::sync::lock;
use crate::util::tap::{Offloads, TapQueue};
use crate::util::thread::Kind;

/// Entries of each receive and transmit queue.
const QUEUE_SIZE: u16 = 256;
/// Of the control queue.
const CONTROL_SIZE: u16 = 64;

/// A network interface of the guest.
pub struct Net {
    shared: Arc<Shared>,
    mac: Mac,
    vhost: Option<vhost::Maker>,
    served: Served,
}

/// What all queues' threads use.
struct Shared {
    name: String,
    tap: String,
    pairs: Vec<TapQueue>,
    /// The tap has gone, and with it the link.
    link: Link,
    failures: RateLimit,
}

/// What serves the queues.
#[derive(Default)]
struct Served {
    workers: Vec<Worker>,
    vhost: Vec<vhost::Pair>,
}

/// Whether the tap is there, and whom to tell when it goes.
#[derive(Default)]
struct Link(std::sync::Mutex<LinkState>);

#[derive(Default)]
struct LinkState {
    gone: bool,
    fault: Option<Fault>,
}

impl Link {
    fn is_gone(&self) -> bool {
        lock(&self.0).gone
    }

    /// From now on there is none. Returns whether that is news.
    fn lose(&self) -> bool {
        let mut state = lock(&self.0);
        let news = !std::mem::replace(&mut state.gone, true);
        if let Some(fault) = state.fault.as_ref().filter(|_| news) {
            fault.config_changed();
        }
        news
    }
}

impl Net {
    /// An interface with this address on `pairs`, the queues of the tap of that name.
    pub fn new(name: &str, tap: &str, pairs: Vec<TapQueue>, mac: Mac, vhost: bool) -> Self {
        Self {
            shared: Arc::new(Shared {
                name: name.to_owned(),
                tap: tap.to_owned(),
                pairs,
                link: Link::default(),
                failures: RateLimit::default(),
            }),
            mac,
            vhost: vhost.then(vhost::Maker::default),
            served: Served::default(),
        }
    }

    fn pairs(&self) -> u16 {
        u16::try_from(self.shared.pairs.len()).unwrap_or(1)
    }

    /// struct virtio_net_config: the address, the link, the most pairs.
    fn config(&self) -> [u8; 10] {
        let mut space = [0; 10];
        space[..6].copy_from_slice(&self.mac.0);
        space[6] = u8::from(!self.shared.link.is_gone());
        space[8..].copy_from_slice(&self.pairs().to_le_bytes());
        space
    }
}
