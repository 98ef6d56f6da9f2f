//! Interrupt controllers: the AIA in the kernel, the PLIC in userspace.

pub mod aia;
pub mod plic;

use std::sync::Arc;

use crate::bus::{Device, IrqLine, IrqSink, MmioDevice};

/// The interrupt controller of a machine, whichever it is.
pub struct IrqChip {
    sink: Arc<dyn IrqSink>,
    device: Arc<dyn Device>,
    mmio: Option<Arc<dyn MmioDevice>>,
}

impl IrqChip {
    /// A controller that the kernel serves.
    pub fn in_kernel<C: IrqSink + Device + 'static>(chip: C) -> Self {
        let chip = Arc::new(chip);
        Self {
            sink: Arc::clone(&chip) as _,
            device: chip,
            mmio: None,
        }
    }

    /// A controller whose registers are on the bus.
    pub fn on_bus<C: IrqSink + Device + MmioDevice + 'static>(chip: C) -> Self {
        let chip = Arc::new(chip);
        Self {
            sink: Arc::clone(&chip) as _,
            device: Arc::clone(&chip) as _,
            mmio: Some(chip),
        }
    }

    /// A wire to `source`.
    pub fn line(&self, source: u32) -> IrqLine {
        IrqLine::new(Arc::clone(&self.sink), source)
    }

    /// Its registers, where rvmm serves them.
    pub fn mmio(&self) -> Option<Arc<dyn MmioDevice>> {
        self.mmio.clone()
    }

    /// Its nodes in the device tree.
    pub fn device(&self) -> &dyn Device {
        self.device.as_ref()
    }
}

/// The phandle of the interrupt controller inside hart `hart`'s `cpu` node.
pub fn hart_intc_phandle(hart: u32) -> u32 {
    1 + hart
}
