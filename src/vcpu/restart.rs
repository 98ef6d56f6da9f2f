//! Harts that KVM resets, and what they lose by it.
//!
//! Linux 7.x resets a hart when another one starts it (SBI HSM) and when it suspends the system (SBI SUSP),
//! and leaves `scounteren` 0, where older hosts set 7. A Linux guest without an SBI PMU never writes that
//! register, and `rdtime`, so each clock of the vDSO, kills the process that runs it. So rvmm writes it.
//!
//! The reset is a request that KVM_RUN serves on its way into the guest, which leaves no moment between the
//! two. But a stopped hart serves it too (kvm_riscv_check_vcpu_requests in `arch/riscv/kvm/vcpu.c`), and
//! sleeps until a signal comes. So `Restarts::take_reset` stops the hart, begins KVM_RUN, has it ended by a
//! kick, writes the register, and starts the hart.
//!
//! ```text
//! guest: hart B starts hart A    vCPU A: sees that A is started   machine: kicks A
//!                                stops A, calls ------------------>
//!                                KVM_RUN: reset, sleep <----------
//!                                scounteren = 7, starts A, KVM_RUN: A's first instruction
//! ```
//!
//! For that the vCPU of a stopped hart must be outside KVM_RUN. It is from the start. A running hart that
//! stops itself does so inside KVM_RUN: the machine kicks each vCPU on such a host every [`LOOK_EVERY`], or a
//! twentieth as often while it waits for an interrupt, and `Restarts::look` finds it stopped.
//!
//! What is left. A hart that is stopped and started again between two looks runs without its clocks until
//! the next one. A guest cannot keep the register at 0. While a reset is taken, which lasts a millisecond or two,
//! other harts see a hart that was started as stopped: HART_GET_STATUS says so, and a second HART_START
//! succeeds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::park_timeout;
use std::time::{Duration, Instant};

use super::first::{First, Waited};
use crate::hypervisor::regs::{self, CYCLE_TIME_INSTRET};
use crate::hypervisor::{HartState, Result, Vcpu, VmEntry, VmExit};
use crate::util::{RateLimit, guest_warn};

/// No reset leaves this in `scounteren`, whatever the host.
const MARK: u64 = (1 << 31) | CYCLE_TIME_INSTRET;

/// How often the machine kicks vCPUs for a look, those that wait for an interrupt each twentieth time.
pub const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Of so many looks one is at the vCPUs that wait for an interrupt too.
pub const ALL_OF_LOOKS: u32 = 20;

/// How often it kicks a vCPU that waits for its kick.
pub const KICK_EVERY: Duration = Duration::from_millis(1);

/// The pause between two reads of a stopped hart's state is a sixteenth of the time for which the hart has been
/// stopped, but no less and no more than these.
const PAUSES: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(100));

/// Every KVM has served a reset long before.
const RESET_TAKES: Duration = Duration::from_secs(2);

/// Calls the machine to kick this vCPU.
pub type Call = Box<dyn Fn() + Send>;

/// What a vCPU's thread and its handle tell each other.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// The thread is to end. A signal comes with it.
    pub(super) stopping: AtomicBool,
    /// The thread is to be kicked until this is false.
    pub(super) wants_kick: AtomicBool,
    /// The thread sleeps outside KVM_RUN, and looks after its hart by itself.
    pub(super) sleeps: AtomicBool,
}

impl Shared {
    /// Sleeps for `time`, or until the handle kicks.
    pub(super) fn sleep(&self, time: Duration) {
        self.sleeps.store(true, Ordering::Relaxed);
        park_timeout(time);
        self.sleeps.store(false, Ordering::Relaxed);
    }

    #[inline(always)]
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
}

/// Follows the resets of one vCPU's hart, on its thread.
pub(super) struct Restarts {
    pub(super) shared: Arc<Shared>,
    call: Call,
}

impl Restarts {
    /// Those of a vCPU whose kicks begin at a `call`.
    pub(super) fn new(shared: Arc<Shared>, call: Call) -> Self {
        Self { shared, call }
    }

    /// Looks after the hart of a vCPU that came out of KVM_RUN: waits while it is stopped, and gives it its
    /// `scounteren`.
    ///
    /// # Errors
    /// KVM refused.
    pub(super) fn look(&mut self, vcpu: &mut dyn Vcpu) -> Result<Waited> {
        if vcpu.hart_state()? == HartState::Stopped {
            return self.wait_for_start(vcpu);
        }
        // It may have been stopped and started since the last look.
        if vcpu.reg(regs::SCOUNTEREN)? == Some(0) {
            vcpu.set_reg(regs::SCOUNTEREN, CYCLE_TIME_INSTRET)?;
        }
        Ok(Waited::DONE)
    }

    /// Waits until the hart of a vCPU that has not run yet, or was found stopped, is started, and takes the reset
    /// that comes with it.
    ///
    /// # Errors
    /// KVM refused.
    pub(super) fn wait_for_start(&mut self, vcpu: &mut dyn Vcpu) -> Result<Waited> {
        let began = Instant::now();
        while vcpu.hart_state()? == HartState::Stopped {
            if self.shared.is_stopping() {
                return Ok(Waited::Asked(First::WaitForStart));
            }
            let (least, most) = PAUSES;
            self.shared.sleep((began.elapsed() / 16).clamp(least, most));
        }
        self.take_reset(vcpu, VmEntry::Run)
    }

    /// Has KVM serve the reset that waits for the vCPU, which completes its last exit with `entry`. No
    /// instruction of the guest runs meanwhile, unless the guest starts this hart once more: then an exit of
    /// the hart still has to be served.
    ///
    /// # Errors
    /// KVM refused.
    pub(super) fn take_reset(&mut self, vcpu: &mut dyn Vcpu, mut entry: VmEntry) -> Result<Waited> {
        // The reset is over when this has gone.
        vcpu.set_reg(regs::SCOUNTEREN, MARK)?;
        vcpu.set_hart_state(HartState::Stopped)?;
        self.shared.wants_kick.store(true, Ordering::Release);
        (self.call)();
        let began = Instant::now();
        let mut waited = Waited::Asked(First::TakeReset);
        while !self.shared.is_stopping() {
            let exit = vcpu.run(entry)?;
            entry = VmEntry::Run;
            if exit != VmExit::Interrupted {
                waited = Waited::Over(Some(exit));
                break;
            }
            if vcpu.reg(regs::SCOUNTEREN)? != Some(MARK) {
                waited = Waited::DONE;
                break;
            }
            if began.elapsed() > RESET_TAKES {
                let limit = RateLimit::named("resets of harts");
                guest_warn!(
                    limit,
                    "this host's KVM does not reset a hart that starts or resumes"
                );
                waited = Waited::DONE;
                break;
            }
        }
        self.shared.wants_kick.store(false, Ordering::Release);
        vcpu.set_reg(regs::SCOUNTEREN, CYCLE_TIME_INSTRET)?;
        if !matches!(waited, Waited::Over(Some(_))) {
            vcpu.set_hart_state(HartState::Started)?;
        }
        Ok(waited)
    }
}

#[cfg(test)]
mod tests;
