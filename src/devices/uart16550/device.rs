//! The UART as a part of the machine.

use serde_json::{Value, json};

use super::saved::UartState;
use super::{SIZE, Uart};
use crate::bus::{Device, FdtError, FdtWriter};
use crate::snapshot::{LoadError, Parts, SaveError, Saved};
use crate::util::sync::lock;

/// Input clock in Hz. Drivers need one to compute the divisor, which has no effect here.
const CLOCK: u32 = 3_686_400;

impl Device for Uart {
    fn id(&self) -> &str {
        "uart"
    }

    fn describe(&self) -> Value {
        let chip = lock(&self.chip);
        json!({
            "kind": "uart16550",
            "registers": self.base,
            "interrupt": chip.level,
            "input_bytes": self.console.input_len(),
        })
    }

    /// Input that arrives while the machine is paused raises the interrupt when it is resumed.
    fn pause(&self) {
        lock(&self.chip).is_paused = true;
    }

    fn resume(&self) {
        let mut chip = lock(&self.chip);
        chip.is_paused = false;
        self.with_chip(&mut chip, |_| ());
    }

    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        let state = UartState::of(&lock(&self.chip));
        Ok(vec![Saved::of(&state)?])
    }

    /// The console's queues are saved apart from this device.
    fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        let state: UartState = parts.take()?;
        let mut chip = lock(&self.chip);
        (chip.registers, chip.level) = state.restored()?;
        self.line.set_level(chip.level);
        Ok(())
    }

    fn fdt_node(&self, fdt: &mut FdtWriter) -> Result<(), FdtError> {
        let node = fdt.begin_node(&format!("serial@{:x}", self.base))?;
        fdt.property_string("compatible", "ns16550a")?;
        fdt.property_array_u64("reg", &[self.base, SIZE])?;
        fdt.property_u32("clock-frequency", CLOCK)?;
        fdt.property_array_u32("interrupts-extended", &self.line.fdt_interrupt())?;
        fdt.end_node(node)
    }
}
