//! Interrupt controllers: the AIA in the kernel, the PLIC in userspace.

pub mod aia;
pub mod msi;
pub mod plic;

use std::sync::Arc;

use self::msi::MsiRouter;
use crate::bus::{Device, IrqLine, IrqSink, MmioDevice};
use crate::hypervisor::Result;

/// The interrupt controller of a machine, whichever it is.
pub struct IrqChip {
    sink: Arc<dyn IrqSink>,
    device: Arc<dyn Device>,
    hart_side: Arc<dyn HartSide>,
    mmio: Option<Arc<dyn MmioDevice>>,
    messages: Option<Messages>,
    sources: u32,
}

/// What a controller keeps for each hart. A hart that suspends the system waits for its interrupts, and KVM
/// resets the hart then. The hart's vCPU is not in KVM_RUN when these are called.
pub trait HartSide: Send + Sync {
    /// Whether an interrupt is pending for `hart` that the guest has enabled in the controller. What is enabled
    /// has not changed since [`HartSide::save`] returned `saved`.
    ///
    /// # Errors
    /// KVM refused.
    fn is_pending(&self, hart: u32, saved: &[SavedRegister]) -> Result<bool>;

    /// The registers of `hart` that a reset by KVM clears, for [`HartSide::restore`].
    ///
    /// # Errors
    /// KVM refused.
    fn save(&self, hart: u32) -> Result<Vec<SavedRegister>>;

    /// Gives `hart` back what [`HartSide::save`] returned, after KVM reset it.
    ///
    /// # Errors
    /// KVM refused.
    fn restore(&self, hart: u32, saved: &[SavedRegister]) -> Result<()>;
}

/// A register of a controller, by its number there, and its value.
pub type SavedRegister = (u64, u64);

/// How devices that send messages reach the harts.
#[derive(Clone)]
pub struct Messages {
    /// The routes.
    pub router: Arc<MsiRouter>,
    /// The controller that takes them, in the device tree.
    pub phandle: u32,
    /// Interrupts that all devices together may have, so that all of them fit one hart's file.
    pub vectors: u32,
}

impl IrqChip {
    /// A controller that the kernel serves, with wired sources 1 to `sources`, and that takes messages.
    pub fn in_kernel<C: IrqSink + Device + HartSide + 'static>(
        chip: C,
        sources: u32,
        messages: Messages,
    ) -> Self {
        let chip = Arc::new(chip);
        Self {
            sink: Arc::clone(&chip) as _,
            hart_side: Arc::clone(&chip) as _,
            device: chip,
            mmio: None,
            messages: Some(messages),
            sources,
        }
    }

    /// A controller whose registers are on the bus, with wired sources 1 to `sources`.
    pub fn on_bus<C: IrqSink + Device + HartSide + MmioDevice + 'static>(
        chip: C,
        sources: u32,
    ) -> Self {
        let chip = Arc::new(chip);
        Self {
            sink: Arc::clone(&chip) as _,
            hart_side: Arc::clone(&chip) as _,
            device: Arc::clone(&chip) as _,
            mmio: Some(chip),
            messages: None,
            sources,
        }
    }

    /// A wire to `source`.
    pub fn line(&self, source: u32) -> IrqLine {
        IrqLine::new(Arc::clone(&self.sink), source)
    }

    /// The last wired source that the guest is told of.
    pub fn sources(&self) -> u32 {
        self.sources
    }

    /// How messages reach the harts, where they can.
    pub fn messages(&self) -> Option<&Messages> {
        self.messages.as_ref()
    }

    /// Its registers, where rvmm serves them.
    pub fn mmio(&self) -> Option<Arc<dyn MmioDevice>> {
        self.mmio.clone()
    }

    /// What it keeps for each hart.
    pub fn hart_side(&self) -> Arc<dyn HartSide> {
        Arc::clone(&self.hart_side)
    }

    /// Its nodes in the device tree.
    pub fn device(&self) -> Arc<dyn Device> {
        Arc::clone(&self.device)
    }
}

/// The phandle of the interrupt controller inside hart `hart`'s `cpu` node.
pub fn hart_intc_phandle(hart: u32) -> u32 {
    1 + hart
}
