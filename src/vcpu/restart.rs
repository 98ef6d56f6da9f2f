//! Restores `scounteren` after KVM has reset a hart.
//!
//! KVM of Linux 7.x resets a hart when another hart starts it (SBI HSM) and when it suspends the
//! system (SBI SUSP). The reset leaves 0 in `scounteren`; older hosts set 7. A Linux guest without
//! an SBI PMU never writes that register. With 0, `rdtime` kills the process that executes it, and
//! so does each clock of the vDSO. So rvmm writes the register.
//!
//! The reset is a request that KVM_RUN handles directly before it enters the guest, so rvmm cannot
//! write the register between the two. But KVM_RUN of a stopped hart handles the request too
//! (kvm_riscv_check_vcpu_requests in `arch/riscv/kvm/vcpu.c`), and then sleeps until a signal
//! comes. So `Restarts::take_reset` marks the hart as stopped, calls KVM_RUN, lets a kick interrupt
//! it, writes the register, and marks the hart as started.
//!
//! ```text
//! guest: hart B starts hart A    vCPU A: sees that A is started   machine: kicks A
//!                                stops A, calls ------------------>
//!                                KVM_RUN: reset, sleep <----------
//!                                scounteren = 7, starts A, KVM_RUN: A's first instruction
//! ```
//!
//! This works only if the vCPU of a stopped hart is outside KVM_RUN. For a hart that has not run
//! yet it is. But a running hart that stops itself does so inside KVM_RUN. So on such a host the
//! machine kicks each vCPU every [`LOOK_EVERY`], and a twentieth as often while the vCPU waits for
//! an interrupt. `Restarts::look` then finds out that the hart is stopped.
//!
//! Known limits: A hart that is stopped and started again between two looks cannot use its clocks
//! until the next look. A guest cannot keep the register at 0. While rvmm takes a reset, for one or
//! two milliseconds, HART_GET_STATUS reports the started hart as stopped, and a second HART_START
//! succeeds.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::park_timeout;
use std::time::{Duration, Instant};

use super::first::{First, Waited};
use super::hart::Hart;
use crate::hypervisor::regs::{self, CYCLE_TIME_INSTRET};
use crate::hypervisor::{HartState, Result, Vcpu, VmEntry, VmExit};
use crate::util::{RateLimit, guest_warn};

/// A value that no host's reset leaves in `scounteren`.
const MARK: u64 = (1 << 31) | CYCLE_TIME_INSTRET;

/// How often the machine kicks vCPUs for a look. It kicks those that wait for an interrupt only at
/// every [`ALL_OF_LOOKS`]th look.
pub const LOOK_EVERY: Duration = Duration::from_millis(50);

/// One of this many looks includes the vCPUs that wait for an interrupt.
pub const ALL_OF_LOOKS: u32 = 20;

/// How often the machine kicks a vCPU that has asked to be kicked.
pub const KICK_EVERY: Duration = Duration::from_millis(1);

/// Least and longest pause between two reads of a stopped hart's state. Between them, the pause is
/// a sixteenth of the time that the hart has been stopped.
const PAUSES: (Duration, Duration) = (Duration::from_micros(200), Duration::from_millis(100));

/// The longest time that a reset may take. Every KVM is much faster.
const RESET_TAKES: Duration = Duration::from_secs(2);

/// Asks the machine to kick this vCPU.
pub type Call = Box<dyn Fn() + Send>;

/// State that a vCPU's thread shares with its handle.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// The thread is to end. Whoever sets this also sends a signal.
    pub(super) stopping: AtomicBool,
    /// The thread wants to be kicked until this is false.
    pub(super) wants_kick: AtomicBool,
    /// The thread sleeps outside KVM_RUN. It checks the state of its hart itself.
    pub(super) sleeps: AtomicBool,
    /// The machine wants a sample of the hart. Whoever sets this also sends a signal.
    pub(super) wants_sample: AtomicBool,
    /// The last sample, until the machine takes it.
    pub(super) sample: Mutex<Option<Hart>>,
}

impl Shared {
    /// Sleeps for `time`, or until the handle kicks the thread.
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

/// Handles the resets of one vCPU's hart, on the vCPU's thread.
pub(super) struct Restarts {
    pub(super) shared: Arc<Shared>,
    pub(super) call: Call,
}

impl Restarts {
    /// Handles the resets of a vCPU. `call` asks the machine for kicks.
    pub(super) fn new(shared: Arc<Shared>, call: Call) -> Self {
        Self { shared, call }
    }

    /// Handles the resets of a vCPU on a thread that is [kicked](super::kicked) anyway.
    pub(super) fn new_alone() -> Self {
        Self::new(Arc::default(), Box::new(|| {}))
    }

    /// Checks the hart of a vCPU whose KVM_RUN was interrupted. Waits while the hart is stopped,
    /// and restores `scounteren` if it is 0.
    ///
    /// # Errors
    /// Fails if KVM_RUN fails, or if KVM cannot read or set a register or the hart's state.
    pub(super) fn look(&mut self, vcpu: &mut dyn Vcpu) -> Result<Waited> {
        if vcpu.hart_state()? == HartState::Stopped {
            return self.wait_for_start(vcpu);
        }
        // The hart may have been stopped and started since the last look.
        if vcpu.reg(regs::SCOUNTEREN)? == Some(0) {
            vcpu.set_reg(regs::SCOUNTEREN, CYCLE_TIME_INSTRET)?;
        }
        Ok(Waited::DONE)
    }

    /// Waits until another hart starts the hart of this vCPU, then takes the reset.
    ///
    /// # Errors
    /// Fails if KVM_RUN fails, or if KVM cannot read or set a register or the hart's state.
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

    /// Lets KVM handle the reset that is pending for the vCPU. `entry` is the result of the vCPU's
    /// last exit. No instruction of the hart runs meanwhile, unless another hart starts it once
    /// more. Then the returned exit of the hart must still be handled.
    ///
    /// # Errors
    /// Fails if KVM_RUN fails, or if KVM cannot read or set a register or the hart's state.
    pub(super) fn take_reset(&mut self, vcpu: &mut dyn Vcpu, mut entry: VmEntry) -> Result<Waited> {
        // The reset is done once this value is gone.
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
