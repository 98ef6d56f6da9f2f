//! Virtio over MMIO, version 2 (VIRTIO 1.2, section 4.2): registers at a fixed address, and a wired
//! interrupt.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::virtio_mmio::*;
use vmm_sys_util::eventfd::EventFd;

use super::core::{Core, Ring};
use super::starter::Starter;
use crate::bus::{Device, FdtError, FdtWriter, IrqLine, MmioDevice};
use crate::hypervisor::{self, Doorbell, Vm};
use crate::memory::GuestMemory;
use crate::snapshot::{LoadError, Parts, SaveError, Saved, State};
use crate::util::Half;
use crate::util::sync::lock;
use crate::virtio::device::VirtioDevice;
use crate::virtio::notify::Interrupt;

/// Size of the register range in bytes, as in QEMU's virt machine.
pub const SIZE: u64 = 0x1000;

/// "virt" in ASCII, little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "QEMU" in ASCII, little-endian. Kernels for QEMU's virt machine, whose memory map rvmm follows,
/// check for it.
const VENDOR: u32 = 0x554d_4551;
const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;

/// A device behind MMIO registers.
pub struct MmioTransport {
    core: Core,
    interrupt: Arc<WiredInterrupt>,
    base: u64,
    _doorbells: Doorbells,
}

impl MmioTransport {
    /// Puts `device` behind registers at guest-physical address `base`, with `line` as its
    /// interrupt. `starter` starts and stops it.
    ///
    /// # Errors
    /// Fails if the host has no file descriptors left, or if KVM refuses a doorbell.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        ram: &Arc<GuestMemory>,
        vm: &Arc<dyn Vm>,
        base: u64,
        line: IrqLine,
        starter: &Arc<Starter>,
    ) -> hypervisor::Result<Arc<Self>> {
        let interrupt = Arc::new(WiredInterrupt::new(line));
        let name = device.name().to_owned();
        let core = Core::new(
            device,
            Arc::clone(ram),
            Arc::clone(&interrupt) as _,
            starter,
        )
        .map_err(|e| hypervisor::Error::refused(format!("make {name}"), e))?;
        let doorbells = Doorbells::connect(vm, base, &core)?;
        Ok(Arc::new(Self {
            core,
            interrupt,
            base,
            _doorbells: doorbells,
        }))
    }

    fn read_register(&self, register: u32) -> u32 {
        let registers = self.core.registers();
        match register {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.core.kind(),
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => registers.device_features(),
            VIRTIO_MMIO_QUEUE_NUM_MAX => registers.queue().map_or(0, |q| q.max_size.into()),
            VIRTIO_MMIO_QUEUE_READY => registers.queue().is_some_and(|q| q.enabled).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS => registers.status().into(),
            VIRTIO_MMIO_CONFIG_GENERATION => self.core.config_generation(),
            // There are no shared memory regions, for which the length must read as all ones
            // (section 4.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW | VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            VIRTIO_MMIO_SHM_BASE_LOW | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&self, register: u32, value: u32) {
        let [status, ..] = value.to_le_bytes();
        if register == VIRTIO_MMIO_STATUS {
            // Waits until the device has stopped, because Linux does not poll the status after a
            // reset.
            return self.core.set_status(status);
        }
        let mut registers = self.core.registers();
        // A larger value than 16 bits selects no queue.
        let number = u16::try_from(value).unwrap_or(u16::MAX);
        match register {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES => registers.set_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => registers.queue_select = number,
            VIRTIO_MMIO_QUEUE_NUM => registers.set_queue_size(number),
            VIRTIO_MMIO_QUEUE_READY if value == 1 => registers.enable_queue(),
            VIRTIO_MMIO_QUEUE_READY if value == 0 => registers.disable_queue(),
            VIRTIO_MMIO_QUEUE_NOTIFY => registers.kick(number),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_QUEUE_DESC_LOW => registers.set_ring(Ring::Descriptors, Half::Low, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => registers.set_ring(Ring::Descriptors, Half::High, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => registers.set_ring(Ring::Driver, Half::Low, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => registers.set_ring(Ring::Driver, Half::High, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => registers.set_ring(Ring::Device, Half::Low, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => registers.set_ring(Ring::Device, Half::High, value),
            _ => {}
        }
    }
}

/// Registers are accessed as a whole, 32 bits. The configuration space is accessed in any width.
impl MmioDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.core.read_config(offset, data);
        } else if let (Ok(register), Ok(data)) =
            (u32::try_from(offset), <&mut [u8; 4]>::try_from(data))
        {
            *data = self.read_register(register).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.core.write_config(offset, data);
        } else if let (Ok(register), Ok(data)) = (u32::try_from(offset), <[u8; 4]>::try_from(data))
        {
            self.write_register(register, u32::from_le_bytes(data));
        }
    }
}

impl Device for MmioTransport {
    fn id(&self) -> &str {
        self.core.name()
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
        let interrupt_status = self.interrupt.status();
        let mut saved = vec![Saved::of(&SavedMmio { interrupt_status })?];
        saved.extend(self.core.save()?);
        Ok(saved)
    }

    fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        let SavedMmio { interrupt_status } = parts.take()?;
        self.core.load(parts)?;
        self.interrupt.load(interrupt_status)
    }

    fn describe(&self) -> Value {
        let mut described = self.core.describe();
        described["transport"] = "mmio".into();
        described["registers"] = self.base.into();
        described["interrupt_status"] = self.interrupt.status().into();
        described
    }

    fn fdt_node(&self, fdt: &mut FdtWriter) -> Result<(), FdtError> {
        let node = fdt.begin_node(&format!("virtio_mmio@{:x}", self.base))?;
        fdt.property_string("compatible", "virtio,mmio")?;
        fdt.property_array_u64("reg", &[self.base, SIZE])?;
        fdt.property_null("dma-coherent")?;
        let line = &self.interrupt.line;
        fdt.property_array_u32("interrupts-extended", &line.fdt_interrupt())?;
        fdt.end_node(node)
    }

    fn registers_at(&self, gpa: u64) -> Option<String> {
        let is_here = (self.base..self.base + SIZE).contains(&gpa);
        is_here.then(|| self.core.name().to_owned())
    }
}

/// The state of the transport itself. The device's is saved beside it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedMmio {
    interrupt_status: u32,
}

impl State for SavedMmio {
    const KIND: &'static str = "virtio-mmio";
    const VERSION: u32 = 1;
}

/// KVM's doorbells at QueueNotify. The value stored is the queue's number, and selects the eventfd.
struct Doorbells {
    vm: Arc<dyn Vm>,
    connected: Vec<(Doorbell, Arc<EventFd>)>,
}

impl Doorbells {
    fn connect(vm: &Arc<dyn Vm>, base: u64, core: &Core) -> hypervisor::Result<Self> {
        let mut doorbells = Self {
            vm: Arc::clone(vm),
            connected: Vec::new(),
        };
        for (index, queue) in (0u32..).zip(core.registers().queues()) {
            let doorbell = Doorbell {
                gpa: base + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY),
                value: Some(index),
            };
            vm.connect_doorbell(doorbell, &queue.kick)?;
            doorbells
                .connected
                .push((doorbell, Arc::clone(&queue.kick)));
        }
        Ok(doorbells)
    }
}

impl Drop for Doorbells {
    fn drop(&mut self) {
        for (doorbell, kick) in &self.connected {
            // The VM is dropped next, so an error does no harm.
            let _ = self.vm.disconnect_doorbell(*doorbell, kick);
        }
    }
}

/// InterruptStatus, and the wire, which is high while a bit of it is set.
struct WiredInterrupt {
    status: Mutex<u32>,
    line: IrqLine,
}

impl WiredInterrupt {
    fn new(line: IrqLine) -> Self {
        Self {
            status: Mutex::new(0),
            line,
        }
    }

    fn status(&self) -> u32 {
        *lock(&self.status)
    }

    fn raise(&self, bit: u32) {
        let mut status = lock(&self.status);
        if *status == 0 {
            self.line.set_level(true);
        }
        *status |= bit;
    }

    /// Sets a new device's status, and the level of its wire.
    fn load(&self, status: u32) -> Result<(), LoadError> {
        const KNOWN: u32 = VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG;
        if status & !KNOWN != 0 {
            let why = format!("its interrupt status is {status:#x}, with unknown bits");
            return Err(LoadError::Unfit(why));
        }
        if status != 0 {
            self.raise(status);
        }
        Ok(())
    }

    fn acknowledge(&self, bits: u32) {
        let mut status = lock(&self.status);
        let left = *status & !bits;
        if std::mem::replace(&mut *status, left) != 0 && left == 0 {
            self.line.set_level(false);
        }
    }
}

impl Interrupt for WiredInterrupt {
    fn queue(&self, _: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn config(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn queue_fd(&self, _: u16) -> Option<EventFd> {
        None
    }

    fn reset(&self) {
        self.acknowledge(u32::MAX);
    }
}
