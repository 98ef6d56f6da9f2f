//! A function of a PCI device: configuration space, BAR 0, interrupts.
//!
//! ```text
//! BAR 0   0x0000  the device's registers
//!         0x4000  MSI-X table
//!         0x5000  MSI-X pending bits
//!         0x8000  end
//! ```

use std::sync::{Arc, Mutex};

use super::config::ConfigSpace;
use super::interrupts::Interrupts;
use super::msix;
use crate::util::sync::lock;

/// Bytes of BAR 0.
pub const BAR_SIZE: u32 = 0x8000;
/// The device's registers end here.
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const PENDING_END: u64 = 0x6000;

/// The device behind BAR 0. Called by vCPU threads, any number at once.
pub trait BarDevice: Send + Sync {
    /// A load of `data`, zeroed, at `offset` from the BAR's start, below 0x4000.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// A store.
    fn write(&self, offset: u64, data: &[u8]);
    /// From now on the BAR is at this guest-physical address, or nowhere. Called for one move at a
    /// time.
    fn moved(&self, base: Option<u64>);
    /// From now on the device may access memory, or may not: then no access is left when this returns,
    /// and none begins. It may not at first. Called for one change at a time.
    fn set_bus_master(&self, allowed: bool);
    /// What people call the registers at `offset` of the BAR: `disk0, common configuration`. None: those
    /// of the configuration space.
    fn registers_at(&self, offset: Option<u64>) -> String;
}

/// A window into BAR 0 in the configuration space: where its control (BAR, padding, offset, length)
/// and its 4 bytes of data are. Drivers that cannot map BARs use it.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Offset of struct virtio_pci_cap's `bar`.
    pub control: u16,
    /// Offset of the data.
    pub data: u16,
}

/// One function.
pub struct Function {
    config: Mutex<ConfigSpace>,
    /// What the device and its messages know of COMMAND's bus master enable.
    bus_master: Mutex<bool>,
    /// Where MSI-X's message control is.
    msix_control: Option<u16>,
    window: Option<Window>,
    interrupts: Arc<Interrupts>,
    device: Arc<dyn BarDevice>,
}

impl Function {
    /// `device` with a configuration space that has its own capabilities, without BAR and MSI-X.
    pub fn new(
        config: ConfigSpace,
        window: Option<Window>,
        interrupts: Arc<Interrupts>,
        device: Arc<dyn BarDevice>,
    ) -> Self {
        let mut config = config.with_bar(BAR_SIZE).with_pin();
        let msix_control = interrupts.msix.as_ref().map(|msix| {
            let [low, high] = (msix.count() - 1).to_le_bytes();
            let mut body = vec![low, high];
            body.extend(BAR0_TABLE.to_le_bytes());
            body.extend(BAR0_PENDING.to_le_bytes());
            let writable = msix::CONTROL_WRITABLE.to_le_bytes();
            config.add_capability(msix::CAPABILITY, &body, &writable) + 2
        });
        Self {
            config: Mutex::new(config),
            bus_master: Mutex::new(false),
            msix_control,
            window,
            interrupts,
            device,
        }
    }

    /// A load from the configuration space.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        if let Some(at) = self.window_target(offset, data.len()) {
            return self.read(at, data);
        }
        let mut config = lock(&self.config);
        config.set_interrupt_status(self.interrupts.is_pin_asserted());
        config.read(offset, data);
    }

    /// A store through the configuration space's window into BAR 0; whether it was one.
    pub fn write_window(&self, offset: u64, data: &[u8]) -> bool {
        let target = self.window_target(offset, data.len());
        if let Some(at) = target {
            self.write(at, data);
        }
        target.is_some()
    }

    /// A store to the configuration space itself, one at a time. BAR 0 may have moved then, and the
    /// device may have lost the bus: see [`Function::bar`] and `follow_bus_master`.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        let (disabled, control) = {
            let mut config = lock(&self.config);
            config.write(offset, data);
            let control = self.msix_control.map(|at| config.word(at.into()));
            (config.is_intx_disabled(), control)
        };
        if let (Some(msix), Some(control)) = (&self.interrupts.msix, control) {
            msix.set_control(control);
        }
        self.interrupts.set_pin_disabled(disabled);
    }

    /// After a store to the configuration space: lets the device on the bus, or waits until it is off.
    pub(super) fn follow_bus_master(&self) {
        let mut known = lock(&self.bus_master);
        let allowed = lock(&self.config).is_bus_master();
        if std::mem::replace(&mut *known, allowed) == allowed {
            return;
        }
        // Messages are writes too (PCI Local Bus 3.0, section 6.8). What the device ends with goes out.
        if !allowed {
            self.device.set_bus_master(false);
        }
        if let Some(msix) = &self.interrupts.msix {
            msix.set_bus_master(allowed);
        }
        if allowed {
            self.device.set_bus_master(true);
        }
    }

    /// Where BAR 0 is, if it is decoded.
    pub fn bar(&self) -> Option<u64> {
        lock(&self.config).bar()
    }

    /// Tells the device where its BAR is.
    pub(super) fn moved(&self, base: Option<u64>) {
        self.device.moved(base);
    }

    /// A load from BAR 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, &self.interrupts.msix) {
            (0..TABLE, _) => self.device.read(offset, data),
            (TABLE..PENDING, Some(msix)) => msix.read_table(offset - TABLE, data),
            (PENDING..PENDING_END, Some(msix)) => msix.read_pending(offset - PENDING, data),
            _ => {}
        }
    }

    /// A store to BAR 0.
    pub fn write(&self, offset: u64, data: &[u8]) {
        match (offset, &self.interrupts.msix) {
            (0..TABLE, _) => self.device.write(offset, data),
            (TABLE..PENDING, Some(msix)) => msix.write_table(offset - TABLE, data),
            _ => {}
        }
    }

    /// See [`BarDevice::registers_at`].
    pub(super) fn registers_at(&self, offset: Option<u64>) -> String {
        self.device.registers_at(offset)
    }

    /// Where in BAR 0 an access to the window's data goes: only one of the length that the guest set
    /// before, and only inside.
    fn window_target(&self, offset: u64, length: usize) -> Option<u64> {
        let window = self
            .window
            .filter(|window| u64::from(window.data) == offset)?;
        let config = lock(&self.config);
        let mut control = [0; 12];
        config.read(window.control.into(), &mut control);
        let [bar, _, _, _, a, b, c, d, e, f, g, h] = control;
        let at = u64::from(u32::from_le_bytes([a, b, c, d]));
        let wanted = u32::from_le_bytes([e, f, g, h]);
        let fits = usize::try_from(wanted) == Ok(length)
            && matches!(length, 1 | 2 | 4)
            && at % length as u64 == 0
            && at < u64::from(BAR_SIZE);
        (bar == 0 && fits).then_some(at)
    }
}

/// Of the capability: an offset in BAR 0.
const BAR0_TABLE: u32 = 0x4000;
const BAR0_PENDING: u32 = 0x5000;
