//! The modem control lines: MCR sets the outputs, MSR shows the inputs and their changes.
//!
//! The model acts as if a modem is always connected: DCD, DSR and CTS are on, RI is off. In
//! loopback mode the inputs are the chip's own outputs instead: DSR is DTR, CTS is RTS, RI is OUT1,
//! DCD is OUT2.

pub(super) const MCR_DTR: u8 = 0x01;
pub(super) const MCR_RTS: u8 = 0x02;
pub(super) const MCR_OUT1: u8 = 0x04;
pub(super) const MCR_OUT2: u8 = 0x08;
pub(super) const MCR_LOOPBACK: u8 = 0x10;
/// The bits of MCR that exist. Bits 5 to 7 are always 0.
const MCR_BITS: u8 = 0x1f;

pub(super) const MSR_CTS: u8 = 0x10;
pub(super) const MSR_DSR: u8 = 0x20;
pub(super) const MSR_RI: u8 = 0x40;
pub(super) const MSR_DCD: u8 = 0x80;
/// The input lines without loopback.
pub(super) const MSR_CONNECTED: u8 = MSR_DCD | MSR_DSR | MSR_CTS;
/// The bits of MSR that show changes.
const MSR_DELTAS: u8 = 0x0f;
/// The distance from the bit of a line down to the bit of its change (DCTS, DDSR, TERI, DDCD).
const DELTA_SHIFT: u8 = 4;

/// The input that each output drives in loopback mode.
const LOOPBACK_WIRES: [(u8, u8); 4] = [
    (MCR_DTR, MSR_DSR),
    (MCR_RTS, MSR_CTS),
    (MCR_OUT1, MSR_RI),
    (MCR_OUT2, MSR_DCD),
];

/// MCR and MSR.
#[derive(Debug, Default)]
pub(super) struct Modem {
    mcr: u8,
    /// The low half of MSR: the changes since MSR was last read.
    deltas: u8,
}

impl Modem {
    /// The modem lines with these values of MCR and of the low half of MSR. `None` if they can
    /// never have them.
    pub(super) fn restored(mcr: u8, deltas: u8) -> Option<Self> {
        let exist = mcr & !MCR_BITS == 0 && deltas & !MSR_DELTAS == 0;
        exist.then_some(Self { mcr, deltas })
    }

    #[inline]
    pub(super) fn mcr(&self) -> u8 {
        self.mcr
    }

    #[inline]
    pub(super) fn loopback(&self) -> bool {
        self.mcr & MCR_LOOPBACK != 0
    }

    pub(super) fn write_mcr(&mut self, value: u8) {
        let before = self.lines();
        self.mcr = value & MCR_BITS;
        let now = self.lines();
        // TERI reports only that RI went off. The other bits report every change.
        let changed = (before ^ now) & !MSR_RI | before & !now & MSR_RI;
        self.deltas |= changed >> DELTA_SHIFT;
    }

    /// Reads MSR. This clears the changes.
    pub(super) fn read_msr(&mut self) -> u8 {
        self.lines() | std::mem::take(&mut self.deltas)
    }

    /// The low half of MSR, without the effect of a read.
    pub(super) fn deltas(&self) -> u8 {
        self.deltas
    }

    /// Whether MSR has an unread change. This is the cause of the modem status interrupt.
    pub(super) fn has_changed(&self) -> bool {
        self.deltas != 0
    }

    /// The high half of MSR: the levels of the input lines.
    fn lines(&self) -> u8 {
        if !self.loopback() {
            return MSR_CONNECTED;
        }
        let wires = LOOPBACK_WIRES.iter();
        wires
            .filter(|(output, _)| self.mcr & output != 0)
            .fold(0, |lines, (_, input)| lines | input)
    }
}
