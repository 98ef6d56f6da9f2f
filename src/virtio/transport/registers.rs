//! What a driver has told its device so far, as the registers of every transport show it.
//!
//! Nothing here starts, stops or waits: that is `core`'s.

use std::io;
use std::mem::size_of;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;
use crate::util::Half;
use crate::virtio::bits::features;
use crate::virtio::device::VirtioDevice;
use crate::virtio::notify::{DRIVER_OK, Fault, NEEDS_RESET, Shared, status_bit};
use crate::virtio::queue::Virtq;

const ACKNOWLEDGE: u8 = status_bit(VIRTIO_CONFIG_S_ACKNOWLEDGE);
const DRIVER: u8 = status_bit(VIRTIO_CONFIG_S_DRIVER);
const FEATURES_OK: u8 = status_bit(VIRTIO_CONFIG_S_FEATURES_OK);
const FAILED: u8 = status_bit(VIRTIO_CONFIG_S_FAILED);
/// What a driver may set.
const DRIVERS: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;

/// What every device of rvmm offers.
const COMMON_FEATURES: u64 = features(&[
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_RING_F_EVENT_IDX,
]);

/// In the used ring, behind its flags (section 2.7.8).
const USED_INDEX: u64 = 2;

/// A virtqueue as its driver sets it up.
pub struct QueueSetup {
    /// The largest size, of the device's choice.
    pub max_size: u16,
    /// Entries, of the driver's choice: a power of two.
    pub size: u16,
    /// Whether the driver has set it up.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table, the driver's ring and the device's ring.
    pub rings: [u64; 3],
    /// Signalled by notifications, also before the device is live.
    pub kick: Arc<EventFd>,
}

/// Which of a queue's three parts an address is of.
#[derive(Clone, Copy, Debug)]
pub enum Ring {
    /// The descriptor table.
    Descriptors = 0,
    /// The available ring.
    Driver = 1,
    /// The used ring.
    Device = 2,
}

/// Whether a device serves its queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Life {
    /// It does not: its driver is not ready, or it needs a reset.
    #[default]
    Idle,
    /// Its start was asked for.
    Live,
    /// It is about to stop, and somebody waits for that.
    Stopping,
    /// It was live, and goes on when the machine does.
    Paused,
}

/// The registers of one device, without its configuration space.
pub struct Registers {
    shared: Arc<Shared>,
    offered: u64,
    accepted: u64,
    /// Which 32 features the feature registers show: of the device, of the driver.
    pub device_select: u32,
    /// The same for what the driver accepts.
    pub driver_select: u32,
    /// Which queue the queue registers are of.
    pub queue_select: u16,
    queues: Vec<QueueSetup>,
    pub(super) life: Life,
    pub(super) bus_master: bool,
    /// The queues of a device that is paused.
    pub(super) kept: Vec<Virtq>,
}

impl Registers {
    /// Those of `device` after power-on.
    pub(super) fn new(device: &dyn VirtioDevice, shared: &Arc<Shared>) -> io::Result<Self> {
        let queues = device.queue_sizes().into_iter().map(QueueSetup::new);
        Ok(Self {
            shared: Arc::clone(shared),
            offered: device.features() | COMMON_FEATURES,
            accepted: 0,
            device_select: 0,
            driver_select: 0,
            queue_select: 0,
            queues: queues.collect::<io::Result<_>>()?,
            life: Life::Idle,
            bus_master: true,
            kept: Vec::new(),
        })
    }

    /// All queues.
    pub fn queues(&self) -> &[QueueSetup] {
        &self.queues
    }

    /// The queue that is selected, if there is one of that number.
    pub fn queue(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The selected queue as long as it can still be set up.
    fn queue_mut(&mut self) -> Option<&mut QueueSetup> {
        let queue = self.queues.get_mut(usize::from(self.queue_select))?;
        (self.life == Life::Idle && !queue.enabled).then_some(queue)
    }

    /// 32 bits of what the device offers.
    pub fn device_features(&self) -> u32 {
        match self.device_select {
            0 => Half::Low.of(self.offered),
            1 => Half::High.of(self.offered),
            _ => 0,
        }
    }

    /// 32 bits of what the driver has accepted.
    pub fn driver_features(&self) -> u32 {
        match self.driver_select {
            0 => Half::Low.of(self.accepted),
            1 => Half::High.of(self.accepted),
            _ => 0,
        }
    }

    /// The driver accepts these 32 features.
    pub fn set_driver_features(&mut self, features: u32) {
        if self.status() & FEATURES_OK != 0 {
            return;
        }
        match self.driver_select {
            0 => self.accepted = Half::Low.set(self.accepted, features),
            1 => self.accepted = Half::High.set(self.accepted, features),
            _ => {}
        }
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.shared.status.load(Ordering::Acquire)
    }

    /// The features that both sides agreed on.
    pub(super) fn features(&self) -> u64 {
        self.accepted
    }

    /// The driver writes a status that is not 0. True when the device is to start now.
    pub(super) fn add_status(&mut self, status: u8) -> bool {
        if self.life == Life::Stopping {
            return false;
        }
        let mut fresh = status & DRIVERS & !self.status();
        // VERSION_1 may be missing (section 6.2): small kernels accept the low 32 features and no
        // other, and know the layouts that come with it all the same.
        let agreed = self.accepted & !self.offered == 0;
        if fresh & FEATURES_OK != 0 && !agreed {
            // The driver reads it back, and finds that the device does not agree.
            fresh &= !FEATURES_OK;
        }
        let before = self.shared.status.fetch_or(fresh, Ordering::AcqRel);
        let may_start = (before | fresh) & FEATURES_OK != 0 && before & NEEDS_RESET == 0;
        fresh & DRIVER_OK != 0 && may_start
    }

    /// Whether the driver is ready, and the device has not failed since.
    pub(super) fn is_ready(&self) -> bool {
        const READY: u8 = FEATURES_OK | DRIVER_OK;
        self.status() & (READY | NEEDS_RESET) == READY
    }

    /// For each queue its size, and how far it is: the index of the used ring, and while the device is
    /// paused that of the next request. Who serves a queue alone knows that one.
    pub(super) fn describe_queues(&self, ram: &GuestMemory) -> Value {
        let next = |index: u16| {
            let kept = self.kept.iter().find(|queue| queue.index() == index);
            kept.map(|queue| queue.ring().next_avail())
        };
        let queues = (0u16..).zip(&self.queues).map(|(index, queue)| {
            json!({
                "size": queue.size,
                "enabled": queue.enabled,
                "used": queue.used_index(ram),
                "next_available": next(index),
            })
        });
        queues.collect()
    }

    /// Back to the state after power-on, but for the bus.
    pub(super) fn reset(&mut self) {
        self.shared.status.store(0, Ordering::Release);
        self.accepted = 0;
        self.device_select = 0;
        self.driver_select = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            queue.reset();
        }
    }

    /// The driver chooses the size of the selected queue. One that cannot be has no effect.
    pub fn set_queue_size(&mut self, size: u16) {
        if let Some(queue) = self.queue_mut() {
            if size.is_power_of_two() && size <= queue.max_size {
                queue.size = size;
            }
        }
    }

    /// The driver places a part of the selected queue.
    pub fn set_ring(&mut self, ring: Ring, half: Half, value: u32) {
        if let Some(queue) = self.queue_mut() {
            let address = &mut queue.rings[ring as usize];
            *address = half.set(*address, value);
        }
    }

    /// The driver has set up the selected queue.
    pub fn enable_queue(&mut self) {
        if let Some(queue) = self.queue_mut() {
            queue.enabled = true;
        }
    }

    /// The driver takes back that it has set up the selected queue.
    pub fn disable_queue(&mut self) {
        let queue = self.queues.get_mut(usize::from(self.queue_select));
        if let Some(queue) = queue.filter(|_| self.life == Life::Idle) {
            queue.enabled = false;
        }
    }

    /// The driver notifies a queue, by a store that the kernel did not take.
    pub fn kick(&self, index: u16) {
        if let Some(queue) = self.queues.get(usize::from(index)) {
            // It fails only when 2^64 notifications wait.
            let _ = queue.kick.write(1);
        }
    }

    /// Changes whenever the configuration space does.
    pub fn config_generation(&self) -> u32 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// The queues that the driver has enabled, as it wants them.
    ///
    /// # Errors
    /// One of them cannot be, and why.
    pub(super) fn live_queues(
        &self,
        ram: &Arc<GuestMemory>,
        fault: &Fault,
    ) -> Result<Vec<Virtq>, String> {
        let event_idx = self.accepted & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut live = Vec::new();
        for (index, setup) in (0u16..).zip(&self.queues) {
            if !setup.enabled {
                continue;
            }
            let mut queue = setup
                .live(ram)
                .map_err(|why| format!("queue {index}: {why}"))?;
            queue.set_event_idx(event_idx);
            live.push(Virtq::new(index, queue, ram, &setup.kick, fault));
        }
        Ok(live)
    }
}

impl QueueSetup {
    fn new(max_size: u16) -> io::Result<Self> {
        Ok(Self {
            max_size,
            size: max_size,
            enabled: false,
            rings: [0; 3],
            kick: Arc::new(EventFd::new(libc::EFD_CLOEXEC)?),
        })
    }

    fn reset(&mut self) {
        self.size = self.max_size;
        self.enabled = false;
        self.rings = [0; 3];
    }

    /// The index of the used ring, as it lies in RAM.
    fn used_index(&self, ram: &GuestMemory) -> Option<u16> {
        let at = self.rings[Ring::Device as usize].checked_add(USED_INDEX)?;
        let index = ram.load(GuestAddress(at), Ordering::Acquire).ok()?;
        self.enabled.then_some(u16::from_le(index))
    }

    /// The queue as the driver wants it.
    ///
    /// virtio-queue's own checks would log an error each time a guest makes one.
    fn live(&self, ram: &GuestMemory) -> Result<Queue, String> {
        let [descriptors, driver, device] = self.rings.map(GuestAddress);
        let entries = usize::from(self.size);
        // Section 2.7: flags and index, entries of 16, 2 and 8 bytes, an event index.
        let sizes = [
            (descriptors, size_of::<RawDescriptor>() * entries),
            (driver, 6 + 2 * entries),
            (device, 6 + 8 * entries),
        ];
        for (start, size) in sizes {
            if start.0 == 0 || !ram.check_range(start, size) {
                return Err(format!("its ring at {:#x} is not in RAM", start.0));
            }
        }
        let misaligned = |error| format!("{error}");
        let mut queue = Queue::new(self.max_size).map_err(misaligned)?;
        queue.try_set_size(self.size).map_err(misaligned)?;
        queue
            .try_set_desc_table_address(descriptors)
            .and_then(|()| queue.try_set_avail_ring_address(driver))
            .and_then(|()| queue.try_set_used_ring_address(device))
            .map_err(misaligned)?;
        queue.set_ready(true);
        Ok(queue)
    }
}
