//! A 16550A UART, after National Semiconductor's PC16550D data sheet. The registers are one byte
//! apart.
//!
//! `Registers` models the chip: it reads and writes a [`Console`] and computes the level of its
//! interrupt output. [`Uart`] connects it to the bus and to an interrupt line.
//!
//! The receive FIFO holds 16 bytes, or one byte while FIFOs are off. The bytes that the FIFO has
//! received from the line stay in the console's input queue until the guest reads RBR. They count
//! in LSR and IIR, but no FIFO flush, reset or loopback mode loses them. Bytes that do not fit in
//! the FIFO wait in the queue, as if the sender obeyed RTS. So overruns occur only in loopback
//! mode, where the chip sends to itself. In loopback mode the line's bytes do not count as in the
//! FIFO.
//!
//! The model has no timing: each byte is sent and received at once. So a character timeout is
//! pending as soon as there is data below the trigger level and no more waits on the line. Speed,
//! word length, parity and stop bits have no effect. If LCR's break bit is set in loopback mode,
//! the receiver gets one break, and it gets none of the bytes that are sent meanwhile. Without
//! loopback the break bit has no effect.
//!
//! Input that arrives before the guest is ready for it is held back: from a reset of the receiver
//! until the guest reads LSR or enables the receive interrupt, and while OUT2 is on (the driver
//! uses interrupts) but both RTS and the receive interrupt are off. A read of RBR removes a byte
//! only if the guest has seen that data is ready, or has enabled the receive interrupt. So a driver
//! that resets the chip and then clears it by blind reads, as Linux' does, loses no input that was
//! piped in early.

mod device;
mod fifo;
mod modem;
mod saved;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use self::fifo::{Fifo, Received};
use self::modem::{MCR_OUT2, MCR_RTS, Modem};
use super::console::{Console, LOW_ROOM, Listener};
use crate::bus::{IrqLine, MmioDevice};
use crate::util::sync::lock;

/// Bytes that a driver may send when THRE is set, before it checks THRE again: the size of the
/// chip's FIFO.
pub const BURST: usize = LOW_ROOM;

/// Size of the register range, as on QEMU's virt machine.
pub const SIZE: u64 = 0x100;

/// The largest number of bytes that rvmm itself sends to the guest at once.
const URGENT_MAX: usize = 16;

/// Offsets of the registers. A name with two parts stands for a read register and a write register.
mod reg {
    pub(super) const RBR_THR: u64 = 0;
    pub(super) const IER: u64 = 1;
    pub(super) const IIR_FCR: u64 = 2;
    pub(super) const LCR: u64 = 3;
    pub(super) const MCR: u64 = 4;
    pub(super) const LSR: u64 = 5;
    pub(super) const MSR: u64 = 6;
    pub(super) const SCR: u64 = 7;
}

const IER_RECEIVED: u8 = 0x01;
const IER_TRANSMITTED: u8 = 0x02;
const IER_LINE_STATUS: u8 = 0x04;
const IER_MODEM_STATUS: u8 = 0x08;
/// The bits of IER that exist. Bits 4 to 7 are always 0.
const IER_BITS: u8 = 0x0f;
/// Values of IIR, by rising priority.
const IIR_NONE: u8 = 0x01;
const IIR_MODEM_STATUS: u8 = 0x00;
const IIR_TRANSMITTED: u8 = 0x02;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE_STATUS: u8 = 0x06;
const IIR_FIFOS: u8 = 0xc0;
const FCR_ENABLE: u8 = 0x01;
const FCR_CLEAR_RECEIVER: u8 = 0x02;
const LCR_BREAK: u8 = 0x40;
const LCR_DLAB: u8 = 0x80;
const LSR_DATA_READY: u8 = 0x01;
const LSR_OVERRUN: u8 = 0x02;
const LSR_BREAK: u8 = 0x10;
/// Both the transmitter holding register and the shift register are empty.
const LSR_TRANSMITTER_EMPTY: u8 = 0x60;
/// Some byte in the FIFO has an error. Always 0 without FIFOs.
const LSR_ERROR_IN_FIFO: u8 = 0x80;

/// The chip's registers.
#[derive(Debug, Default)]
struct Registers {
    ier: u8,
    lcr: u8,
    scr: u8,
    divisor: [u8; 2],
    modem: Modem,
    /// The transmitter has become empty, and IIR has not reported this yet.
    transmitted: bool,
    /// Since the last reset of the receiver, the guest has read LSR or enabled the receive
    /// interrupt.
    listening: bool,
    /// LSR or IIR has reported to the guest that data from the line is ready.
    shown: bool,
    /// Bytes that the chip sent to itself in loopback mode. The guest reads them before the line's
    /// bytes.
    fifo: Fifo,
    /// Bytes that rvmm itself sends to the guest, at most [`URGENT_MAX`]. The guest reads them
    /// before the console's input.
    urgent: VecDeque<Received>,
}

impl Registers {
    fn read(&mut self, offset: u64, console: &Console) -> u8 {
        match offset {
            reg::RBR_THR if self.dlab() => self.divisor[0],
            reg::IER if self.dlab() => self.divisor[1],
            reg::RBR_THR => self.receive(console),
            reg::IER => self.ier,
            reg::IIR_FCR => self.read_iir(console),
            reg::LCR => self.lcr,
            reg::MCR => self.modem.mcr(),
            reg::LSR => self.read_lsr(console),
            reg::MSR => self.modem.read_msr(),
            reg::SCR => self.scr,
            _ => 0,
        }
    }

    /// The value of a register that reads back what was written, without side effects.
    #[inline]
    fn read_plain(&self, offset: u64) -> Option<u8> {
        match offset {
            reg::SCR => Some(self.scr),
            reg::LCR => Some(self.lcr),
            _ => None,
        }
    }

    fn write(&mut self, offset: u64, value: u8, console: &Console) {
        match offset {
            reg::RBR_THR if self.dlab() => self.divisor[0] = value,
            reg::IER if self.dlab() => self.divisor[1] = value,
            reg::RBR_THR => self.transmit(value, console),
            reg::IER => self.write_ier(value),
            reg::IIR_FCR => self.write_fcr(value),
            reg::LCR => self.write_lcr(value),
            reg::MCR => self.write_mcr(value),
            reg::SCR => self.scr = value,
            _ => {}
        }
    }

    /// The level of the chip's interrupt output.
    fn interrupt(&self, console: &Console) -> bool {
        self.pending(console) != IIR_NONE
    }

    /// The pending interrupt of highest priority, as a value of IIR.
    #[inline]
    fn pending(&self, console: &Console) -> u8 {
        if self.ier == 0 {
            IIR_NONE
        } else {
            self.pending_enabled(console)
        }
    }

    #[inline(never)]
    fn pending_enabled(&self, console: &Console) -> u8 {
        if self.ier & IER_LINE_STATUS != 0 && self.has_errors(console) {
            return IIR_LINE_STATUS;
        }
        if self.ier & IER_RECEIVED != 0 {
            let level = self.fifo.len() + self.line_bytes(console);
            if level >= self.fifo.trigger_level() {
                return IIR_RECEIVED;
            }
            if level > 0 {
                return IIR_TIMEOUT;
            }
        }
        if self.ier & IER_TRANSMITTED != 0 && self.transmitted && self.can_send(console) {
            IIR_TRANSMITTED
        } else if self.ier & IER_MODEM_STATUS != 0 && self.modem.has_changed() {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }

    #[inline(never)]
    fn read_iir(&mut self, console: &Console) -> u8 {
        let pending = self.pending(console);
        match pending {
            IIR_TRANSMITTED => self.transmitted = false,
            IIR_RECEIVED | IIR_TIMEOUT => self.shown |= self.line_bytes(console) > 0,
            _ => {}
        }
        pending | if self.fifo.enabled() { IIR_FIFOS } else { 0 }
    }

    #[inline(never)]
    fn read_lsr(&mut self, console: &Console) -> u8 {
        let line = self.line_bytes(console);
        self.shown = line > 0;
        self.listening |= !self.modem.loopback();
        let mut lsr = 0;
        if self.shown {
            lsr |= LSR_DATA_READY;
        }
        if self.can_send(console) {
            lsr |= LSR_TRANSMITTER_EMPTY;
        }
        if !self.is_plain() {
            lsr |= self.take_unusual(line);
        }
        lsr
    }

    /// Whether the received bytes are only the console's, without errors.
    #[inline]
    fn is_plain(&self) -> bool {
        self.fifo.is_quiet() && self.urgent.is_empty()
    }

    /// The additional bits of LSR when the received bytes are not only the console's. Reading
    /// clears the errors.
    #[cold]
    #[inline(never)]
    fn take_unusual(&mut self, line: usize) -> u8 {
        let mut lsr = self.errors(line);
        if !self.fifo.is_empty() {
            lsr |= LSR_DATA_READY;
        }
        self.fifo.clear_overrun();
        let of_line = self.urgent.front_mut().filter(|_| line > 0);
        if let Some(next) = self.fifo.first_mut().or(of_line) {
            next.errors = 0;
        }
        lsr
    }

    /// The error bits of LSR. `line` bytes of the FIFO are from the line.
    #[cold]
    #[inline(never)]
    fn errors(&self, line: usize) -> u8 {
        let of_line = self.urgent.iter().take(line);
        let mut received = self.fifo.iter().chain(of_line).map(|byte| byte.errors);
        let mut errors = received.next().unwrap_or(0);
        if self.fifo.enabled() && (errors != 0 || received.any(|errors| errors != 0)) {
            errors |= LSR_ERROR_IN_FIFO;
        }
        errors | self.fifo.overrun()
    }

    /// Whether a line status interrupt is pending. An error of a byte behind the next one does not
    /// raise it yet.
    fn has_errors(&self, console: &Console) -> bool {
        !self.is_plain() && self.errors(self.line_bytes(console)) & !LSR_ERROR_IN_FIFO != 0
    }

    fn write_ier(&mut self, value: u8) {
        // Enabling the transmit interrupt raises it if the transmitter is empty.
        if value & !self.ier & IER_TRANSMITTED != 0 {
            self.transmitted = true;
        }
        if value & IER_RECEIVED != 0 {
            self.listening = true;
        }
        self.ier = value & IER_BITS;
    }

    fn write_fcr(&mut self, value: u8) {
        if self.fifo.write_fcr(value) {
            self.shown = false;
            self.listening = self.ier & IER_RECEIVED != 0;
        }
    }

    fn write_lcr(&mut self, value: u8) {
        let before = self.hears_own_break();
        self.lcr = value;
        self.hear_break_since(before);
    }

    fn write_mcr(&mut self, value: u8) {
        let before = self.hears_own_break();
        self.modem.write_mcr(value);
        self.hear_break_since(before);
    }

    /// Whether the receiver sees the break that LCR's break bit sends, because of loopback mode.
    fn hears_own_break(&self) -> bool {
        self.modem.loopback() && self.lcr & LCR_BREAK != 0
    }

    /// Receives a break if one has begun. However long it lasts, a break is received once.
    fn hear_break_since(&mut self, before: bool) {
        if !before && self.hears_own_break() {
            self.fifo.put(Received::BREAK);
        }
    }

    /// Sends a byte. If the console has no room it is lost, as on a real line: the driver ignored
    /// that THRE was 0.
    #[inline(never)]
    fn transmit(&mut self, byte: u8, console: &Console) {
        if self.modem.loopback() {
            self.loop_back(byte);
        } else {
            console.write(&[byte]);
        }
        self.transmitted = true;
    }

    #[cold]
    #[inline(never)]
    fn loop_back(&mut self, byte: u8) {
        if !self.hears_own_break() {
            self.fifo.put(Received::good(byte));
        }
    }

    #[inline(never)]
    fn receive(&mut self, console: &Console) -> u8 {
        if let Some(received) = self.fifo.pop() {
            return received.byte;
        }
        let may_take = self.shown || self.ier & IER_RECEIVED != 0;
        if self.modem.loopback() || !may_take {
            return 0;
        }
        if let Some(received) = self.urgent.pop_front() {
            return received.byte;
        }
        let mut byte = [0];
        console.read(&mut byte);
        byte[0]
    }

    /// The number of the line's bytes in the FIFO: those that wait, up to the room in the FIFO.
    fn line_bytes(&self, console: &Console) -> usize {
        if !self.listening || self.modem.loopback() || self.held_back() {
            return 0;
        }
        let waiting = self.urgent.len() + console.input_len();
        waiting.min(self.fifo.room())
    }

    /// Whether input is held back, because an interrupt-driven guest is not ready to receive yet.
    fn held_back(&self) -> bool {
        self.modem.mcr() & (MCR_OUT2 | MCR_RTS) == MCR_OUT2 && self.ier & IER_RECEIVED == 0
    }

    fn can_send(&self, console: &Console) -> bool {
        self.modem.loopback() || console.output_room() >= BURST
    }

    fn dlab(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }
}

/// The UART device.
pub struct Uart {
    chip: Mutex<Chip>,
    console: Arc<Console>,
    line: IrqLine,
    base: u64,
}

struct Chip {
    registers: Registers,
    /// The current level of the interrupt line.
    level: bool,
    /// The device is paused: the interrupt line keeps its level.
    is_paused: bool,
}

impl Uart {
    /// Creates a UART at guest-physical address `base` with interrupt line `line`, connected to
    /// `console`.
    pub fn new(base: u64, line: IrqLine, console: Arc<Console>) -> Arc<Self> {
        let uart = Arc::new(Self {
            chip: Mutex::new(Chip {
                registers: Registers::default(),
                level: false,
                is_paused: false,
            }),
            console: Arc::clone(&console),
            line,
            base,
        });
        let listener: Arc<dyn Listener> = uart.clone();
        console.set_listener(Arc::downgrade(&listener));
        uart
    }

    /// Sends Linux a SysRq command for each of `keys`: a break and the key, before all other input
    /// (`Documentation/admin-guide/sysrq.rst`). A guest without SysRq reads a NUL and the key for
    /// each. At most eight keys are sent.
    pub fn sysrq(&self, keys: &[u8]) {
        self.with_registers(|chip| {
            chip.urgent = keys
                .iter()
                .flat_map(|key| [Received::BREAK, Received::good(*key)])
                .take(URGENT_MAX)
                .collect();
        });
    }

    /// Accesses the registers, then sets the interrupt line if its level has changed.
    fn with_registers<T>(&self, access: impl FnOnce(&mut Registers) -> T) -> T {
        self.with_chip(&mut lock(&self.chip), access)
    }

    #[inline(never)]
    fn read_with_effect(&self, chip: &mut Chip, offset: u64) -> u8 {
        self.with_chip(chip, |registers| registers.read(offset, &self.console))
    }

    fn with_chip<T>(&self, chip: &mut Chip, access: impl FnOnce(&mut Registers) -> T) -> T {
        let result = access(&mut chip.registers);
        let level = chip.registers.interrupt(&self.console);
        if level != chip.level && !chip.is_paused {
            chip.level = level;
            self.line.set_level(level);
        }
        result
    }
}

/// An access of more than one byte accesses only its first register.
impl MmioDevice for Uart {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(byte) = data.first_mut() {
            let mut chip = lock(&self.chip);
            *byte = match chip.registers.read_plain(offset) {
                Some(value) => value,
                None => self.read_with_effect(&mut chip, offset),
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(byte) = data.first() {
            self.with_registers(|chip| chip.write(offset, *byte, &self.console));
        }
    }
}

impl Listener for Uart {
    fn console_changed(&self) {
        self.with_registers(|_| ());
    }
}

#[cfg(test)]
mod tests;
