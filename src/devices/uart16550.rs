//! A 16550A UART: National Semiconductor's PC16550D data sheet, registers a byte apart.
//!
//! `Registers` is the chip, pure: it reads and writes a [`Console`] and tells the level of its
//! interrupt. [`Uart`] attaches it to the bus and to a wire.
//!
//! Input that comes before the guest listens is held back, as if the sender minded the modem lines
//! and had little speed: after the receiver was reset until the guest looks at it once more, and
//! while OUT2 is on (the driver uses interrupts) but neither RTS nor the receive interrupt. And
//! reading the receive buffer without having seen that data is ready takes nothing. A driver that
//! resets the chip and clears it by blind reads, as Linux' does, so loses no byte of a pipe.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::console::{Console, LOW_ROOM, Listener};
use crate::bus::{Device, FdtError, FdtWriter, IrqLine, MmioDevice};
use crate::util::sync::lock;

/// Bytes that a driver sends after THRE without looking again: the size of the chip's FIFO.
pub const BURST: usize = LOW_ROOM;

/// The range on the bus, as QEMU's virt machine has it.
pub const SIZE: u64 = 0x100;

/// Hz; with the divisor the guest programs it says nothing here, drivers want one.
const CLOCK: u32 = 3_686_400;

/// Registers by offset. Each is one name for reading and one for writing.
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
const IIR_NONE: u8 = 0x01;
const IIR_TRANSMITTED: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_FIFOS: u8 = 0xc0;
const FCR_ENABLE: u8 = 0x01;
const FCR_CLEAR_RECEIVER: u8 = 0x02;
const LCR_DLAB: u8 = 0x80;
const MCR_RTS: u8 = 0x02;
const MCR_OUT2: u8 = 0x08;
const MCR_LOOPBACK: u8 = 0x10;
const LSR_DATA_READY: u8 = 0x01;
const LSR_BREAK: u8 = 0x10;
/// Transmitter holding register and shift register empty.
const LSR_TRANSMITTER_EMPTY: u8 = 0x60;
/// Carrier, ring off, data set ready, clear to send.
const MSR_CONNECTED: u8 = 0xb0;

/// The chip's registers.
#[derive(Debug, Default)]
struct Registers {
    ier: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    divisor: [u8; 2],
    fifos: bool,
    /// The transmitter became empty since IIR said so last or THR was written.
    transmitted: bool,
    /// The guest has looked at the line since it reset the receiver.
    listening: bool,
    /// The guest was told that data is ready.
    shown: bool,
    /// The byte sent to itself in loopback.
    looped: Option<u8>,
    /// What comes before the console's input: a break, or a byte.
    urgent: VecDeque<Urgent>,
}

/// What rvmm itself sends to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Urgent {
    /// The line was held low for longer than a byte takes.
    Break,
    Byte(u8),
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
            reg::MCR => self.mcr,
            reg::LSR => self.read_lsr(console),
            reg::MSR => self.msr(),
            reg::SCR => self.scr,
            _ => 0,
        }
    }

    fn write(&mut self, offset: u64, value: u8, console: &Console) {
        match offset {
            reg::RBR_THR if self.dlab() => self.divisor[0] = value,
            reg::IER if self.dlab() => self.divisor[1] = value,
            reg::RBR_THR => self.transmit(value, console),
            reg::IER => self.write_ier(value),
            reg::IIR_FCR => self.write_fcr(value),
            reg::LCR => self.lcr = value,
            reg::MCR => self.mcr = value & 0x1f,
            reg::SCR => self.scr = value,
            _ => {}
        }
    }

    /// The level of the chip's interrupt output.
    fn interrupt(&self, console: &Console) -> bool {
        self.pending(console) != IIR_NONE
    }

    /// The pending interrupt of highest priority, as IIR names it.
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
        if self.ier & IER_RECEIVED != 0 && self.data_ready(console) {
            IIR_RECEIVED
        } else if self.ier & IER_TRANSMITTED != 0 && self.transmitted && self.can_send(console) {
            IIR_TRANSMITTED
        } else {
            IIR_NONE
        }
    }

    #[inline(never)]
    fn read_iir(&mut self, console: &Console) -> u8 {
        let pending = self.pending(console);
        match pending {
            IIR_TRANSMITTED => self.transmitted = false,
            IIR_RECEIVED => self.shown = true,
            _ => {}
        }
        pending | if self.fifos { IIR_FIFOS } else { 0 }
    }

    #[inline(never)]
    fn read_lsr(&mut self, console: &Console) -> u8 {
        let mut lsr = 0;
        self.shown = self.data_ready(console);
        self.listening = true;
        if self.shown {
            lsr |= LSR_DATA_READY;
            if self.urgent.front() == Some(&Urgent::Break) {
                lsr |= LSR_BREAK;
            }
        }
        if self.can_send(console) {
            lsr |= LSR_TRANSMITTER_EMPTY;
        }
        lsr
    }

    /// In loopback the modem's outputs come back as its inputs (DTR-DSR, RTS-CTS, OUT1-RI,
    /// OUT2-DCD).
    #[inline(never)]
    fn msr(&self) -> u8 {
        if !self.loopback() {
            return MSR_CONNECTED;
        }
        let (dtr, rts) = (self.mcr & 0x01, self.mcr & 0x02);
        (dtr << 5) | (rts << 3) | ((self.mcr & 0x0c) << 4)
    }

    fn write_ier(&mut self, value: u8) {
        // Enabling the transmit interrupt while the transmitter is empty raises it.
        if value & !self.ier & IER_TRANSMITTED != 0 {
            self.transmitted = true;
        }
        if value & IER_RECEIVED != 0 {
            self.listening = true;
        }
        self.ier = value & 0x0f;
    }

    fn write_fcr(&mut self, value: u8) {
        self.fifos = value & FCR_ENABLE != 0;
        if value & FCR_CLEAR_RECEIVER != 0 {
            self.looped = None;
            self.shown = false;
            self.listening = self.ier & IER_RECEIVED != 0;
        }
    }

    /// A byte that finds no room is lost, as on a wire: THRE was 0.
    #[inline(never)]
    fn transmit(&mut self, byte: u8, console: &Console) {
        if self.loopback() {
            self.looped = Some(byte);
        } else {
            console.write(&[byte]);
        }
        self.transmitted = true;
    }

    #[inline(never)]
    fn receive(&mut self, console: &Console) -> u8 {
        if self.loopback() {
            return self.looped.take().unwrap_or(0);
        }
        let mut byte = [0];
        if self.shown || self.ier & IER_RECEIVED != 0 {
            match self.urgent.pop_front() {
                Some(Urgent::Byte(byte)) => return byte,
                Some(Urgent::Break) => return 0,
                None => {
                    console.read(&mut byte);
                }
            }
        }
        byte[0]
    }

    fn data_ready(&self, console: &Console) -> bool {
        if self.loopback() {
            return self.looped.is_some();
        }
        let has_input = !self.urgent.is_empty() || console.input_len() > 0;
        self.listening && !self.held_back() && has_input
    }

    /// An interrupt-driven guest that is not ready to receive yet.
    fn held_back(&self) -> bool {
        self.mcr & (MCR_OUT2 | MCR_RTS) == MCR_OUT2 && self.ier & IER_RECEIVED == 0
    }

    fn can_send(&self, console: &Console) -> bool {
        self.loopback() || console.output_room() >= BURST
    }

    fn dlab(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    fn loopback(&self) -> bool {
        self.mcr & MCR_LOOPBACK != 0
    }
}

/// The UART on the bus.
pub struct Uart {
    chip: Mutex<Chip>,
    console: Arc<Console>,
    line: IrqLine,
    base: u64,
}

struct Chip {
    registers: Registers,
    /// The level the wire has now.
    level: bool,
}

impl Uart {
    /// A UART at guest-physical address `base`, on `line`, that talks to `console`.
    pub fn new(base: u64, line: IrqLine, console: Arc<Console>) -> Arc<Self> {
        let uart = Arc::new(Self {
            chip: Mutex::new(Chip {
                registers: Registers::default(),
                level: false,
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
    /// (`Documentation/admin-guide/sysrq.rst`). Who knows no SysRq reads NULs and the keys.
    pub fn sysrq(&self, keys: &[u8]) {
        self.with_registers(|chip| {
            chip.urgent = keys
                .iter()
                .flat_map(|key| [Urgent::Break, Urgent::Byte(*key)])
                .collect();
        });
    }

    /// Accesses the registers, then moves the wire if its level has changed.
    fn with_registers<T>(&self, access: impl FnOnce(&mut Registers) -> T) -> T {
        let mut chip = lock(&self.chip);
        let result = access(&mut chip.registers);
        let level = chip.registers.interrupt(&self.console);
        if level != chip.level {
            chip.level = level;
            self.line.set_level(level);
        }
        result
    }
}

/// Wider accesses see the one register they start at.
impl MmioDevice for Uart {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(byte) = data.first_mut() {
            *byte = self.with_registers(|chip| chip.read(offset, &self.console));
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

impl Device for Uart {
    fn fdt_node(&self, fdt: &mut FdtWriter) -> Result<(), FdtError> {
        let node = fdt.begin_node(&format!("serial@{:x}", self.base))?;
        fdt.property_string("compatible", "ns16550a")?;
        fdt.property_array_u64("reg", &[self.base, SIZE])?;
        fdt.property_u32("clock-frequency", CLOCK)?;
        fdt.property_array_u32("interrupts-extended", &self.line.fdt_interrupt())?;
        fdt.end_node(node)
    }
}

#[cfg(test)]
mod tests;
