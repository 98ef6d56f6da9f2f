//! vCPUs: the thread that runs one, and what its exits lead to.

pub mod exits;
pub mod fetch;
pub mod first;
pub mod paging;
pub mod restart;
pub mod sbi;
pub mod stats;
pub mod suspend;
pub mod thread;

use std::fmt;

use crate::devices::sifive_test::Request;

/// Why a vCPU ended the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The guest powered off.
    PowerOff,
    /// The guest powered off and reported a failure: the SRST reset reason.
    Failure(u64),
    /// The guest powered off with a code of its own (sifive_test).
    Exit(u16),
    /// The guest asked for a reset.
    Reset,
    /// The guest did what the hardware cannot run.
    Unrunnable {
        /// The errno of KVM_RUN.
        errno: i32,
        /// Where the guest was.
        pc: u64,
    },
    /// The guest fetched from where no RAM is, and that is its trap handler too.
    NoTrapHandler {
        /// From there.
        pc: u64,
    },
    /// The guest fetched from where no RAM is, again and again.
    FetchFaults {
        /// From there, the last time.
        pc: u64,
    },
    /// The guest's trap led to the host's KVM: the host's firmware lost it.
    LostTrap {
        /// Where in it.
        pc: u64,
    },
    /// The host cannot enter the guest on one of its CPUs.
    FailEntry {
        /// KVM's reason.
        reason: u64,
        /// The host CPU.
        cpu: u32,
    },
    /// The guest came to a breakpoint, and nobody debugs it.
    Breakpoint,
    /// KVM ended with what this rvmm does not know.
    UnknownExit(u32),
    /// KVM reported a system event that this rvmm does not know.
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
                "the guest cannot go on: KVM cannot run what it did near {pc:#x} (errno {errno})"
            ),
            Stop::NoTrapHandler { pc } => write!(
                f,
                "the guest cannot go on: its trap handler (stvec) is at {pc:#x}, where no RAM is"
            ),
            Stop::FetchFaults { pc } => write!(
                f,
                "the guest cannot go on: it took too many instruction access faults, the last at \
                 {pc:#x}"
            ),
            Stop::LostTrap { pc } => write!(
                f,
                "the guest cannot go on: the host's firmware lost its trap, at {pc:#x} in the host's KVM: \
                 an emulated host does so when a guest runs an illegal instruction"
            ),
            Stop::FailEntry { reason, cpu } => write!(
                f,
                "the guest cannot go on: host CPU {cpu} cannot enter it (reason {reason:#x})"
            ),
            Stop::Breakpoint => write!(
                f,
                "the guest cannot go on: it came to a breakpoint, and nobody debugs it"
            ),
            Stop::UnknownExit(reason) => {
                write!(
                    f,
                    "the guest cannot go on: KVM exit {reason} is not known to rvmm"
                )
            }
            Stop::UnknownEvent(kind) => {
                write!(
                    f,
                    "the guest cannot go on: KVM system event {kind} is not known to rvmm"
                )
            }
        }
    }
}
