//! System suspend: RISC-V Supervisor Binary Interface 3.0, chapter "System Suspend Extension".
//!
//! KVM of Linux 7.x checks the call, requests a reset of the hart, which the next KVM_RUN handles,
//! and passes the call to userspace (`arch/riscv/kvm/vcpu_sbi_system.c`). rvmm lets the hart sleep
//! until an interrupt that the guest has enabled is pending. Then the hart takes the reset and
//! resumes at the address that the guest gave.

use std::sync::Arc;
use std::time::Duration;

use super::first::{First, Sleeper, Waited};
use super::restart::Restarts;
use crate::hypervisor::{RegId, Result, SbiRet, Vcpu, VmEntry, regs};
use crate::irqchip::HartSide;

/// Extension id of the call.
pub const SUSP: u64 = 0x5355_5350;
/// Function id of SYSTEM_SUSPEND, the extension's only function.
pub const SYSTEM_SUSPEND: u64 = 0;

/// How often rvmm checks a suspended hart's interrupts. KVM offers no way to wait for them.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Bits of `sie` and `sip`.
const TIMER: u64 = 1 << 5;
const EXTERNAL: u64 = 1 << 9;

/// The result of a call that succeeded.
const OK: VmEntry = VmEntry::Sbi(SbiRet { error: 0, value: 0 });

/// Suspends harts.
pub struct Suspend {
    irqs: Arc<dyn HartSide>,
}

impl Suspend {
    /// Suspends harts whose external interrupts come from `irqs`.
    pub fn new(irqs: Arc<dyn HartSide>) -> Self {
        Self { irqs }
    }

    /// Saves the state that hart `hart` needs to sleep. Its `vcpu` made the call.
    ///
    /// # Errors
    /// Fails if KVM cannot read a register.
    #[cold]
    pub(super) fn begin(&self, hart: u32, vcpu: &dyn Vcpu) -> Result<Sleeper> {
        Ok(Sleeper {
            enabled: read(vcpu, regs::SIE)?,
            compare: read(vcpu, regs::TIMER_COMPARE)?,
            saved: self.irqs.save(hart)?,
            is_reset: false,
        })
    }

    /// Blocks until an interrupt wakes hart `hart`, or until its thread is to end. After a wake-up
    /// it lets KVM reset the hart.
    ///
    /// # Errors
    /// Fails if KVM cannot read or set a register, or if KVM_RUN fails.
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
        if sleeper.is_reset {
            return Ok(Waited::DONE);
        }
        // The reset clears the hart's IMSIC, and with it the interrupt that woke the hart. An
        // interrupt that arrives between this line and the reset, within one or two milliseconds,
        // is lost.
        let saved = self.irqs.save(hart)?;
        let waited = restarts.take_reset(vcpu, OK)?;
        if let Waited::Asked(_) = waited {
            // Without the reset nothing is lost: the same interrupt wakes the hart again.
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

/// Reads a register that every KVM with this call has.
fn read(vcpu: &dyn Vcpu, register: RegId) -> Result<u64> {
    Ok(vcpu.reg(register)?.unwrap_or_default())
}

#[cfg(test)]
mod tests;
