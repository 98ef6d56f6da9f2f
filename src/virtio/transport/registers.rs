//! The state that a driver sets up in the registers of any transport.
//!
//! Nothing here starts, stops or waits: `core` does that. `saved` is their state in a snapshot.

mod saved;

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
pub(super) use saved::SavedRegisters;

const ACKNOWLEDGE: u8 = status_bit(VIRTIO_CONFIG_S_ACKNOWLEDGE);
const DRIVER: u8 = status_bit(VIRTIO_CONFIG_S_DRIVER);
const FEATURES_OK: u8 = status_bit(VIRTIO_CONFIG_S_FEATURES_OK);
/// The status of a driver that is ready.
const READY: u8 = FEATURES_OK | DRIVER_OK;
const FAILED: u8 = status_bit(VIRTIO_CONFIG_S_FAILED);
/// The status bits that a driver may set.
const DRIVERS: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;

/// The features that every device of rvmm offers.
const COMMON_FEATURES: u64 = features(&[
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_RING_F_EVENT_IDX,
]);

/// Offset of the index in the used ring, after the flags (section 2.7.8).
const USED_INDEX: u64 = 2;

/// A virtqueue as its driver sets it up.
pub struct QueueSetup {
    /// The largest size. The device chooses it.
    pub max_size: u16,
    /// The number of entries, a power of two. The driver chooses it.
    pub size: u16,
    /// Whether the driver has enabled the queue.
    pub enabled: bool,
    /// Guest-physical addresses of the descriptor table, the available ring and the used ring, in
    /// the order of [`Ring`].
    pub rings: [u64; 3],
    /// The eventfd that available buffer notifications signal, even before the device is live.
    pub kick: Arc<EventFd>,
}

/// A part of a queue.
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
    /// It does not: its driver is not ready, or the device needs a reset.
    #[default]
    Idle,
    /// The devices thread has been asked to start it. The start may have failed.
    Live,
    /// A thread is stopping it, and waits for that.
    Stopping,
    /// It was live, and goes on when the machine does.
    Paused,
}

/// The registers of one device, without its configuration space.
pub struct Registers {
    shared: Arc<Shared>,
    offered: u64,
    accepted: u64,
    /// Which 32 of the device's features the feature register shows.
    pub device_select: u32,
    /// Which 32 of the driver's features the feature register shows.
    pub driver_select: u32,
    /// The queue that the queue registers refer to.
    pub queue_select: u16,
    queues: Vec<QueueSetup>,
    pub(super) life: Life,
    pub(super) bus_master: bool,
    /// The queues of a paused device.
    pub(super) kept: Vec<Virtq>,
}

impl Registers {
    /// Returns the registers of `device` after power-on.
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

    /// The selected queue; `None` if the number is too large.
    pub fn queue(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The selected queue if the driver may still change it.
    fn queue_mut(&mut self) -> Option<&mut QueueSetup> {
        let queue = self.queues.get_mut(usize::from(self.queue_select))?;
        (self.life == Life::Idle && !queue.enabled).then_some(queue)
    }

    /// The selected 32 bits of the features that the device offers.
    pub fn device_features(&self) -> u32 {
        match self.device_select {
            0 => Half::Low.of(self.offered),
            1 => Half::High.of(self.offered),
            _ => 0,
        }
    }

    /// The selected 32 bits of the features that the driver has accepted.
    pub fn driver_features(&self) -> u32 {
        match self.driver_select {
            0 => Half::Low.of(self.accepted),
            1 => Half::High.of(self.accepted),
            _ => 0,
        }
    }

    /// Sets the selected 32 bits of the features that the driver accepts.
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

    /// The features that device and driver agreed on.
    pub(super) fn features(&self) -> u64 {
        self.accepted
    }

    /// Handles the driver's write of a status other than 0. True if the device must start now.
    pub(super) fn add_status(&mut self, status: u8) -> bool {
        if self.life == Life::Stopping {
            return false;
        }
        let mut fresh = status & DRIVERS & !self.status();
        // A driver need not accept VERSION_1 (section 6.2). Small kernels accept only the low 32
        // features, and still use the layouts of VERSION_1.
        let agreed = self.accepted & !self.offered == 0;
        if fresh & FEATURES_OK != 0 && !agreed {
            // The driver reads the status back, and finds that the device does not agree.
            fresh &= !FEATURES_OK;
        }
        let before = self.shared.status.fetch_or(fresh, Ordering::AcqRel);
        let may_start = (before | fresh) & FEATURES_OK != 0 && before & NEEDS_RESET == 0;
        fresh & DRIVER_OK != 0 && may_start
    }

    /// Whether the driver is ready, and the device does not need a reset.
    pub(super) fn is_ready(&self) -> bool {
        self.status() & (READY | NEEDS_RESET) == READY
    }

    /// Describes each queue: its size, the used ring's index, and the available ring's index of the
    /// next request. The latter is known only while the device is paused, because otherwise the
    /// serving thread has it.
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

    /// Resets everything to the state after power-on, except bus master enable.
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

    /// Sets the size of the selected queue. An invalid size has no effect.
    pub fn set_queue_size(&mut self, size: u16) {
        if let Some(queue) = self.queue_mut() {
            if queue.may_have(size) {
                queue.size = size;
            }
        }
    }

    /// Sets half of the address of a part of the selected queue.
    pub fn set_ring(&mut self, ring: Ring, half: Half, value: u32) {
        if let Some(queue) = self.queue_mut() {
            let address = &mut queue.rings[ring as usize];
            *address = half.set(*address, value);
        }
    }

    /// Enables the selected queue.
    pub fn enable_queue(&mut self) {
        if let Some(queue) = self.queue_mut() {
            queue.enabled = true;
        }
    }

    /// Disables the selected queue. Has no effect while the device is live, stopping or paused.
    pub fn disable_queue(&mut self) {
        let queue = self.queues.get_mut(usize::from(self.queue_select));
        if let Some(queue) = queue.filter(|_| self.life == Life::Idle) {
            queue.enabled = false;
        }
    }

    /// Passes on the driver's notification of a queue, from a store that KVM did not handle itself.
    pub fn kick(&self, index: u16) {
        if let Some(queue) = self.queues.get(usize::from(index)) {
            // Fails only with 2^64 notifications pending.
            let _ = queue.kick.write(1);
        }
    }

    /// A number that changes with each change of the configuration space.
    pub fn config_generation(&self) -> u32 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// Returns the enabled queues, set up as the driver has configured them.
    ///
    /// # Errors
    /// Fails with a reason if a queue's addresses are invalid.
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

    /// Whether the queue may have `size` entries.
    fn may_have(&self, size: u16) -> bool {
        size.is_power_of_two() && size <= self.max_size
    }

    /// The used ring's index in RAM.
    fn used_index(&self, ram: &GuestMemory) -> Option<u16> {
        let at = self.rings[Ring::Device as usize].checked_add(USED_INDEX)?;
        let index = ram.load(GuestAddress(at), Ordering::Acquire).ok()?;
        self.enabled.then_some(u16::from_le(index))
    }

    /// Returns the queue as the driver has configured it.
    ///
    /// Checks the addresses first: virtio-queue's own checks log an error each time, and a guest
    /// could repeat that without limit.
    fn live(&self, ram: &GuestMemory) -> Result<Queue, String> {
        let [descriptors, driver, device] = self.rings.map(GuestAddress);
        let entries = usize::from(self.size);
        // Sizes of the parts (section 2.7). Descriptors have 16 bytes. Both rings have flags, an
        // index and an event index of 2 bytes each; entries have 2 and 8 bytes.
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
