//! A network interface: virtio-net on a tap (VIRTIO 1.2, section 5.1).
//!
//! Queues come in pairs: receive and transmit. The control queue follows all pairs. `pair` is the
//! thread that serves a pair, with `receive` and `transmit`. `control` serves the control queue.
//! With `vhost` the host's kernel serves the pairs instead. `saved` is the state in a snapshot.

mod control;
mod pair;
mod receive;
mod saved;
pub mod tap;
mod transmit;
pub mod vhost;
mod watch;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::*;

use self::receive::Room;
use self::tap::{Offloads, TapQueue};
use super::bits::features;
use super::device::{Activation, VirtioDevice, read_bytes};
use super::notify::Fault;
use super::queue::{Broken, Virtq};
use super::stop::{Stop, StopFor};
use super::worker::{Worker, Workers};
use crate::config::Mac;
use crate::memory::{GuestMemory, dirty_log};
use crate::snapshot::{LoadError, Parts, SaveError, Saved};
use crate::util::sync::lock;
use crate::util::thread::Kind;
use crate::util::{RateLimit, guest_warn};

/// Entries of each receive and transmit queue.
const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue.
const CONTROL_SIZE: u16 = 64;

/// A network interface of the guest.
pub struct Net {
    shared: Arc<Shared>,
    mac: Mac,
    /// 0 if it is unknown. Changes only by a load.
    mtu: AtomicU16,
    vhost: bool,
    /// The state was loaded, and the tap was not prepared since.
    is_loaded: AtomicBool,
    workers: Workers,
    kernel: Mutex<InKernel>,
}

/// The state that the threads of all queues share.
struct Shared {
    name: String,
    tap: String,
    pairs: Vec<Arc<TapQueue>>,
    /// The number of pairs to which the tap passes packets.
    pairs_in_use: AtomicU16,
    /// The link goes down for good when the tap is deleted.
    link: Link,
    failures: RateLimit,
    /// Limits warnings about packets that do not fit in the guest's buffers.
    losses: RateLimit,
}

/// The pairs that the host's kernel serves.
#[derive(Default)]
struct InKernel {
    pairs: Vec<vhost::Pair>,
    /// Watches the pairs for errors, and the tap for its end.
    watch: Option<Worker<()>>,
}

/// Whether the tap is gone, and how to notify the driver when it goes.
#[derive(Default)]
struct Link(Mutex<LinkState>);

#[derive(Default)]
struct LinkState {
    gone: bool,
    fault: Option<Fault>,
}

impl Link {
    fn is_gone(&self) -> bool {
        lock(&self.0).gone
    }

    /// Sets the link down, and notifies the driver. False if the link was down already.
    fn lose(&self) -> bool {
        let mut state = lock(&self.0);
        let news = !std::mem::replace(&mut state.gone, true);
        if let Some(fault) = state.fault.as_ref().filter(|_| news) {
            fault.config_changed();
        }
        news
    }

    /// Sets the link up, and notifies the driver if it was down.
    fn regain(&self) {
        let mut state = lock(&self.0);
        let news = std::mem::take(&mut state.gone);
        if let Some(fault) = state.fault.as_ref().filter(|_| news) {
            fault.config_changed();
        }
    }
}

impl Net {
    /// Returns an interface with address `mac`. `pairs` are the queues of the tap named `tap`;
    /// `mtu` is the tap's MTU, if known. With `vhost` the host's kernel serves the queues.
    pub fn new(
        name: &str,
        tap: &str,
        pairs: Vec<Arc<TapQueue>>,
        mac: Mac,
        mtu: Option<u16>,
        vhost: bool,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                name: name.to_owned(),
                tap: tap.to_owned(),
                pairs,
                pairs_in_use: AtomicU16::new(1),
                link: Link::default(),
                failures: RateLimit::named(name),
                losses: RateLimit::named(format!("{name} losses")),
            }),
            mac,
            mtu: AtomicU16::new(mtu.unwrap_or(0)),
            vhost,
            is_loaded: AtomicBool::new(false),
            workers: Workers::default(),
            kernel: Mutex::default(),
        }
    }

    fn pairs(&self) -> u16 {
        u16::try_from(self.shared.pairs.len()).unwrap_or(1)
    }

    /// struct virtio_net_config: address, link status, largest number of pairs, MTU.
    fn config(&self) -> [u8; 12] {
        let mut space = [0; 12];
        space[..6].copy_from_slice(&self.mac.0);
        space[6] = u8::from(!self.shared.link.is_gone());
        space[8..10].copy_from_slice(&self.pairs().to_le_bytes());
        space[10..].copy_from_slice(&self.offered_mtu().unwrap_or(0).to_le_bytes());
        space
    }

    /// The MTU to report to the driver; `None` if it is unknown or less than a device should
    /// report.
    fn offered_mtu(&self) -> Option<u16> {
        Some(self.mtu.load(Ordering::Acquire)).filter(|mtu| *mtu >= MTU_LEAST)
    }

    /// Sets the tap's header and offloads as the driver has negotiated, and how many `pairs` get
    /// packets. Drops packets from before. A packet that arrives meanwhile may still be made for
    /// the previous driver's offloads; the receiver drops such packets.
    fn prepare_tap(&self, header: usize, offloads: Offloads, pairs: u16) {
        for tap in &self.shared.pairs {
            let prepared = tap.set_header(header);
            if let Err(error) = prepared.and_then(|()| tap.set_offloads(offloads)) {
                self.shared.failed(&error);
            }
        }
        self.shared.use_pairs(pairs);
        for tap in &self.shared.pairs {
            tap.drain();
        }
    }

    /// Describes the packets that the driver is prepared for.
    fn room(&self, activation: &Activation, offloads: Offloads) -> Room {
        let mtu = self.mtu.load(Ordering::Acquire).max(MTU_ETHERNET);
        let mergeable = activation.has(VIRTIO_NET_F_MRG_RXBUF);
        // Drivers older than VIRTIO 1.0 expect `num_buffers` only with VIRTIO_NET_F_MRG_RXBUF
        // (section 5.1.6.1).
        let is_whole = mergeable || activation.has(VIRTIO_F_VERSION_1);
        let header = if is_whole {
            tap::HEADER
        } else {
            tap::HEADER_SHORT
        };
        Room {
            header,
            offloads,
            mergeable,
            packet: if offloads.tso4 || offloads.tso6 {
                PACKET_SEGMENTS
            } else {
                header + LINK_HEADER + usize::from(mtu)
            },
        }
    }
}

/// The largest packet that is yet to be split into TCP segments, with its virtio header, in bytes:
/// 64 KiB and the headers before them.
const PACKET_SEGMENTS: usize = 65_562 + tap::HEADER;
/// Bytes that the MTU does not count: the Ethernet header and two VLAN tags.
const LINK_HEADER: usize = 14 + 2 * 4;
/// The MTU of Ethernet.
const MTU_ETHERNET: u16 = 1_500;
/// The smallest MTU that a device should report (VIRTIO 1.2, section 5.1.4.1).
const MTU_LEAST: u16 = 1_280;

impl VirtioDevice for Net {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> &str {
        &self.shared.name
    }

    fn features(&self) -> u64 {
        let mut all = features(&[
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
        ]);
        if self.pairs() > 1 {
            all |= features(&[VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ]);
        }
        if self.offered_mtu().is_some() {
            all |= features(&[VIRTIO_NET_F_MTU]);
        }
        all
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; 2 * usize::from(self.pairs())];
        if self.pairs() > 1 {
            sizes.push(CONTROL_SIZE);
        }
        sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn activate(&self, activation: Activation) -> io::Result<()> {
        lock(&self.shared.link.0).fault = Some(activation.fault.clone());
        let offloads = Offloads {
            checksum: activation.has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: activation.has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: activation.has(VIRTIO_NET_F_GUEST_TSO6),
            ecn: activation.has(VIRTIO_NET_F_GUEST_ECN),
        };
        let room = self.room(&activation, offloads);
        // After a pause the tap is set up already, and packets that arrived meanwhile are for this
        // driver. But after a load the tap is another one.
        let is_loaded = self.is_loaded.swap(false, Ordering::AcqRel);
        if is_loaded && !self.shared.pairs.iter().any(|tap| tap.is_gone()) {
            self.shared.link.regain();
        }
        if !activation.resumes {
            self.prepare_tap(room.header, offloads, 1);
        } else if is_loaded {
            let pairs = self.shared.pairs_in_use.load(Ordering::Acquire);
            self.prepare_tap(room.header, offloads, pairs);
        }
        self.start(activation, room)
            .inspect_err(|_| drop(self.deactivate(StopFor::Reset)))
    }

    fn stop(&self, why: StopFor) {
        self.workers.stop(why);
    }

    fn deactivate(&self, why: StopFor) -> Vec<Virtq> {
        lock(&self.shared.link.0).fault = None;
        let InKernel { pairs, watch } = std::mem::take(&mut *lock(&self.kernel));
        drop(watch);
        let mut queues = self.workers.take_back();
        queues.extend(pairs.into_iter().flat_map(|pair| pair.stop(why)));
        queues.sort_by_key(Virtq::index);
        queues
    }

    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        self.save_state()
    }

    fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        self.load_state(parts)
    }
}

impl Net {
    fn start(&self, activation: Activation, room: Room) -> io::Result<()> {
        // Without VIRTIO_NET_F_MQ the control queue follows the first pair (section 5.1.2).
        let pairs = if activation.has(VIRTIO_NET_F_MQ) {
            self.pairs()
        } else {
            1
        };
        let Activation {
            ram,
            features,
            queues,
            fault,
            ..
        } = activation;
        let mut queues = queues.into_iter().peekable();
        while let Some(queue) = queues.next() {
            let pair = queue.index() / 2;
            if pair >= pairs {
                self.start_control(queue)?;
                continue;
            }
            match queues.next_if(|next| next.index() / 2 == pair) {
                // What vhost writes is in no dirty log.
                Some(next) if self.vhost && !dirty_log(&ram).is_on() => {
                    self.start_in_kernel(&ram, features, [queue, next], room)?;
                }
                Some(next) => self.start_pair(vec![queue, next], room)?,
                None => self.start_pair(vec![queue], room)?,
            }
        }
        let mut kernel = lock(&self.kernel);
        let errors = kernel.pairs.iter_mut().flat_map(vhost::Pair::errors);
        let errors: Vec<_> = errors.collect();
        if !errors.is_empty() {
            kernel.watch = Some(watch::watch(&self.shared, fault, errors)?);
        }
        Ok(())
    }

    /// Hands a pair to the kernel. If the kernel refuses, serves the pair here.
    fn start_in_kernel(
        &self,
        ram: &Arc<GuestMemory>,
        features: u64,
        queues: [Virtq; 2],
        room: Room,
    ) -> io::Result<()> {
        let shared = &self.shared;
        let tap = &shared.pairs[usize::from(queues[0].index() / 2)];
        match vhost::Pair::start(&shared.name, ram, features, tap, queues) {
            Ok(pair) => lock(&self.kernel).pairs.push(pair),
            Err(refused) => {
                let (queues, error) = *refused;
                guest_warn!(
                    shared.failures,
                    "{}: {error}: rvmm serves this pair of queues without vhost",
                    shared.name
                );
                self.start_pair(queues.into(), room)?;
            }
        }
        Ok(())
    }

    /// Serves a pair of queues, or the only enabled queue of a pair.
    fn start_pair(&self, queues: Vec<Virtq>, room: Room) -> io::Result<()> {
        let events = pair::kicks(&queues)?;
        let name = format!("{}.{}", self.shared.name, queues[0].index() / 2);
        self.start_worker(&name, queues, move |shared, queues, stop| {
            let tap = &shared.pairs[usize::from(queues[0].index() / 2)];
            shared.serve(tap, room, queues, &events, stop)
        })
    }

    fn start_control(&self, queue: Virtq) -> io::Result<()> {
        let name = format!("{}.ctl", self.shared.name);
        self.start_worker(&name, vec![queue], |shared, queues, stop| {
            shared.control(&mut queues[0], stop)
        })
    }

    fn start_worker<F>(&self, name: &str, queues: Vec<Virtq>, serve: F) -> io::Result<()>
    where
        F: FnOnce(&Shared, &mut [Virtq], &Stop) -> Result<(), Broken> + Send + 'static,
    {
        let shared = Arc::clone(&self.shared);
        let serve = move |queues: &mut [Virtq], stop: &Stop| serve(&shared, queues, stop);
        let worker = Worker::serve(Kind::Net, name, queues, serve)?;
        self.workers.add(worker);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
