//! The system's suspend: RISC-V Supervisor Binary Interface 3.0, chapter "System Suspend Extension".
//!
//! KVM of Linux 7.x checks the call, has the hart's reset wait for the next KVM_RUN, and hands the call to
//! userspace (`arch/riscv/kvm/vcpu_sbi_system.c`). Here the hart sleeps until an interrupt that the guest
//! enabled is pending. Then it is reset, and goes on where the guest asked.

use std::sync::Arc;
use std::time::Duration;

use super::first::{First, Sleeper, Waited};
use super::restart::Restarts;
use crate::hypervisor::{RegId, Result, SbiRet, Vcpu, VmEntry, regs};
use crate::irqchip::HartSide;

/// Extension id of the call, and its one function.
pub const SUSP: u64 = 0x5355_5350;
/// SYSTEM_SUSPEND.
pub const SYSTEM_SUSPEND: u64 = 0;

/// How often a suspended hart's interrupts are looked at. KVM has nothing to wait for.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Bits of `sie` and `sip`.
const TIMER: u64 = 1 << 5;
const EXTERNAL: u64 = 1 << 9;

/// The system is suspended.
const OK: VmEntry = VmEntry::Sbi(SbiRet { error: 0, value: 0 });

/// Lets harts sleep.
pub struct Suspend {
    irqs: Arc<dyn HartSide>,
}

impl Suspend {
    /// For harts whose external interrupts come from `irqs`.
    pub fn new(irqs: Arc<dyn HartSide>) -> Self {
        Self { irqs }
    }

    /// What hart `hart`, whose `vcpu` made the call, is to sleep with.
    ///
    /// # Errors
    /// KVM refused.
    #[cold]
    pub(super) fn begin(&self, hart: u32, vcpu: &dyn Vcpu) -> Result<Sleeper> {
        Ok(Sleeper {
            enabled: read(vcpu, regs::SIE)?,
            compare: read(vcpu, regs::TIMER_COMPARE)?,
            saved: self.irqs.save(hart)?,
        })
    }

    /// Hart `hart` sleeps until it wakes, or its thread is to end.
    ///
    /// # Errors
    /// KVM refused.
    #[cold]
    pub(super) fn sleep(
        &self,
        hart: u32,
        vcpu: &mut dyn Vcpu,
        restarts: &mut Restarts,
        sleeper: Sleeper,
    ) -> Result<Waited> {
        while !self.wakes(hart, vcpu, &sleeper)? {
            if restarts.shared.is_stopping() {
                return Ok(Waited::Asked(First::Sleep(sleeper)));
            }
            restarts.shared.sleep(LOOK_EVERY);
        }
        // The reset clears the hart's IMSIC, and the interrupt that woke it with it. What comes between this and
        // the reset, in the next millisecond or two, is lost.
        let saved = self.irqs.save(hart)?;
        let waited = restarts.take_reset(vcpu, OK)?;
        if let Waited::Asked(_) = waited {
            // Without the reset nothing is lost: what woke the hart wakes it again.
            return Ok(Waited::Asked(First::Sleep(sleeper)));
        }
        self.irqs.restore(hart, &saved)?;
        Ok(waited)
    }

    /// Whether an interrupt is pending and enabled. `sstatus.SIE` does not matter, as with WFI.
    fn wakes(&self, hart: u32, vcpu: &dyn Vcpu, sleeper: &Sleeper) -> Result<bool> {
        let enabled = sleeper.enabled;
        if enabled & read(vcpu, regs::SIP)? != 0 {
            return Ok(true);
        }
        let timer = enabled & TIMER != 0 && read(vcpu, regs::TIMER_TIME)? >= sleeper.compare;
        let external =
            || Ok(enabled & EXTERNAL != 0 && self.irqs.is_pending(hart, &sleeper.saved)?);
        if timer { Ok(true) } else { external() }
    }
}

/// Every KVM that has the call has these registers.
fn read(vcpu: &dyn Vcpu, register: RegId) -> Result<u64> {
    Ok(vcpu.reg(register)?.unwrap_or_default())
}

#[cfg(test)]
mod tests;
