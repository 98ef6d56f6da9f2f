//! vCPUs: the thread that runs each of them, and the handling of its exits.

pub mod cause;
pub mod exits;
pub mod fetch;
pub mod first;
pub mod hart;
pub mod kicked;
mod nudge;
pub mod paging;
pub mod restart;
pub mod saved;
pub mod sbi;
pub mod settle;
pub mod stats;
pub mod suspend;
pub mod thread;
pub mod trap;

use std::fmt;

use crate::devices::sifive_test::Request;

/// Why a vCPU ended the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The guest powered off.
    PowerOff,
    /// The guest powered off and reported a failure. The value is the SRST reset reason.
    Failure(u64),
    /// The guest powered off with a code of its own (sifive_test).
    Exit(u16),
    /// The guest asked for a reset.
    Reset,
    /// KVM_RUN failed: KVM cannot continue the guest.
    Unrunnable {
        /// The errno of KVM_RUN.
        errno: i32,
        /// The guest's `pc`.
        pc: u64,
    },
    /// The guest fetched from outside RAM, and its trap handler is at that address too.
    NoTrapHandler {
        /// The address.
        pc: u64,
    },
    /// The guest fetched from outside RAM too often.
    FetchFaults {
        /// The address of the last fetch.
        pc: u64,
    },
    /// The host's firmware lost a trap of the guest, and the guest continued in the host's KVM
    /// module.
    LostTrap {
        /// The address in the KVM module.
        pc: u64,
    },
    /// The host cannot enter the guest on one of its CPUs.
    FailEntry {
        /// The hardware entry failure reason that KVM reports.
        reason: u64,
        /// The host CPU.
        cpu: u32,
    },
    /// The guest reached a breakpoint, and no debugger is attached.
    Breakpoint,
    /// KVM returned an exit reason that rvmm does not know.
    UnknownExit(u32),
    /// KVM reported a system event that rvmm does not know.
    UnknownEvent(u32),
}

impl From<Request> for Stop {
    fn from(request: Request) -> Self {
        match request {
            Request::PowerOff => Stop::PowerOff,
            Request::Reset => Stop::Reset,
            Request::Exit(code) => Stop::Exit(code),
        }
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stop::PowerOff => write!(f, "the guest powered off"),
            Stop::Failure(reason) => {
                write!(
                    f,
                    "the guest powered off and reported a failure (SRST reason {reason:#x})"
                )
            }
            Stop::Exit(code) => write!(f, "the guest powered off with code {code}"),
            Stop::Reset => write!(f, "the guest asked for a reset"),
            Stop::Unrunnable { errno, pc } => write!(
                f,
                "the guest cannot go on: KVM_RUN failed near pc {pc:#x} (errno {errno})"
            ),
            Stop::NoTrapHandler { pc } => write!(
                f,
                "the guest cannot go on: its trap handler (stvec) is at {pc:#x}, outside RAM"
            ),
            Stop::FetchFaults { pc } => write!(
                f,
                "the guest cannot go on: it took too many instruction access faults, the last at \
                 {pc:#x}"
            ),
            Stop::LostTrap { pc } => write!(
                f,
                "the guest cannot go on: the host's firmware lost a trap, and the guest is at \
                 {pc:#x} in the host's KVM: emulated hosts do so when a guest runs an illegal \
                 instruction"
            ),
            Stop::FailEntry { reason, cpu } => write!(
                f,
                "the guest cannot go on: KVM cannot enter it on host CPU {cpu} (reason {reason:#x})"
            ),
            Stop::Breakpoint => write!(
                f,
                "the guest cannot go on: it reached a breakpoint, and no debugger is attached"
            ),
            Stop::UnknownExit(reason) => {
                write!(
                    f,
                    "the guest cannot go on: rvmm does not know KVM exit {reason}"
                )
            }
            Stop::UnknownEvent(kind) => {
                write!(
                    f,
                    "the guest cannot go on: rvmm does not know KVM system event {kind}"
                )
            }
        }
    }
}
