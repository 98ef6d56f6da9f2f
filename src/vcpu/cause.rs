//! Names of traps: values of `scause` (RISC-V Privileged Architecture, section "Supervisor Cause").

use std::fmt;

/// The bit of `scause` that marks an interrupt.
const INTERRUPT: u64 = 1 << 63;

/// A value of `scause`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cause(pub u64);

impl Cause {
    /// A fetch from a physical address that has no memory.
    pub const INSTRUCTION_ACCESS: Self = Cause(1);
    /// An instruction that the hart does not have, or not in this mode.
    pub const ILLEGAL_INSTRUCTION: Self = Cause(2);
    /// An `ebreak`.
    pub const BREAKPOINT: Self = Cause(3);
    /// A load from a physical address that does not take it.
    pub const LOAD_ACCESS: Self = Cause(5);
    /// A store or atomic access to a physical address that does not take it.
    pub const STORE_ACCESS: Self = Cause(7);
    /// A fetch that the page tables do not allow.
    pub const INSTRUCTION_PAGE: Self = Cause(12);
    /// A load that the page tables do not allow.
    pub const LOAD_PAGE: Self = Cause(13);
    /// A store or atomic access that the page tables do not allow.
    pub const STORE_PAGE: Self = Cause(15);

    /// Whether it is an exception, and not an interrupt.
    pub fn is_exception(self) -> bool {
        self.0 & INTERRUPT == 0
    }

    /// Whether `stval` is an address that the hart could not access.
    pub fn has_address(self) -> bool {
        matches!(self.0, 0 | 1 | 3..=7 | 12 | 13 | 15)
    }

    /// Whether the hart could not fetch an instruction.
    pub fn is_fetch(self) -> bool {
        matches!(self.0, 0 | 1 | 12)
    }

    fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            0 => "instruction address misaligned",
            1 => "instruction access fault",
            2 => "illegal instruction",
            3 => "breakpoint",
            4 => "load address misaligned",
            5 => "load access fault",
            6 => "store or atomic address misaligned",
            7 => "store or atomic access fault",
            8 => "environment call from user mode",
            9 => "environment call from supervisor mode",
            12 => "instruction page fault",
            13 => "load page fault",
            15 => "store or atomic page fault",
            18 => "software check",
            19 => "hardware error",
            _ => match self.0 ^ INTERRUPT {
                1 => "software interrupt",
                5 => "timer interrupt",
                9 => "external interrupt",
                13 => "counter overflow interrupt",
                _ => return None,
            },
        })
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None if self.0 & INTERRUPT != 0 => write!(f, "interrupt {}", self.0 ^ INTERRUPT),
            None => write!(f, "exception {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_have_their_names() {
        for (cause, name) in [
            (2, "illegal instruction"),
            (15, "store or atomic page fault"),
            (INTERRUPT | 5, "timer interrupt"),
            (14, "exception 14"),
            (INTERRUPT | 14, "interrupt 14"),
        ] {
            assert_eq!(Cause(cause).to_string(), name);
        }
        assert!(Cause::LOAD_PAGE.has_address() && !Cause::ILLEGAL_INSTRUCTION.has_address());
        assert!(Cause::INSTRUCTION_PAGE.is_fetch() && !Cause::LOAD_ACCESS.is_fetch());
    }
}
