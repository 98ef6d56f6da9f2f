//! Pairs of queues that the host's kernel serves: /dev/vhost-net (`drivers/vhost/net.c`).

use std::fmt::Display;
use std::fs::OpenOptions;
use std::io;
use std::sync::Arc;

use ::vhost::net::VhostNet;
use ::vhost::vhost_kern::net::Net as Kernel;
use ::vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::tap::TapQueue;
use crate::memory::GuestMemory;
use crate::util::thread::Kind;
use crate::util::{RateLimit, guest_debug};
use crate::virtio::bits::features;
use crate::virtio::queue::Virtq;
use crate::virtio::stop::StopFor;
use crate::virtio::worker::{Worker, wait};

const DEVICE: &str = "/dev/vhost-net";

/// The features that concern the kernel's vhost-net. rvmm handles the others.
const FEATURES: u64 = features(&[
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_NET_F_MRG_RXBUF,
]);

/// Checks whether this host has vhost-net.
///
/// # Errors
/// Fails if /dev/vhost-net cannot be opened. The message is one line and names the remedy.
pub fn check() -> io::Result<()> {
    let opened = OpenOptions::new().read(true).write(true).open(DEVICE);
    match opened {
        Ok(_) => Ok(()),
        Err(error) => {
            let way_out = "load the module (modprobe vhost_net), run as a user who may open it, \
                           or leave out vhost";
            Err(io::Error::other(format!(
                "Failed to open {DEVICE}: {error}: {way_out}"
            )))
        }
    }
}

/// A receive and a transmit queue that the kernel serves.
pub(super) struct Pair {
    kernel: Kernel<Arc<GuestMemory>>,
    queues: [Virtq; 2],
    relays: Vec<Relay>,
    /// How many of the rings were set up in the kernel. The kernel knows the positions of these.
    set_up: usize,
    /// See [`Pair::errors`].
    errors: Vec<(u16, EventFd)>,
}

/// A thread that raises interrupts for the kernel where the kernel cannot raise them itself.
struct Relay {
    thread: Worker<()>,
    interrupt: Box<dyn Fn() + Send>,
}

impl Pair {
    /// Lets the kernel serve `queues`, receive and transmit, with `tap` as their network.
    ///
    /// # Errors
    /// Fails if the host refuses. Returns the queues unchanged.
    pub(super) fn start(
        name: &str,
        ram: &Arc<GuestMemory>,
        agreed: u64,
        tap: &TapQueue,
        queues: [Virtq; 2],
    ) -> Result<Self, Box<([Virtq; 2], io::Error)>> {
        let kernel = match Self::open(ram, agreed) {
            Ok(kernel) => kernel,
            Err(error) => return Err(Box::new((queues, error))),
        };
        let mut pair = Self {
            kernel,
            queues,
            relays: Vec::new(),
            set_up: 0,
            errors: Vec::new(),
        };
        match pair.run(name, tap) {
            Ok(()) => Ok(pair),
            Err(error) => Err(Box::new((pair.stop(StopFor::Reset), error))),
        }
    }

    fn open(ram: &Arc<GuestMemory>, agreed: u64) -> io::Result<Kernel<Arc<GuestMemory>>> {
        let kernel = Kernel::new(Arc::clone(ram)).map_err(failed("open it"))?;
        kernel.set_owner().map_err(failed("own it"))?;
        let offered = kernel.get_features();
        let offered = offered.map_err(failed("ask for its features"))?;
        let set = kernel.set_features(agreed & FEATURES & offered);
        set.map_err(failed("set its features"))?;
        let regions = ram.iter().map(|region| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr().addr() as u64,
            ..VhostUserMemoryRegionInfo::default()
        });
        let regions: Vec<_> = regions.collect();
        let given = kernel.set_mem_table(&regions);
        given.map_err(failed("give it guest RAM"))?;
        Ok(kernel)
    }

    fn run(&mut self, name: &str, tap: &TapQueue) -> io::Result<()> {
        for ring in 0..self.queues.len() {
            let call = self.call(name, ring)?;
            let error = EventFd::new(libc::EFD_CLOEXEC)?;
            self.set_up(ring, &call, &error)?;
            self.set_up += 1;
            self.errors.push((self.queues[ring].index(), error));
        }
        for ring in 0..self.queues.len() {
            let set = self.kernel.set_backend(ring, Some(tap.file()));
            set.map_err(failed("give it the tap"))?;
        }
        for queue in &self.queues {
            // The kernel may have taken a notification before a pause without serving the request.
            queue.kick_again();
        }
        Ok(())
    }

    /// Returns, with the queue's number, the eventfd that the kernel signals when it cannot go on
    /// with a queue. Empty after the first call.
    pub(super) fn errors(&mut self) -> Vec<(u16, EventFd)> {
        std::mem::take(&mut self.errors)
    }

    fn set_up(&self, ring: usize, call: &EventFd, error: &EventFd) -> io::Result<()> {
        let queue = self.queues[ring].ring();
        let rings = VringConfigData {
            queue_max_size: queue.max_size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: queue.desc_table(),
            used_ring_addr: queue.used_ring(),
            avail_ring_addr: queue.avail_ring(),
            log_addr: None,
        };
        let kernel = &self.kernel;
        kernel
            .set_vring_num(ring, queue.size())
            .and_then(|()| kernel.set_vring_addr(ring, &rings))
            .and_then(|()| kernel.set_vring_base(ring, queue.next_avail()))
            .and_then(|()| kernel.set_vring_call(ring, call))
            .and_then(|()| kernel.set_vring_err(ring, error))
            .and_then(|()| kernel.set_vring_kick(ring, self.queues[ring].kick()))
            .map_err(failed("set up a queue"))
    }

    /// Returns the eventfd that the kernel signals to interrupt the driver.
    fn call(&mut self, name: &str, ring: usize) -> io::Result<EventFd> {
        let queue = &self.queues[ring];
        if let Some(direct) = queue.interrupt_fd() {
            return Ok(direct);
        }
        let call = Arc::new(EventFd::new(libc::EFD_CLOEXEC)?);
        let (waited, interrupt) = (Arc::clone(&call), queue.interrupter());
        let name = format!("{name}.{}", queue.index());
        let thread = Worker::start(Kind::Net, &name, Arc::clone(&call), move |stop| {
            wait(&waited);
            while !stop.is_asked() {
                interrupt();
                wait(&waited);
            }
        })?;
        let interrupt = Box::new(queue.interrupter());
        self.relays.push(Relay { thread, interrupt });
        call.try_clone()
    }

    /// Stops the kernel's work, and returns the queues.
    pub(super) fn stop(mut self, why: StopFor) -> [Virtq; 2] {
        let queues = self.queues.iter_mut().take(self.set_up);
        for (ring, queue) in queues.enumerate() {
            let stopped = self.kernel.set_backend(ring, None);
            match stopped.and_then(|()| self.kernel.get_vring_base(ring)) {
                Ok(next) => queue.set_next_avail(u16::try_from(next).unwrap_or_default()),
                Err(error) => guest_debug!(
                    RateLimit::named("vhost-net"),
                    "vhost-net: Failed to stop a queue: {error}"
                ),
            }
        }
        for Relay { thread, interrupt } in self.relays {
            drop(thread);
            if why == StopFor::Pause {
                // The request to end may have hidden the kernel's last signal, so interrupt once
                // more.
                interrupt();
            }
        }
        self.queues
    }
}

fn failed<E: Display>(act: &str) -> impl FnOnce(E) -> io::Error {
    move |error| io::Error::other(format!("vhost-net: Failed to {act}: {error}"))
}
