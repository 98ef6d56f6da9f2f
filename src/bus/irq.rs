//! A wired interrupt as a device sees it.

use std::sync::Arc;

/// Where wired interrupts end: an interrupt controller. Never calls back into devices.
pub trait IrqSink: Send + Sync {
    /// Sets the level of the wire to `source`.
    fn set_level(&self, source: u32, high: bool);
    /// `source` as `interrupts-extended` names it: the controller's phandle, then its cells.
    fn fdt_interrupt(&self, source: u32) -> Vec<u32>;
}

/// One level-triggered wire from a device to the interrupt controller.
#[derive(Clone)]
pub struct IrqLine {
    sink: Arc<dyn IrqSink>,
    source: u32,
}

impl IrqLine {
    /// The wire to `source` of `sink`.
    pub fn new(sink: Arc<dyn IrqSink>, source: u32) -> Self {
        Self { sink, source }
    }

    /// Raises or lowers the wire. Callers send changes only: every call is a system call.
    pub fn set_level(&self, high: bool) {
        self.sink.set_level(self.source, high);
    }

    /// The value of the device's `interrupts-extended`.
    pub fn fdt_interrupt(&self) -> Vec<u32> {
        self.sink.fdt_interrupt(self.source)
    }
}
