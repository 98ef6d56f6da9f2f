//! The receive FIFO: received bytes with their errors, until the guest reads them from RBR.
//!
//! While FIFOs are off it is the receiver's holding register for one byte.

use std::collections::VecDeque;

use super::{FCR_CLEAR_RECEIVER, FCR_ENABLE, LSR_BREAK, LSR_OVERRUN};

/// Bytes that the FIFO holds.
pub(super) const DEPTH: usize = 16;

/// Trigger levels in bytes, by the two highest bits of FCR.
const TRIGGER_LEVELS: [usize; 4] = [1, 4, 8, 14];

/// A received byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Received {
    pub(super) byte: u8,
    /// The error bits of LSR for this byte. LSR shows them when the byte is the next one to be
    /// read.
    pub(super) errors: u8,
}

impl Received {
    /// A break: the line was low for longer than a byte takes. It is received as a zero byte with
    /// BI. FE and PE never occur, because the line has no noise.
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
    /// At most [`Fifo::capacity`] bytes.
    bytes: VecDeque<Received>,
    /// See [`Fifo::fcr`].
    fcr: u8,
    /// A byte was lost since LSR was last read, because the FIFO was full.
    overrun: bool,
}

impl Fifo {
    /// The FIFO with this content. `None` if it can never have that.
    pub(super) fn restored(fcr: u8, overrun: bool, bytes: VecDeque<Received>) -> Option<Self> {
        let fifo = Self {
            bytes,
            fcr,
            overrun,
        };
        let is_fcr = fcr == 0 || fifo.enabled();
        (is_fcr && fifo.len() <= fifo.capacity()).then_some(fifo)
    }

    /// The effective value of FCR: 0 while FIFOs are off.
    pub(super) fn fcr(&self) -> u8 {
        self.fcr
    }

    pub(super) fn enabled(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    /// The number of bytes from which the received-data-available interrupt is raised.
    pub(super) fn trigger_level(&self) -> usize {
        TRIGGER_LEVELS[usize::from(self.fcr >> 6)]
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The number of bytes that still fit.
    pub(super) fn room(&self) -> usize {
        self.capacity().saturating_sub(self.len())
    }

    fn capacity(&self) -> usize {
        if self.enabled() { DEPTH } else { 1 }
    }

    /// Whether the FIFO has neither bytes nor an overrun to report in LSR. Nearly always true.
    pub(super) fn is_quiet(&self) -> bool {
        self.bytes.is_empty() && !self.overrun
    }

    /// Writes FCR, and returns whether that cleared the FIFO. Without the enable bit, FCR's other
    /// bits have no effect. Turning FIFOs on or off clears them. OE stays set: only a read of LSR
    /// clears it.
    pub(super) fn write_fcr(&mut self, value: u8) -> bool {
        let fcr = if value & FCR_ENABLE != 0 { value } else { 0 };
        let clears = (fcr ^ self.fcr) & FCR_ENABLE != 0 || fcr & FCR_CLEAR_RECEIVER != 0;
        self.fcr = fcr;
        if clears {
            self.bytes.clear();
        }
        clears
    }

    /// Receives a byte. On an overrun, a full FIFO drops the new byte, but the holding register
    /// drops the old one.
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

    /// The bytes, in the order in which they will be read.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Received> {
        self.bytes.iter()
    }

    /// The byte that will be read next.
    pub(super) fn first_mut(&mut self) -> Option<&mut Received> {
        self.bytes.front_mut()
    }

    /// The bit OE of LSR.
    pub(super) fn overrun(&self) -> u8 {
        if self.overrun { LSR_OVERRUN } else { 0 }
    }

    /// Clears OE. Must be called when LSR is read.
    pub(super) fn clear_overrun(&mut self) {
        self.overrun = false;
    }
}
