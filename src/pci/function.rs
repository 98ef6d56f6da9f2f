//! A function of a PCI device: its configuration space, BAR 0 and interrupts.
//!
//! ```text
//! BAR 0   0x0000  the device's registers
//!         0x4000  MSI-X table
//!         0x5000  MSI-X pending bits
//!         0x8000  end
//! ```

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::config::{ConfigSpace, SavedConfig};
use super::interrupts::Interrupts;
use super::msix::{self, Msix, SavedMessage};
use crate::util::sync::lock;

/// The size of BAR 0 in bytes.
pub const BAR_SIZE: u32 = 0x8000;
/// Offsets in BAR 0. The device's registers are below `TABLE`.
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const PENDING_END: u64 = 0x6000;
/// The largest number of MSI-X vectors. Their table has an entry of 16 bytes for each.
pub(super) const VECTORS_MAX: u16 = 256;

/// The device behind BAR 0. The vCPUs' threads call the methods, several at the same time.
pub trait BarDevice: Send + Sync {
    /// Serves a load at `offset` in the BAR, which is below 0x4000. `data` is zero.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Serves a store at `offset` in the BAR, which is below 0x4000.
    fn write(&self, offset: u64, data: &[u8]);
    /// From now on, the BAR is at guest-physical address `base`. `None` if it is not mapped. Calls
    /// of this method do not overlap.
    fn moved(&self, base: Option<u64>);
    /// Sets whether the device may access guest memory; at first it may not. If `allowed` is false,
    /// all accesses have ended when this returns, and no new one begins. Calls of this method do
    /// not overlap.
    fn set_bus_master(&self, allowed: bool);
    /// A readable name for the registers at `offset` in the BAR, such as
    /// `disk0, common configuration`. `None` stands for the configuration space.
    fn registers_at(&self, offset: Option<u64>) -> String;
}

/// A window in the configuration space through which drivers that cannot map BARs access BAR 0. It
/// has a control (BAR, padding, offset, length) and 4 bytes of data: VIRTIO_PCI_CAP_PCI_CFG.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// The offset of the control: that of `bar` in struct virtio_pci_cap.
    pub control: u16,
    /// The offset of the data.
    pub data: u16,
}

/// The saved state of a function.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedFunction {
    config: SavedConfig,
    /// One for each vector of MSI-X. None if the function has only its pin.
    messages: Vec<SavedMessage>,
}

impl SavedFunction {
    /// The number of vectors.
    pub(super) fn vectors(&self) -> usize {
        self.messages.len()
    }
}

/// A function of a PCI device.
pub struct Function {
    config: Mutex<ConfigSpace>,
    /// The bus master enable bit of COMMAND, as it was last passed to the device and to MSI-X.
    bus_master: Mutex<bool>,
    /// The offset of MSI-X's message control in the configuration space.
    msix_control: Option<u16>,
    window: Option<Window>,
    interrupts: Arc<Interrupts>,
    device: Arc<dyn BarDevice>,
}

impl Function {
    /// Creates the function of `device`. `config` has the device's own capabilities; this adds BAR
    /// 0, the pin and MSI-X.
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

    /// Serves a load from the configuration space.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        if let Some(at) = self.window_target(offset, data.len()) {
            return self.read(at, data);
        }
        let mut config = lock(&self.config);
        config.set_interrupt_status(self.interrupts.is_pin_asserted());
        config.read(offset, data);
    }

    /// Serves a store through the configuration space's window into BAR 0. Returns false if the
    /// store is not such a one.
    pub fn write_window(&self, offset: u64, data: &[u8]) -> bool {
        let target = self.window_target(offset, data.len());
        if let Some(at) = target {
            self.write(at, data);
        }
        target.is_some()
    }

    /// Serves a store to the configuration space itself. The caller makes sure that there is one at
    /// a time. The store may have moved BAR 0, and may have changed the bus master enable bit: see
    /// [`Function::bar`] and `follow_bus_master`.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        lock(&self.config).write(offset, data);
        self.follow_config();
    }

    /// Passes on what the configuration space says about interrupts.
    fn follow_config(&self) {
        let (disabled, control) = {
            let config = lock(&self.config);
            let control = self.msix_control.map(|at| config.word(at.into()));
            (config.is_intx_disabled(), control)
        };
        if let (Some(msix), Some(control)) = (&self.interrupts.msix, control) {
            msix.set_control(control);
        }
        self.interrupts.set_pin_disabled(disabled);
    }

    /// Passes on a change of the bus master enable bit. To be called after a store to the
    /// configuration space. If the bit was cleared, waits until the device has ended its accesses
    /// to memory.
    pub(super) fn follow_bus_master(&self) {
        let mut known = lock(&self.bus_master);
        let allowed = lock(&self.config).is_bus_master();
        if std::mem::replace(&mut *known, allowed) == allowed {
            return;
        }
        // Messages are memory writes too (PCI Local Bus 3.0, section 6.8), so they need the bit as
        // well. The device stops first, so that its last messages are still sent.
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

    /// The state of configuration space and messages. The device has the rest.
    pub(super) fn save(&self) -> SavedFunction {
        let msix = self.interrupts.msix.as_ref();
        SavedFunction {
            config: lock(&self.config).save(),
            messages: msix.map(Msix::save).unwrap_or_default(),
        }
    }

    /// Takes over `saved`. The function must be new. This may have moved BAR 0, and may have set
    /// the bus master enable bit, without which no message is connected: see
    /// [`Function::write_config`].
    ///
    /// # Errors
    /// Fails if the function cannot have this state.
    pub(super) fn load(&self, saved: &SavedFunction) -> Result<(), String> {
        match &self.interrupts.msix {
            Some(msix) => msix.load(&saved.messages)?,
            None if saved.messages.is_empty() => {}
            None => return Err("it has messages in the snapshot, and only a pin now".into()),
        }
        lock(&self.config).load(&saved.config)?;
        self.follow_config();
        Ok(())
    }

    /// The guest-physical address of BAR 0. `None` if memory decoding is off.
    pub fn bar(&self) -> Option<u64> {
        lock(&self.config).bar()
    }

    /// Calls [`BarDevice::moved`].
    pub(super) fn moved(&self, base: Option<u64>) {
        self.device.moved(base);
    }

    /// Serves a load from BAR 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, &self.interrupts.msix) {
            (0..TABLE, _) => self.device.read(offset, data),
            (TABLE..PENDING, Some(msix)) => msix.read_table(offset - TABLE, data),
            (PENDING..PENDING_END, Some(msix)) => msix.read_pending(offset - PENDING, data),
            _ => {}
        }
    }

    /// Serves a store to BAR 0.
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

    /// The offset in BAR 0 of an access through the window's data. `None` if the access is not at
    /// the window's data, does not have the length that the guest has set in the control, or if the
    /// offset there is not aligned or not inside BAR 0.
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

/// The values of the MSI-X capability's table and pending bit array registers. The low bits, which
/// are zero, select BAR 0; the others are the offset in it.
const BAR0_TABLE: u32 = 0x4000;
const BAR0_PENDING: u32 = 0x5000;
