//! The receive FIFO: bytes that have arrived, each with its errors, until RBR takes them.
//!
//! Without FIFOs it is the receiver's one holding register.

use std::collections::VecDeque;

use super::{FCR_CLEAR_RECEIVER, FCR_ENABLE, LSR_BREAK, LSR_OVERRUN};

/// Bytes that the FIFO holds.
pub(super) const DEPTH: usize = 16;

/// Bytes at which data is "available", by the two highest bits of FCR.
const TRIGGER_LEVELS: [usize; 4] = [1, 4, 8, 14];

/// A byte as the receiver has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Received {
    pub(super) byte: u8,
    /// The bits of LSR that tell what was wrong with it. LSR shows them when the byte is the next
    /// to be read.
    pub(super) errors: u8,
}

impl Received {
    /// The line was low for longer than a byte takes: a byte of zeros, and BI. The line has no
    /// noise, so FE and PE never come.
    pub(super) const BREAK: Self = Self {
        byte: 0,
        errors: LSR_BREAK,
    };

    pub(super) const fn good(byte: u8) -> Self {
        Self { byte, errors: 0 }
    }
}

/// The FIFO and the register that controls it.
#[derive(Debug, Default)]
pub(super) struct Fifo {
    /// At most [`Fifo::capacity`].
    bytes: VecDeque<Received>,
    /// FCR as it is in force: 0 without FIFOs.
    fcr: u8,
    /// A byte found no room since LSR was read last.
    overrun: bool,
}

impl Fifo {
    pub(super) fn enabled(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    /// How many bytes make an interrupt for available data.
    pub(super) fn trigger_level(&self) -> usize {
        TRIGGER_LEVELS[usize::from(self.fcr >> 6)]
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// How many bytes more it takes.
    pub(super) fn room(&self) -> usize {
        self.capacity().saturating_sub(self.len())
    }

    fn capacity(&self) -> usize {
        if self.enabled() { DEPTH } else { 1 }
    }

    /// Nothing here but bytes without an error can be seen in LSR. True nearly always.
    pub(super) fn is_quiet(&self) -> bool {
        self.bytes.is_empty() && !self.overrun
    }

    /// Writes FCR, and tells whether that emptied the FIFO. The other bits count only with FIFOs
    /// on; to turn FIFOs on or off empties them. OE stays: only a read of LSR clears it.
    pub(super) fn write_fcr(&mut self, value: u8) -> bool {
        let fcr = if value & FCR_ENABLE != 0 { value } else { 0 };
        let clears = (fcr ^ self.fcr) & FCR_ENABLE != 0 || fcr & FCR_CLEAR_RECEIVER != 0;
        self.fcr = fcr;
        if clears {
            self.bytes.clear();
        }
        clears
    }

    /// A byte arrives. A full FIFO keeps what it has; the holding register takes the new byte. One
    /// of them is lost, and that is an overrun.
    pub(super) fn put(&mut self, received: Received) {
        if self.room() == 0 {
            self.overrun = true;
            if self.enabled() {
                return;
            }
            self.bytes.clear();
        }
        self.bytes.push_back(received);
    }

    pub(super) fn pop(&mut self) -> Option<Received> {
        self.bytes.pop_front()
    }

    /// The bytes, the next to be read first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Received> {
        self.bytes.iter()
    }

    /// The byte to be read next.
    pub(super) fn first_mut(&mut self) -> Option<&mut Received> {
        self.bytes.front_mut()
    }

    /// LSR's OE.
    pub(super) fn overrun(&self) -> u8 {
        if self.overrun { LSR_OVERRUN } else { 0 }
    }

    /// LSR was read.
    pub(super) fn clear_overrun(&mut self) {
        self.overrun = false;
    }
}
