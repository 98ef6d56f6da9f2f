//! Wakes a hart that waits for a software interrupt that KVM does not know of.
//!
//! KVM counts the software interrupts (IPIs) that SBI calls send in `irqs_pending`, apart from the
//! hart's `sip`. A restore can set only `sip` (kvm_riscv_vcpu_set_reg_csr in
//! `arch/riscv/kvm/vcpu_onereg.c`). If the hart then executes `wfi` with interrupts disabled, as
//! Linux does when it is idle, KVM sees no pending interrupt, and the hart would sleep until its
//! timer comes. A signal ends that sleep: KVM completes the `wfi`, and the hart takes the
//! interrupt. So the machine kicks such a vCPU until the interrupt has been taken.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::first::First;
use super::restart::Shared;
use crate::hypervisor::{Result, Vcpu, regs};

/// SSIP and SSIE: the bit of the software interrupt in `sip` and `sie`.
pub(super) const SOFTWARE: u64 = 1 << 1;

/// The most kicks. A guest can keep the interrupt disabled for as long as it likes.
const MOST: u32 = 1000;

/// The kicks that a vCPU still wants.
#[derive(Debug, Default)]
pub(super) struct Nudge {
    left: u32,
}

impl Nudge {
    /// Asks for kicks: the machine kicks the vCPU until [`Nudge::look`] takes that back.
    pub(super) fn begin(&mut self, shared: &Arc<Shared>, call: &dyn Fn()) {
        self.left = MOST;
        shared.wants_kick.store(true, Ordering::Release);
        call();
    }

    /// How the vCPU goes on after a pause: the kicks that are left are not lost.
    pub(super) fn first(&self) -> First {
        match self.left {
            0 => First::Enter,
            _ => First::EnterNudged,
        }
    }

    /// To be called when a kick has interrupted KVM_RUN. Ends the kicks if the interrupt is not
    /// pending any more.
    ///
    /// # Errors
    /// Fails if KVM cannot read a register.
    pub(super) fn look(&mut self, vcpu: &dyn Vcpu, shared: &Arc<Shared>) -> Result<()> {
        if self.left == 0 {
            return Ok(());
        }
        let is_pending = vcpu.reg(regs::SIP)?.unwrap_or_default() & SOFTWARE != 0;
        self.left = if is_pending { self.left - 1 } else { 0 };
        if self.left == 0 {
            shared.wants_kick.store(false, Ordering::Release);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::fake::FakeVcpu;
    use std::cell::Cell;

    fn begun() -> (Nudge, Arc<Shared>) {
        let (mut nudge, shared, calls) = (Nudge::default(), Arc::default(), Cell::new(0));
        nudge.begin(&shared, &|| calls.set(calls.get() + 1));
        assert_eq!(calls.get(), 1);
        (nudge, shared)
    }

    fn wants(shared: &Shared) -> bool {
        shared.wants_kick.load(Ordering::Acquire)
    }

    #[test]
    fn kicks_end_when_the_interrupt_is_taken() {
        let (mut nudge, shared) = begun();
        let vcpu = FakeVcpu::with(&[(regs::SIP, SOFTWARE)]);
        for _ in 0..3 {
            nudge.look(&vcpu, &shared).unwrap();
            assert!(wants(&shared));
            assert_eq!(nudge.first(), First::EnterNudged);
        }
        vcpu.set_reg(regs::SIP, 1 << 5).unwrap();
        nudge.look(&vcpu, &shared).unwrap();
        assert!(!wants(&shared));
        assert_eq!(nudge.first(), First::Enter);
        // Another part may want kicks now.
        shared.wants_kick.store(true, Ordering::Release);
        nudge.look(&vcpu, &shared).unwrap();
        assert!(wants(&shared));
    }

    #[test]
    fn a_guest_cannot_make_them_last() {
        let (mut nudge, shared) = begun();
        let vcpu = FakeVcpu::with(&[(regs::SIP, SOFTWARE)]);
        let kicks = (0..).take_while(|_| {
            nudge.look(&vcpu, &shared).unwrap();
            wants(&shared)
        });
        assert_eq!(kicks.count(), 999);
    }
}
