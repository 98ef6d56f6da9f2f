//! Chooses and creates the machine's interrupt controller. The AIA is created before the vCPUs and
//! started after them. The PLIC is created after them.

use std::sync::Arc;

use anyhow::{Result, bail};

use super::layout;
use crate::config::IrqchipKind;
use crate::hypervisor::{Aia, Vcpu, Vm};
use crate::irqchip::IrqChip;
use crate::irqchip::aia::{InKernelAia, Promise};
use crate::irqchip::plic::{self, Plic};
use crate::util::{RateLimit, guest_info};

/// A controller, chosen before the vCPUs are created.
pub(super) enum Choice {
    /// The in-kernel AIA, created but not started. With `emulate`, KVM emulates the IMSIC even if
    /// the host has guest interrupt files.
    Aia { device: Box<dyn Aia>, emulate: bool },
    /// The PLIC, in userspace.
    Plic,
}

/// Chooses the controller that `kind` requests, or that a guest which is to be restored has.
///
/// # Errors
/// Fails if this host does not have it.
pub(super) fn choose(kind: IrqchipKind, vm: &dyn Vm, is_restored: bool) -> Result<Choice> {
    if kind == IrqchipKind::Plic {
        return Ok(Choice::Plic);
    }
    match (vm.create_aia()?, kind) {
        (Some(device), _) => Ok(Choice::Aia {
            device,
            emulate: kind == IrqchipKind::AiaEmul,
        }),
        (None, IrqchipKind::Auto) => Ok(Choice::Plic),
        (None, _) if is_restored => bail!(
            "the guest has an AIA, and this host has none (its KVM has no in-kernel interrupt \
             controller)"
        ),
        (None, _) => bail!(
            "this host has no AIA (its KVM has no in-kernel interrupt controller): use --irqchip \
             plic or auto"
        ),
    }
}

impl Choice {
    /// The kind by which a user can ask for this controller.
    pub(super) fn kind(&self) -> IrqchipKind {
        match self {
            Choice::Aia { emulate: true, .. } => IrqchipKind::AiaEmul,
            Choice::Aia { emulate: false, .. } => IrqchipKind::Aia,
            Choice::Plic => IrqchipKind::Plic,
        }
    }

    /// Whether the guest gets an AIA.
    pub(super) fn is_aia(&self) -> bool {
        matches!(self, Choice::Aia { .. })
    }

    /// Starts the controller for `vcpus`. These must be all vCPUs of `vm`. `promise` is what a
    /// guest that is to be restored was told of its AIA.
    pub(super) fn start(
        self,
        vm: &Arc<dyn Vm>,
        vcpus: &[Box<dyn Vcpu>],
        promise: Option<Promise>,
    ) -> Result<IrqChip> {
        match self {
            Choice::Aia { device, emulate } => {
                let (vm, harts) = (Arc::clone(vm), u32::try_from(vcpus.len())?);
                let at = layout::AIA;
                let aia = InKernelAia::start(vm, device, at, harts, emulate, promise)?;
                let (sources, messages) = (aia.sources(), aia.messages());
                Ok(IrqChip::in_kernel(aia, sources, messages))
            }
            Choice::Plic => {
                let lines = vcpus.iter().map(|vcpu| vcpu.external_irq());
                let lines = lines.collect::<Result<_, _>>()?;
                guest_info!(RateLimit::named("PLIC or AIA"), "PLIC in userspace");
                let plic = Plic::new(layout::PLIC.start, lines);
                Ok(IrqChip::on_bus(plic, plic::SOURCES))
            }
        }
    }
}
