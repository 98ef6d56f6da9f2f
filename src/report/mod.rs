//! The report on a guest that went wrong: what its harts are doing, in words.
//!
//! [`Hart`] has the registers of a hart that does not run. [`Report`] explains them: the place
//! that each address leads to, the instruction at `pc`, the last trap, the page tables, the
//! callers, and the likely mistake. It reads guest RAM and changes nothing.

pub mod backtrace;
pub mod hint;
pub mod symbols;

use std::fmt;

use disc_v::{Isa, decode};

use crate::memory::GuestMemory;
use crate::vcpu::hart::{Hart, NAMES};
use crate::vcpu::paging::{Step, Walk, entry_bits, mode_name, walk_with};
use backtrace::{Place, backtrace};
use hint::hint;
use symbols::{Name, Symbols};

/// The report on one hart. Its `Display` form is lines for people.
pub struct Report<'a> {
    /// The hart.
    pub hart: &'a Hart,
    /// The guest's RAM.
    pub ram: &'a GuestMemory,
    /// Names of the guest's code, if there are any.
    pub symbols: Option<&'a Symbols>,
    /// What is at a guest-physical address, such as "RAM, in the kernel" or "UART".
    pub place: &'a dyn Fn(u64) -> String,
}

impl Report<'_> {
    /// An address, and its symbol if it has one.
    fn named(&self, address: u64) -> String {
        let name = self.symbols.and_then(|symbols| symbols.name(address));
        with_name(address, name)
    }

    /// The same for a return address.
    fn named_return(&self, address: u64) -> String {
        let name = self.symbols.and_then(|symbols| symbols.caller(address));
        with_name(address, name)
    }

    /// What a virtual address leads to.
    fn leads_to(&self, address: u64) -> String {
        match self.hart.physical(self.ram, address) {
            Some(physical) if physical == address => (self.place)(physical),
            Some(physical) => format!("{physical:#x}, {}", (self.place)(physical)),
            None => "nothing: it is not mapped".into(),
        }
    }

    /// Where the hart is, as one line with a newline.
    pub fn heading(&self) -> String {
        let hart = self.hart;
        if hart.is_stopped {
            return format!("hart {}: stopped\n", hart.number);
        }
        let mode = match hart.is_supervisor {
            true => "supervisor",
            false => "user",
        };
        let pc = self.named(hart.pc);
        format!("hart {}: at {pc}, in {mode} mode\n", hart.number)
    }

    fn position(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let hart = self.hart;
        writeln!(f, "  pc leads to {}", self.leads_to(hart.pc))?;
        match hart.instruction(self.ram, hart.pc) {
            Some((bytes, length)) => {
                let text = decode(Isa::Rv64, hart.pc, bytes.into());
                let digits = 2 * length;
                writeln!(f, "  instruction: {bytes:0digits$x}  {text}")
            }
            None => writeln!(f, "  instruction: none can be read there"),
        }
    }

    fn last_trap(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let hart = self.hart;
        if !hart.has_trapped() {
            return writeln!(f, "  no trap so far");
        }
        let (cause, at) = (hart.cause(), self.named(hart.sepc));
        writeln!(f, "  last trap: {cause}, at {at}")?;
        if cause.has_address() {
            let to = self.leads_to(hart.stval);
            writeln!(f, "    the address {:#x} leads to {to}", hart.stval)?;
        } else if hart.stval != 0 {
            writeln!(f, "    stval is {:#x}", hart.stval)?;
        }
        Ok(())
    }

    fn likely_mistake(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match hint(self.hart, self.ram) {
            Some(hint) => writeln!(f, "  hint: {hint}"),
            None => Ok(()),
        }
    }

    fn registers(&self, f: &mut fmt::Formatter) -> fmt::Result {
        const IN_A_ROW: usize = 4;
        let hart = self.hart;
        let general = NAMES.into_iter().zip(hart.x).skip(1);
        let system = [
            ("pc", hart.pc),
            ("sstatus", hart.sstatus),
            ("stvec", hart.stvec),
            ("sepc", hart.sepc),
            ("scause", hart.scause),
            ("stval", hart.stval),
            ("satp", hart.satp),
            ("sie", hart.sie),
            ("sip", hart.sip),
        ];
        let all: Vec<(&str, u64)> = general.chain(system).collect();
        writeln!(f, "  registers:")?;
        for row in all.chunks(IN_A_ROW) {
            f.write_str("   ")?;
            for (name, value) in row {
                write!(f, " {name:>7} {value:016x}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }

    fn page_tables(&self, f: &mut fmt::Formatter, what: &str, address: u64) -> fmt::Result {
        let mode = mode_name(self.hart.satp);
        writeln!(f, "  page tables ({mode}) of {what}, {address:#x}:")?;
        let mut steps = Vec::new();
        let end = walk_with(self.ram, self.hart.satp, address, |step| steps.push(step));
        for Step { level, at, entry } in steps {
            match entry {
                Some(entry) => {
                    let bits = entry_bits(entry);
                    writeln!(f, "    level {level}: {entry:016x} at {at:#x}, {bits}")?;
                }
                None => writeln!(f, "    level {level}: the table is outside RAM, at {at:#x}")?,
            }
        }
        match end {
            Walk::At(physical) => writeln!(f, "    leads to {physical:#x}"),
            Walk::NoEntry => writeln!(f, "    leads nowhere"),
            Walk::Unmapped => writeln!(f, "    not mapped"),
        }
    }

    fn callers(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "  called from:")?;
        for place in backtrace(self.hart, self.ram) {
            let text = match place {
                Place::At(address) => self.named(address),
                Place::Return(address) => self.named_return(address),
            };
            writeln!(f, "    {text}")?;
        }
        Ok(())
    }
}

fn with_name(address: u64, name: Option<Name<'_>>) -> String {
    match name {
        Some(name) => format!("{address:#x} ({name})"),
        None => format!("{address:#x}"),
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.heading())?;
        if self.hart.is_stopped {
            return Ok(());
        }
        self.position(f)?;
        self.last_trap(f)?;
        self.likely_mistake(f)?;
        self.registers(f)?;
        if self.hart.satp >> 60 != 0 {
            self.page_tables(f, "pc", self.hart.pc)?;
            if self.hart.has_trapped() && self.hart.cause().has_address() {
                self.page_tables(f, "stval", self.hart.stval)?;
            }
        }
        self.callers(f)
    }
}

#[cfg(test)]
mod tests;
