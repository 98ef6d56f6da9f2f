//! Interrupt controllers.

pub mod aia;
pub mod plic;

use std::sync::Arc;

use crate::bus::{Device, IrqLine, IrqSink};

/// An interrupt controller of the machine.
pub trait IrqChip: IrqSink + Device {}

/// The phandle of the interrupt controller inside hart `hart`'s `cpu` node.
pub fn hart_intc_phandle(hart: u32) -> u32 {
    1 + hart
}

/// A wire to `source` of `chip`.
pub fn line<C: IrqChip + 'static>(chip: &Arc<C>, source: u32) -> IrqLine {
    IrqLine::new(Arc::clone(chip) as Arc<dyn IrqSink>, source)
}
