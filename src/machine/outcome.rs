//! How a machine ended, and the exit status of rvmm for it.

use std::fmt;

use super::status;
use crate::vcpu::Stop;

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest ended the machine, or cannot go on.
    Guest(Stop),
    /// A signal requested the end.
    Signal(i32),
    /// A signal asked the guest to power off, but the guest did not do so in time.
    Overdue(i32),
    /// The user typed Ctrl-A X.
    Left,
    /// A command on the control socket ended the machine.
    Commanded,
    /// The time limit of `--timeout` has expired.
    TimedOut,
}

impl Outcome {
    /// rvmm's exit status, from the table in [`status`].
    pub fn exit_status(self) -> u8 {
        match self {
            Outcome::Guest(Stop::PowerOff) | Outcome::Left | Outcome::Commanded => 0,
            Outcome::Guest(Stop::Exit(code)) => exit_status(code),
            Outcome::Guest(Stop::Reset) => status::RESET,
            Outcome::Guest(Stop::Failure(_)) => status::GUEST_FAILED,
            Outcome::Guest(_) => status::CANNOT_GO_ON,
            Outcome::TimedOut => status::TIMED_OUT,
            // Signal numbers are at most 64.
            Outcome::Signal(number) | Outcome::Overdue(number) => {
                status::SIGNAL.saturating_add(u8::try_from(number).unwrap_or(127))
            }
        }
    }

    /// Whether the user expects this end. If not, rvmm prints a message.
    pub fn is_expected(self) -> bool {
        matches!(
            self,
            Outcome::Guest(Stop::PowerOff | Stop::Exit(_)) | Outcome::Left | Outcome::Commanded
        )
    }
}

/// The guest's exit code as an exit status: limited to the guest's range, 1 to
/// [`status::GUEST_MAX`]. Code 0 becomes 1, because it is a failure too.
fn exit_status(code: u16) -> u8 {
    u8::try_from(code.clamp(1, status::GUEST_MAX.into())).unwrap_or(u8::MAX)
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Guest(stop) => stop.fmt(f),
            Outcome::Signal(number) => write!(f, "ended by signal {number}"),
            Outcome::Overdue(number) => write!(
                f,
                "the guest did not power off in time; ended by signal {number}"
            ),
            Outcome::Left => write!(f, "ended by Ctrl-A X"),
            Outcome::Commanded => write!(f, "ended by a command"),
            Outcome::TimedOut => write!(f, "the time limit of --timeout has expired"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_status_is_the_documented_one() {
        let crash = Stop::Unrunnable { errno: 95, pc: 0 };
        for (outcome, status) in [
            (Outcome::Guest(Stop::PowerOff), 0),
            (Outcome::Left, 0),
            (Outcome::Commanded, 0),
            (Outcome::Guest(Stop::Exit(42)), 42),
            (Outcome::Guest(Stop::Exit(119)), 119),
            (Outcome::Guest(Stop::Exit(300)), 119),
            (Outcome::Guest(Stop::Exit(u16::MAX)), 119),
            (Outcome::Guest(Stop::Exit(0)), 1),
            (Outcome::Guest(Stop::Reset), 120),
            (Outcome::Guest(Stop::Failure(1)), 121),
            (Outcome::Guest(crash), 122),
            (Outcome::Guest(Stop::UnknownExit(7)), 122),
            (Outcome::TimedOut, 124),
            (Outcome::Signal(15), 143),
            (Outcome::Overdue(15), 143),
            (Outcome::Signal(2), 130),
        ] {
            assert_eq!(outcome.exit_status(), status, "{outcome}");
        }
    }
}
