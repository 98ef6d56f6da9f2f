//! Interrupt controllers: the AIA in the kernel, and a PLIC in userspace.

pub mod aia;
pub mod msi;
pub mod plic;

use std::sync::Arc;

use self::msi::MsiRouter;
use crate::bus::{Device, IrqLine, IrqSink, MmioDevice};
use crate::hypervisor::Result;
use crate::snapshot::{LoadError, Parts};

/// The interrupt controller of a machine: an AIA or a PLIC.
pub struct IrqChip {
    sink: Arc<dyn IrqSink>,
    device: Arc<dyn Device>,
    hart_side: Arc<dyn HartSide>,
    mmio: Option<Arc<dyn MmioDevice>>,
    messages: Option<Messages>,
    sources: u32,
}

/// The state that an interrupt controller has for each hart. It is needed while the guest has
/// suspended the system: the hart waits for an interrupt to wake it, and KVM resets the hart then.
/// And it is needed for snapshots, which have all of it.
/// The hart's vCPU must not be in KVM_RUN when these methods are called.
pub trait HartSide: Send + Sync {
    /// Whether `hart` has a pending interrupt that is enabled in the controller. `saved` is the
    /// result of [`HartSide::save`]; the enabled interrupts have not changed since.
    ///
    /// # Errors
    /// Fails if a register of the controller cannot be read from KVM.
    fn is_pending(&self, hart: u32, saved: &[SavedRegister]) -> Result<bool>;

    /// Reads the registers of `hart` that KVM's reset clears, for [`HartSide::restore`].
    ///
    /// # Errors
    /// Fails if a register of the controller cannot be read from KVM.
    fn save(&self, hart: u32) -> Result<Vec<SavedRegister>>;

    /// Restores the registers of `hart` that [`HartSide::save`] returned, after KVM has reset the
    /// hart.
    ///
    /// # Errors
    /// Fails if KVM refuses to write a register, or to set the hart's external interrupt.
    fn restore(&self, hart: u32, saved: &[SavedRegister]) -> Result<()>;

    /// The harts whose vCPUs must go through KVM_RUN before [`Device::save`], without running an
    /// instruction: there KVM gives a vCPU a guest interrupt file of the host, if one is free. KVM
    /// does not show everything of the file that these harts have now. To be called while all vCPUs
    /// are parked, and before their registers are saved. The save fails if it still names a hart.
    ///
    /// # Errors
    /// Fails if a register of the controller cannot be read from KVM.
    fn to_settle_before_save(&self) -> Result<Vec<u32>> {
        Ok(Vec::new())
    }

    /// The harts whose vCPUs must go through KVM_RUN before [`Device::load`] of `parts`, as for
    /// [`HartSide::to_settle_before_save`]. To be called for a new machine whose vCPUs have their
    /// registers: `sip` has to be written before a hart gets a guest interrupt file. The load fails
    /// if this still names a hart.
    ///
    /// # Errors
    /// Fails if the state in `parts` is not that of this kind of controller, or if a register of
    /// the controller cannot be read from KVM or written.
    fn to_settle_before_load(
        &self,
        _parts: &mut Parts,
    ) -> std::result::Result<Vec<u32>, LoadError> {
        Ok(Vec::new())
    }
}

/// A register's number in the interrupt controller, and its value.
pub type SavedRegister = (u64, u64);

/// How devices that send messages reach the harts.
#[derive(Clone)]
pub struct Messages {
    /// Routes the messages inside the kernel.
    pub router: Arc<MsiRouter>,
    /// The phandle of the MSI controller in the device tree.
    pub phandle: u32,
    /// The largest number of messages that all devices together may use. That many fit into the
    /// interrupt file of one hart.
    pub vectors: u32,
}

impl IrqChip {
    /// A controller in the kernel, which has wired sources 1 to `sources`, and also takes messages.
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

    /// A controller in rvmm, with registers on the bus. It has wired sources 1 to `sources`, and
    /// takes no messages.
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

    /// The wire to `source`.
    pub fn line(&self, source: u32) -> IrqLine {
        IrqLine::new(Arc::clone(&self.sink), source)
    }

    /// The number of the last wired source that the device tree describes.
    pub fn sources(&self) -> u32 {
        self.sources
    }

    /// How messages reach the harts. `None` if the controller takes no messages.
    pub fn messages(&self) -> Option<&Messages> {
        self.messages.as_ref()
    }

    /// The registers for the bus. `None` if the controller is in the kernel.
    pub fn mmio(&self) -> Option<Arc<dyn MmioDevice>> {
        self.mmio.clone()
    }

    /// The state for each hart.
    pub fn hart_side(&self) -> Arc<dyn HartSide> {
        Arc::clone(&self.hart_side)
    }

    /// The controller as a device: it has nodes in the device tree, and a description.
    pub fn device(&self) -> Arc<dyn Device> {
        Arc::clone(&self.device)
    }
}

/// The phandle of the `interrupt-controller` node in the `cpu` node of hart `hart`.
pub fn hart_intc_phandle(hart: u32) -> u32 {
    1 + hart
}
