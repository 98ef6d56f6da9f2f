//! Wired interrupts, from the device's side.

use std::sync::Arc;

/// An interrupt controller that takes wired interrupts. Its methods never call a device.
pub trait IrqSink: Send + Sync {
    /// Sets the level of the wire to `source`.
    fn set_level(&self, source: u32, high: bool);
    /// The entry for `source` in a device's `interrupts-extended` property: the controller's
    /// phandle, then the interrupt specifier's cells.
    fn fdt_interrupt(&self, source: u32) -> Vec<u32>;
    /// The same entry for a wire on which each rising edge is an interrupt. It differs if the
    /// specifier says how the wire is triggered.
    fn fdt_edge_interrupt(&self, source: u32) -> Vec<u32> {
        self.fdt_interrupt(source)
    }
}

/// One wire from a device to the interrupt controller. Nearly all wires are level-triggered.
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

    /// Sets the level of the wire. Callers should call this only when the level changes, because
    /// each call can be a system call.
    pub fn set_level(&self, high: bool) {
        self.sink.set_level(self.source, high);
    }

    /// Sends an edge on a wire that is low: a rise, and the fall back to low.
    pub fn pulse(&self) {
        self.set_level(true);
        self.set_level(false);
    }

    /// The value of the device's `interrupts-extended` for a level-triggered wire.
    pub fn fdt_interrupt(&self) -> Vec<u32> {
        self.sink.fdt_interrupt(self.source)
    }

    /// The value of the device's `interrupts-extended` for a wire with edges.
    pub fn fdt_edge_interrupt(&self) -> Vec<u32> {
        self.sink.fdt_edge_interrupt(self.source)
    }
}
