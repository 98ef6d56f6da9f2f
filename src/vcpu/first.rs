//! The first action of a vCPU's thread: to enter the guest, or to continue what the vCPU's last
//! thread was doing.

use crate::hypervisor::VmExit;
use crate::irqchip::SavedRegister;

/// The hart that runs when the machine starts.
const BOOT_HART: u32 = 0;

/// The first action of a vCPU's thread.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum First {
    /// Enter the guest.
    #[default]
    Enter,
    /// Wait until another hart starts this one, then take the reset (see
    /// [`restart`](super::restart)).
    WaitForStart,
    /// Take the reset that is pending in KVM for this hart.
    TakeReset,
    /// Sleep: the guest has suspended the system.
    Sleep(Sleeper),
    /// Enter the guest, with a software interrupt pending that KVM does not know of: it was
    /// restored from a snapshot. See `vcpu::nudge`.
    EnterNudged,
}

impl First {
    /// The first action for hart `hart` of a new machine. On a host that resets harts (see
    /// [`restart`](super::restart)), all harts except the boot hart wait outside KVM_RUN.
    pub fn of_new(hart: u32, host_resets_harts: bool) -> Self {
        if host_resets_harts && hart != BOOT_HART {
            First::WaitForStart
        } else {
            First::Enter
        }
    }
}

/// State that does not change while a hart sleeps.
#[derive(Debug, PartialEq, Eq)]
pub struct Sleeper {
    /// The hart's `sie`.
    pub(super) enabled: u64,
    /// The time at which the hart's timer interrupts.
    pub(super) compare: u64,
    /// The registers of its interrupt controller.
    pub(super) saved: Vec<SavedRegister>,
    /// Whether the hart's registers are already those after the reset that ends the sleep. So it
    /// is after a restore from a snapshot, where KVM has no reset pending.
    pub(super) is_reset: bool,
}

/// How a wait of a vCPU's thread ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Waited {
    /// The wait is over: the thread can enter the guest. If an exit came meanwhile, it must be
    /// handled first.
    Over(Option<VmExit>),
    /// The thread was asked to end. The vCPU's next thread begins with this.
    Asked(First),
}

impl Waited {
    /// The wait is over, and no exit came.
    pub(super) const DONE: Self = Waited::Over(None);
}
