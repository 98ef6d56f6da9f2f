//! The interrupts of a function: messages, or a pin, whose wire it shares with other functions.

use std::io;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::msix::Msix;
use crate::bus::IrqLine;
use crate::irqchip::msi::MsiRouter;
use crate::util::sync::lock;

/// A wire that several functions share. It is high while at least one of them asserts its pin.
pub(super) struct SharedLine {
    line: IrqLine,
    /// One bit for each slot. Set while the slot's function asserts its pin.
    high: Mutex<u32>,
}

impl SharedLine {
    pub(super) fn new(line: IrqLine) -> Arc<Self> {
        Arc::new(Self {
            line,
            high: Mutex::new(0),
        })
    }

    fn set(&self, slot: u32, on: bool) {
        let mut high = lock(&self.high);
        let bit = 1 << slot;
        let after = if on { *high | bit } else { *high & !bit };
        let before = std::mem::replace(&mut *high, after);
        if (before == 0) != (after == 0) {
            self.line.set_level(after != 0);
        }
    }
}

/// The interrupts of one function. Its device can raise them from any thread.
pub struct Interrupts {
    pub(super) msix: Option<Msix>,
    line: Arc<SharedLine>,
    slot: u32,
    pin: Mutex<Pin>,
}

#[derive(Default)]
struct Pin {
    asserted: bool,
    disabled: bool,
}

impl Interrupts {
    pub(super) fn new(
        line: &Arc<SharedLine>,
        slot: u32,
        messages: Option<(&Arc<MsiRouter>, u16)>,
    ) -> io::Result<Self> {
        let messages = messages.filter(|(_, count)| *count > 0);
        let msix = messages.map(|(router, count)| Msix::new(router, count));
        Ok(Self {
            msix: msix.transpose()?,
            line: Arc::clone(line),
            slot,
            pin: Mutex::default(),
        })
    }

    /// The number of messages that the function has. 0 if it has only its pin.
    pub fn vectors(&self) -> u16 {
        self.msix.as_ref().map_or(0, Msix::count)
    }

    /// Whether the guest has enabled messages (MSI-X), so that the function does not use its pin.
    pub fn uses_messages(&self) -> bool {
        self.msix.as_ref().is_some_and(Msix::is_enabled)
    }

    /// Sends the message of `vector`. Does nothing if there is no such vector.
    pub fn message(&self, vector: u16) {
        if let Some(msix) = &self.msix {
            msix.signal(vector);
        }
    }

    /// The eventfd of `vector`. To signal it sends the vector's message.
    pub fn message_fd(&self, vector: u16) -> Option<EventFd> {
        self.msix.as_ref()?.descriptor(vector)
    }

    /// Asserts or deasserts the pin. It has no effect on the wire while the guest has disabled the
    /// pin or uses messages.
    pub fn set_pin(&self, high: bool) {
        let mut pin = lock(&self.pin);
        pin.asserted = high;
        self.drive(&pin);
    }

    /// Takes over COMMAND's INTx disable, and updates the wire. To be called when that bit, or
    /// [`Interrupts::uses_messages`], may have changed.
    pub(super) fn set_pin_disabled(&self, disabled: bool) {
        let mut pin = lock(&self.pin);
        pin.disabled = disabled;
        self.drive(&pin);
    }

    /// The interrupt status bit of STATUS. INTx disable does not hide it (PCI Local Bus 3.0,
    /// section 6.2.3).
    pub(super) fn is_pin_asserted(&self) -> bool {
        lock(&self.pin).asserted && !self.uses_messages()
    }

    /// Sets the function's level on the shared wire. A function with messages enabled must not use
    /// its pin (section 6.8.2.3), also if it asserted the pin before.
    fn drive(&self, pin: &Pin) {
        let high = pin.asserted && !pin.disabled && !self.uses_messages();
        self.line.set(self.slot, high);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::IrqSink;

    #[derive(Default)]
    struct Levels(Mutex<Vec<bool>>);

    impl IrqSink for Levels {
        fn set_level(&self, _: u32, high: bool) {
            lock(&self.0).push(high);
        }
        fn fdt_interrupt(&self, _: u32) -> Vec<u32> {
            Vec::new()
        }
    }

    #[test]
    fn a_shared_wire_is_high_while_one_pulls() {
        let levels = Arc::new(Levels::default());
        let line = SharedLine::new(IrqLine::new(Arc::clone(&levels) as _, 32));
        let function = |slot| Interrupts::new(&line, slot, None).unwrap();
        let (one, two) = (function(1), function(5));
        one.set_pin(true);
        two.set_pin(true);
        one.set_pin(false);
        two.set_pin_disabled(true);
        assert_eq!(*lock(&levels.0), [true, false]);
        assert!(two.is_pin_asserted());
        two.set_pin_disabled(false);
        two.set_pin(false);
        assert_eq!(*lock(&levels.0), [true, false, true, false]);
    }
}
