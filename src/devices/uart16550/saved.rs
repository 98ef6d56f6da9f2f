//! The UART's saved state: the whole chip, so that the guest sees no difference.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::fifo::{Fifo, Received};
use super::modem::Modem;
use super::{Chip, IER_BITS, Registers, URGENT_MAX};
use crate::snapshot::{LoadError, State};

/// What [`Chip`] saves. The names are those of its registers.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UartState {
    ier: u8,
    /// The effective value of FCR: 0 while FIFOs are off.
    fcr: u8,
    lcr: u8,
    mcr: u8,
    /// The low half of MSR: the changes since MSR was last read.
    msr_changes: u8,
    scr: u8,
    /// The low byte, then the high byte.
    divisor: [u8; 2],
    /// The bit OE of LSR.
    overrun: bool,
    transmitted: bool,
    listening: bool,
    shown: bool,
    /// Bytes of loopback mode. The bytes of the line are in the console's state.
    fifo: Vec<ByteState>,
    urgent: Vec<ByteState>,
    /// The level of the interrupt line. It may lag behind the registers, because it does not change
    /// while the machine is paused.
    interrupt: bool,
}

/// A received byte.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ByteState {
    byte: u8,
    /// LSR will show BI for this byte.
    is_break: bool,
}

impl State for UartState {
    const KIND: &'static str = "uart16550";
    const VERSION: u32 = 1;
}

impl UartState {
    pub(super) fn of(chip: &Chip) -> Self {
        let registers = &chip.registers;
        Self {
            ier: registers.ier,
            fcr: registers.fifo.fcr(),
            lcr: registers.lcr,
            mcr: registers.modem.mcr(),
            msr_changes: registers.modem.deltas(),
            scr: registers.scr,
            divisor: registers.divisor,
            overrun: registers.fifo.overrun() != 0,
            transmitted: registers.transmitted,
            listening: registers.listening,
            shown: registers.shown,
            fifo: registers.fifo.iter().map(ByteState::of).collect(),
            urgent: registers.urgent.iter().map(ByteState::of).collect(),
            interrupt: chip.level,
        }
    }

    /// The registers, and the level of the interrupt line.
    ///
    /// # Errors
    /// Fails if the chip can never be in this state.
    pub(super) fn restored(self) -> Result<(Registers, bool), LoadError> {
        let unfit = |what: &str| LoadError::Unfit(format!("a 16550A can never have {what}"));
        if self.ier & !IER_BITS != 0 {
            return Err(unfit(&format!("the value {:#x} in IER", self.ier)));
        }
        let (fcr, bytes) = (self.fcr, self.fifo.len());
        let fifo = Fifo::restored(fcr, self.overrun, received(self.fifo)).ok_or_else(|| {
            let what = format!("the value {fcr:#x} in FCR with {bytes} bytes in its FIFO");
            unfit(&what)
        })?;
        let (mcr, changes) = (self.mcr, self.msr_changes);
        let modem = Modem::restored(mcr, changes).ok_or_else(|| {
            let what = format!("the value {mcr:#x} in MCR with the changes {changes:#x} in MSR");
            unfit(&what)
        })?;
        if self.urgent.len() > URGENT_MAX {
            let count = self.urgent.len();
            let what = format!("{count} bytes to send first, and {URGENT_MAX} are the limit");
            return Err(LoadError::Unfit(what));
        }
        let registers = Registers {
            ier: self.ier,
            lcr: self.lcr,
            scr: self.scr,
            divisor: self.divisor,
            modem,
            transmitted: self.transmitted,
            listening: self.listening,
            shown: self.shown,
            fifo,
            urgent: received(self.urgent),
        };
        Ok((registers, self.interrupt))
    }
}

impl ByteState {
    fn of(received: &Received) -> Self {
        Self {
            byte: received.byte,
            is_break: received.errors != 0,
        }
    }
}

fn received(bytes: Vec<ByteState>) -> VecDeque<Received> {
    let errors = |is_break| if is_break { Received::BREAK.errors } else { 0 };
    let each = bytes.into_iter().map(|saved| Received {
        byte: saved.byte,
        errors: errors(saved.is_break),
    });
    each.collect()
}
