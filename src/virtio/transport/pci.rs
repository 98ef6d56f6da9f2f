//! Virtio over PCI (VIRTIO 1.2, section 4.1), modern devices only. The registers are in BAR 0:
//!
//! ```text
//! 0x0000  common configuration     0x2000  the device's configuration space
//! 0x1000  ISR status               0x3000  notifications, 4 bytes for each queue
//! ```
//!
//! `interrupt` sends the device's interrupts.

mod interrupt;

use std::sync::{Arc, Mutex, OnceLock};

use anyhow::Result;
use serde_json::Value;
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET};
use vmm_sys_util::eventfd::EventFd;

use self::interrupt::{PciInterrupt, SavedInterrupt};
use super::core::{Core, Ring};
use super::starter::Starter;
use crate::bus::{Device, FdtError, FdtWriter};
use crate::hypervisor::{Doorbell, Vm};
use crate::memory::GuestMemory;
use crate::pci::function::Window;
use crate::pci::{BarDevice, ConfigSpace, Function, HostBridge, Identity};
use crate::snapshot::{LoadError, Parts, SaveError, Saved};
use crate::util::sync::lock;
use crate::util::{Half, RateLimit, guest_info, guest_warn};
use crate::virtio::device::VirtioDevice;

/// The PCI vendor of all virtio devices.
const VENDOR: u16 = 0x1af4;
/// PCI device id of a modern device, minus its virtio type.
const DEVICE: u16 = 0x1040;
const COMMON: u32 = 0x0000;
const ISR: u32 = 0x1000;
const CONFIG: u32 = 0x2000;
const NOTIFY: u32 = 0x3000;
/// Size of each part in bytes.
const PART: u32 = 0x1000;
/// Size of the common configuration in bytes.
const COMMON_SIZE: u32 = 0x40;
/// Distance in bytes between the notification addresses of two queues.
const NOTIFY_STEP: u32 = 4;

/// Fields of the common configuration, by offset and width (section 4.1.4.3).
mod field {
    type Field = (u64, usize);

    pub(super) const DEVICE_FEATURE_SELECT: Field = (0x00, 4);
    pub(super) const DEVICE_FEATURE: Field = (0x04, 4);
    pub(super) const DRIVER_FEATURE_SELECT: Field = (0x08, 4);
    pub(super) const DRIVER_FEATURE: Field = (0x0c, 4);
    pub(super) const CONFIG_VECTOR: Field = (0x10, 2);
    pub(super) const NUM_QUEUES: Field = (0x12, 2);
    pub(super) const STATUS: Field = (0x14, 1);
    pub(super) const CONFIG_GENERATION: Field = (0x15, 1);
    pub(super) const QUEUE_SELECT: Field = (0x16, 2);
    pub(super) const QUEUE_SIZE: Field = (0x18, 2);
    pub(super) const QUEUE_VECTOR: Field = (0x1a, 2);
    pub(super) const QUEUE_ENABLE: Field = (0x1c, 2);
    pub(super) const QUEUE_NOTIFY_OFF: Field = (0x1e, 2);
    pub(super) const QUEUE_DESC_LOW: Field = (0x20, 4);
    pub(super) const QUEUE_DESC_HIGH: Field = (0x24, 4);
    pub(super) const QUEUE_DRIVER_LOW: Field = (0x28, 4);
    pub(super) const QUEUE_DRIVER_HIGH: Field = (0x2c, 4);
    pub(super) const QUEUE_DEVICE_LOW: Field = (0x30, 4);
    pub(super) const QUEUE_DEVICE_HIGH: Field = (0x34, 4);
}

/// A device behind a PCI function.
pub struct PciTransport {
    core: Core,
    interrupt: Arc<PciInterrupt>,
    doorbells: Mutex<Doorbells>,
    /// The device number on the bus. Set after the function is attached.
    slot: OnceLock<usize>,
}

impl PciTransport {
    /// Attaches `device` to `bridge` with at most `vectors` MSI-X vectors. With fewer vectors than
    /// queues plus one, queues share vectors. `starter` starts and stops the device.
    ///
    /// # Errors
    /// Fails if the bus is full, or if the host has no file descriptors or interrupts left.
    pub fn attach(
        device: Box<dyn VirtioDevice>,
        ram: &Arc<GuestMemory>,
        vm: &Arc<dyn Vm>,
        bridge: &mut HostBridge,
        vectors: u16,
        starter: &Arc<Starter>,
    ) -> Result<Arc<Self>> {
        let identity = identity(device.kind());
        let queues = device.queue_sizes().len();
        let name = device.name().to_owned();
        let interrupts = bridge.interrupts(vectors)?;
        let interrupt = Arc::new(PciInterrupt::new(Arc::clone(&interrupts), queues));
        let raised = Arc::clone(&interrupt);
        let core = Core::new(device, Arc::clone(ram), raised as _, starter)?;
        core.set_bus_master(false);
        let doorbells = Doorbells::new(vm, &core);
        let transport = Arc::new(Self {
            core,
            interrupt,
            doorbells: Mutex::new(doorbells),
            slot: OnceLock::new(),
        });
        let (config, window) = config_space(identity);
        let device = Arc::clone(&transport);
        let function = Function::new(config, Some(window), Arc::clone(&interrupts), device);
        let slot = bridge.attach(function)?;
        transport.slot.get_or_init(|| slot);
        let how = match usize::from(interrupts.vectors()) {
            0 => "by pin".into(),
            count if count > queues => format!("by {count} messages, each queue its own"),
            count => format!("by {count} messages, queues share one"),
        };
        let limit = RateLimit::named(format!("{name} on PCI"));
        guest_info!(
            limit,
            "{name}: PCI device {slot}, {queues} queues, interrupts {how}"
        );
        Ok(transport)
    }

    /// Reads a field of the common configuration. Zero if offset and width match no field.
    fn read_common(&self, offset: u64, length: usize) -> u64 {
        let registers = self.core.registers();
        let queue = registers.queue();
        let ring = |ring: Ring| queue.map_or(0, |queue| queue.rings[ring as usize]);
        let half = |which: Ring, half: Half| half.of(ring(which)).into();
        match (offset, length) {
            field::DEVICE_FEATURE_SELECT => registers.device_select.into(),
            field::DEVICE_FEATURE => registers.device_features().into(),
            field::DRIVER_FEATURE_SELECT => registers.driver_select.into(),
            field::DRIVER_FEATURE => registers.driver_features().into(),
            field::CONFIG_VECTOR => self.interrupt.config_vector().into(),
            field::NUM_QUEUES => registers.queues().len() as u64,
            field::STATUS => registers.status().into(),
            field::CONFIG_GENERATION => (self.core.config_generation() & 0xff).into(),
            field::QUEUE_SELECT => registers.queue_select.into(),
            field::QUEUE_SIZE => queue.map_or(0, |queue| queue.size.into()),
            field::QUEUE_VECTOR => self.interrupt.queue_vector(registers.queue_select).into(),
            field::QUEUE_ENABLE => queue.is_some_and(|queue| queue.enabled).into(),
            field::QUEUE_NOTIFY_OFF => queue.map_or(0, |_| registers.queue_select.into()),
            field::QUEUE_DESC_LOW => half(Ring::Descriptors, Half::Low),
            field::QUEUE_DESC_HIGH => half(Ring::Descriptors, Half::High),
            field::QUEUE_DRIVER_LOW => half(Ring::Driver, Half::Low),
            field::QUEUE_DRIVER_HIGH => half(Ring::Driver, Half::High),
            field::QUEUE_DEVICE_LOW => half(Ring::Device, Half::Low),
            field::QUEUE_DEVICE_HIGH => half(Ring::Device, Half::High),
            _ => 0,
        }
    }

    fn write_common(&self, offset: u64, length: usize, value: u32) {
        let [low, high, ..] = value.to_le_bytes();
        if (offset, length) == field::STATUS {
            return self.core.set_status(low);
        }
        let word = u16::from_le_bytes([low, high]);
        let mut registers = self.core.registers();
        match (offset, length) {
            field::DEVICE_FEATURE_SELECT => registers.device_select = value,
            field::DRIVER_FEATURE_SELECT => registers.driver_select = value,
            field::DRIVER_FEATURE => registers.set_driver_features(value),
            field::CONFIG_VECTOR => self.interrupt.set_config_vector(word),
            field::QUEUE_SELECT => registers.queue_select = word,
            field::QUEUE_SIZE => registers.set_queue_size(word),
            field::QUEUE_VECTOR => self
                .interrupt
                .set_queue_vector(registers.queue_select, word),
            field::QUEUE_ENABLE if word == 1 => registers.enable_queue(),
            field::QUEUE_DESC_LOW => registers.set_ring(Ring::Descriptors, Half::Low, value),
            field::QUEUE_DESC_HIGH => registers.set_ring(Ring::Descriptors, Half::High, value),
            field::QUEUE_DRIVER_LOW => registers.set_ring(Ring::Driver, Half::Low, value),
            field::QUEUE_DRIVER_HIGH => registers.set_ring(Ring::Driver, Half::High, value),
            field::QUEUE_DEVICE_LOW => registers.set_ring(Ring::Device, Half::Low, value),
            field::QUEUE_DEVICE_HIGH => registers.set_ring(Ring::Device, Half::High, value),
            _ => {}
        }
    }
}

/// Fields are read and written as a whole; 64-bit fields also in halves. Other reads return zero,
/// and other writes have no effect.
impl BarDevice for PciTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (part, offset) = part(offset);
        match (part, data.len()) {
            (COMMON, 8) if offset < COMMON_SIZE.into() => {
                self.read(offset, &mut data[..4]);
                self.read(offset + 4, &mut data[4..]);
            }
            (COMMON, length) => {
                let value = self.read_common(offset, length).to_le_bytes();
                data.copy_from_slice(&value[..length]);
            }
            (ISR, _) if offset == 0 => data[0] = self.interrupt.take(),
            (CONFIG, _) => self.core.read_config(offset, data),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (part, offset) = part(offset);
        let mut value = [0; 4];
        match (part, data.len()) {
            (COMMON, 8) if offset < COMMON_SIZE.into() => {
                self.write(offset, &data[..4]);
                self.write(offset + 4, &data[4..]);
            }
            (COMMON, length @ ..=4) => {
                value[..length].copy_from_slice(data);
                self.write_common(offset, length, u32::from_le_bytes(value));
            }
            (CONFIG, _) => self.core.write_config(offset, data),
            // KVM handles stores to the BAR itself. Here come stores through the window in the
            // configuration space, and all stores if KVM refused the doorbell.
            (NOTIFY, _) => {
                let queue = u16::try_from(offset / u64::from(NOTIFY_STEP));
                self.core.registers().kick(queue.unwrap_or(u16::MAX));
            }
            _ => {}
        }
    }

    fn moved(&self, base: Option<u64>) {
        lock(&self.doorbells).follow(base);
    }

    fn registers_at(&self, offset: Option<u64>) -> String {
        let registers = match offset.map(|offset| part(offset).0) {
            None => "PCI configuration",
            Some(COMMON) => "common configuration",
            Some(ISR) => "ISR status",
            Some(CONFIG) => "device configuration",
            Some(NOTIFY) => "notifications",
            Some(_) => "MSI-X",
        };
        format!("{}, {registers}", self.core.name())
    }

    fn set_bus_master(&self, allowed: bool) {
        self.core.set_bus_master(allowed);
        if !allowed {
            // The pin may be shared. It must go low now, not when this device is reset.
            self.interrupt.take();
        }
    }
}

/// The device has no device tree node and no fixed address of its own: the bridge describes both.
impl Device for PciTransport {
    fn id(&self) -> &str {
        self.core.name()
    }

    fn fdt_node(&self, _: &mut FdtWriter) -> Result<(), FdtError> {
        Ok(())
    }

    fn pause(&self) {
        self.core.pause();
    }

    fn resume(&self) {
        self.core.resume();
    }

    fn settle(&self) {
        self.core.wait_settled();
    }

    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        let mut saved = vec![Saved::of(&self.interrupt.save())?];
        saved.extend(self.core.save()?);
        Ok(saved)
    }

    /// The bridge must have been loaded. That has placed the doorbells, set bus master enable, and
    /// connected the messages.
    fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        let interrupt: SavedInterrupt = parts.take()?;
        self.core.load(parts)?;
        self.interrupt.load(&interrupt)
    }

    fn describe(&self) -> Value {
        let mut described = self.core.describe();
        described["transport"] = "pci".into();
        described["slot"] = self.slot.get().copied().into();
        described["interrupt_status"] = self.interrupt.status().into();
        described
    }
}

/// Splits an offset in the BAR into the start of its part and the offset within that.
fn part(offset: u64) -> (u32, u64) {
    let offset = u32::try_from(offset).unwrap_or(u32::MAX);
    (offset - offset % PART, (offset % PART).into())
}

/// KVM's doorbells, which follow the address of BAR 0.
struct Doorbells {
    vm: Arc<dyn Vm>,
    kicks: Vec<Arc<EventFd>>,
    connected: Vec<(Doorbell, Arc<EventFd>)>,
    failures: RateLimit,
}

impl Doorbells {
    fn new(vm: &Arc<dyn Vm>, core: &Core) -> Self {
        Self {
            vm: Arc::clone(vm),
            kicks: core
                .registers()
                .queues()
                .iter()
                .map(|q| Arc::clone(&q.kick))
                .collect(),
            connected: Vec::new(),
            failures: RateLimit::named(format!("{} doorbells", core.name())),
        }
    }

    fn follow(&mut self, base: Option<u64>) {
        for (doorbell, kick) in self.connected.drain(..) {
            if let Err(error) = self.vm.disconnect_doorbell(doorbell, &kick) {
                guest_warn!(self.failures, "{error}");
            }
        }
        let Some(base) = base else { return };
        let first = base + u64::from(NOTIFY);
        let places = (first..).step_by(NOTIFY_STEP as usize);
        for (gpa, kick) in places.zip(&self.kicks) {
            let doorbell = Doorbell { gpa, value: None };
            match self.vm.connect_doorbell(doorbell, kick) {
                Ok(()) => self.connected.push((doorbell, Arc::clone(kick))),
                // KVM then reports the stores as exits, and `write` handles them.
                Err(error) => guest_warn!(self.failures, "{error}"),
            }
        }
    }
}

impl Drop for Doorbells {
    fn drop(&mut self) {
        self.follow(None);
    }
}

fn identity(kind: u32) -> Identity {
    Identity {
        vendor: VENDOR,
        device: DEVICE + u16::try_from(kind).unwrap_or(0),
        class: match kind {
            VIRTIO_ID_NET => 0x02_0000,
            VIRTIO_ID_BLOCK => 0x01_8000,
            VIRTIO_ID_CONSOLE => 0x07_8000,
            _ => 0x00_ff00,
        },
        revision: 1,
        subsystem: 0x1100,
    }
}

/// Returns a configuration space with the capabilities for the registers' places (section 4.1.4).
fn config_space(identity: Identity) -> (ConfigSpace, Window) {
    const VENDOR_SPECIFIC: u8 = 0x09;
    let mut config = ConfigSpace::new(identity);
    let mut add = |kind: u8, offset: u32, length: u32, more: &[u8], writable: &[u8]| {
        let length_of_all = u8::try_from(16 + more.len()).unwrap_or(u8::MAX);
        // Length, type, BAR, id, padding.
        let mut body = vec![length_of_all, kind, 0, 0, 0, 0];
        body.extend(offset.to_le_bytes());
        body.extend(length.to_le_bytes());
        body.extend(more);
        config.add_capability(VENDOR_SPECIFIC, &body, writable)
    };
    add(1, COMMON, COMMON_SIZE, &[], &[]);
    add(2, NOTIFY, PART, &NOTIFY_STEP.to_le_bytes(), &[]);
    add(3, ISR, 1, &[], &[]);
    add(4, CONFIG, PART, &[], &[]);
    // PCI configuration access: the driver writes BAR, offset and length, and then accesses the
    // registers through the data field.
    let mut writable = [0; 18];
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    let at = add(5, 0, 0, &[0; 4], &writable);
    let window = Window {
        control: at + 4,
        data: at + 16,
    };
    (config, window)
}
