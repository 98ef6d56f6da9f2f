//! What a vCPU's thread does first: enter the guest, or go on with what its last thread was at.

use crate::hypervisor::VmExit;
use crate::irqchip::SavedRegister;

/// The hart that runs from the start.
const BOOT_HART: u32 = 0;

/// The first thing for the thread of a vCPU to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum First {
    /// Enter the guest.
    #[default]
    Enter,
    /// Wait until another hart starts this one, and take the reset that comes with that.
    WaitForStart,
    /// Take the reset that KVM keeps for this hart.
    TakeReset,
    /// Sleep: the hart has suspended the system.
    Sleep(Sleeper),
}

impl First {
    /// For hart `hart`, which has not run yet. On a host that resets harts, see
    /// [`restart`](super::restart), all but the boot hart wait outside KVM_RUN.
    pub fn of_new(hart: u32, host_resets_harts: bool) -> Self {
        if host_resets_harts && hart != BOOT_HART {
            First::WaitForStart
        } else {
            First::Enter
        }
    }
}

/// A hart that sleeps: what does not change meanwhile.
#[derive(Debug, PartialEq, Eq)]
pub struct Sleeper {
    /// `sie`.
    pub(super) enabled: u64,
    /// The time at which the hart's timer interrupts.
    pub(super) compare: u64,
    /// Its interrupt controller's registers.
    pub(super) saved: Vec<SavedRegister>,
}

/// How a wait of the thread's ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Waited {
    /// The guest can be entered, once the exit is served that came meanwhile, if one did.
    Over(Option<VmExit>),
    /// The thread is to end; the next one begins with this.
    Asked(First),
}

impl Waited {
    /// The guest can be entered.
    pub(super) const DONE: Self = Waited::Over(None);
}
