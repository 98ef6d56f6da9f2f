//! Which interrupt controller a machine gets, and how it comes to be: the AIA before and after the
//! vCPUs, the PLIC after them.

use std::sync::Arc;

use anyhow::{Result, bail};

use super::layout;
use crate::config::IrqchipKind;
use crate::hypervisor::{Aia, Vcpu, Vm};
use crate::irqchip::IrqChip;
use crate::irqchip::aia::InKernelAia;
use crate::irqchip::plic::{self, Plic};
use crate::util::{RateLimit, guest_info};

/// A controller, chosen before the vCPUs are created.
pub(super) enum Choice {
    /// In the kernel, created; emulated even where the host has guest interrupt files, if so.
    Aia { device: Box<dyn Aia>, emulate: bool },
    /// In userspace.
    Plic,
}

/// Chooses what `kind` asks for and this host can give.
pub(super) fn choose(kind: IrqchipKind, vm: &dyn Vm) -> Result<Choice> {
    if kind == IrqchipKind::Plic {
        return Ok(Choice::Plic);
    }
    match (vm.create_aia()?, kind) {
        (Some(device), _) => Ok(Choice::Aia {
            device,
            emulate: kind == IrqchipKind::AiaEmul,
        }),
        (None, IrqchipKind::Auto) => Ok(Choice::Plic),
        (None, _) => bail!(
            "this host has no AIA (its KVM offers no interrupt controller): give --irqchip plic, \
             or leave it at auto"
        ),
    }
}

impl Choice {
    /// Whether the guest gets an AIA.
    pub(super) fn is_aia(&self) -> bool {
        matches!(self, Choice::Aia { .. })
    }

    /// Starts the controller for `vcpus`, which are all that `vm` will have.
    pub(super) fn start(self, vm: &Arc<dyn Vm>, vcpus: &[Box<dyn Vcpu>]) -> Result<IrqChip> {
        match self {
            Choice::Aia { device, emulate } => {
                let (vm, harts) = (Arc::clone(vm), u32::try_from(vcpus.len())?);
                let aia = InKernelAia::start(vm, device, layout::AIA, harts, emulate)?;
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
