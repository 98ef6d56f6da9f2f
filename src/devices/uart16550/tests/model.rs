//! Compares the chip with a simple model of it, through a long random sequence of accesses. Now and
//! then the chip is saved, and goes on in a new machine. The random numbers are the same in each
//! run.

use std::collections::BTreeSet;

use super::*;

const STEPS: usize = 50_000;

/// A pseudo-random generator: xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u8 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.to_le_bytes()[3]
    }
    fn below(&mut self, limit: u8) -> u8 {
        self.next() % limit
    }
}

/// The chip as a driver sees it, according to the data sheet. The receive interrupt is always
/// enabled.
#[derive(Default)]
struct Model {
    /// Bytes that arrived in loopback mode, with their errors.
    own: VecDeque<(u8, u8)>,
    /// Bytes that were typed.
    line: VecDeque<u8>,
    fifos: bool,
    trigger: usize,
    overrun: bool,
    ier: u8,
    lcr: u8,
    mcr: u8,
    deltas: u8,
    sent: bool,
}

impl Model {
    fn looped(&self) -> bool {
        self.mcr & 0x10 != 0
    }

    /// The bytes that are in the FIFO now, with their errors.
    fn fifo(&self) -> Vec<(u8, u8)> {
        let depth = if self.fifos { 16 } else { 1 };
        let line = self.line.iter().filter(|_| !self.looped());
        let all = self.own.iter().copied().chain(line.map(|byte| (*byte, 0)));
        all.take(depth).collect()
    }

    fn arrives(&mut self, byte: u8, errors: u8) {
        let depth = if self.fifos { 16 } else { 1 };
        if self.own.len() < depth {
            self.own.push_back((byte, errors));
        } else {
            self.overrun = true;
            if !self.fifos {
                self.own[0] = (byte, errors);
            }
        }
    }

    fn errors(&self) -> u8 {
        let (fifo, mut errors) = (self.fifo(), 0);
        if let Some((_, first)) = fifo.first() {
            errors |= first;
        }
        if self.overrun {
            errors |= 0x02;
        }
        errors
    }

    fn lsr(&mut self) -> u8 {
        let fifo = self.fifo();
        let mut lsr = 0x60 | self.errors();
        if !fifo.is_empty() {
            lsr |= 0x01;
        }
        if self.fifos && fifo.iter().any(|(_, errors)| *errors != 0) {
            lsr |= 0x80;
        }
        self.overrun = false;
        if let Some(first) = self.own.front_mut() {
            first.1 = 0;
        }
        lsr
    }

    fn rbr(&mut self) -> u8 {
        if let Some((byte, _)) = self.own.pop_front() {
            byte
        } else if self.looped() {
            0
        } else {
            self.line.pop_front().unwrap_or(0)
        }
    }

    fn cause(&self) -> u8 {
        let level = self.fifo().len();
        if self.ier & 4 != 0 && self.errors() != 0 {
            0x06
        } else if level > 0 && (!self.fifos || level >= self.trigger) {
            0x04
        } else if level > 0 {
            0x0c
        } else if self.ier & 2 != 0 && self.sent {
            0x02
        } else if self.ier & 8 != 0 && self.deltas != 0 {
            0x00
        } else {
            0x01
        }
    }

    fn iir(&mut self) -> u8 {
        let cause = self.cause();
        self.sent &= cause != 0x02;
        cause | if self.fifos { 0xc0 } else { 0 }
    }

    fn lines(&self) -> u8 {
        if !self.looped() {
            return 0xb0;
        }
        let bit = |from: u8, to: u8| ((self.mcr >> from) & 1) << to;
        bit(0, 5) | bit(1, 4) | bit(2, 6) | bit(3, 7)
    }

    fn msr(&mut self) -> u8 {
        self.lines() | std::mem::take(&mut self.deltas)
    }

    fn thr(&mut self, byte: u8) {
        self.sent = true;
        if self.looped() && self.lcr & 0x40 == 0 {
            self.arrives(byte, 0);
        }
    }

    fn write_ier(&mut self, ier: u8) {
        self.sent |= ier & !self.ier & 2 != 0;
        self.ier = ier;
    }

    fn write_fcr(&mut self, fcr: u8) {
        let on = fcr & 1 != 0;
        if on != self.fifos || on && fcr & 2 != 0 {
            self.own.clear();
        }
        self.fifos = on;
        self.trigger = [1, 4, 8, 14][usize::from(fcr >> 6)];
    }

    fn write_control(&mut self, lcr: u8, mcr: u8) {
        let (lines, broken) = (self.lines(), self.looped() && self.lcr & 0x40 != 0);
        (self.lcr, self.mcr) = (lcr, mcr);
        for (line, delta) in [(0x10, 1), (0x20, 2), (0x80, 8)] {
            if (lines ^ self.lines()) & line != 0 {
                self.deltas |= delta;
            }
        }
        if lines & 0x40 != 0 && self.lines() & 0x40 == 0 {
            self.deltas |= 4;
        }
        if !broken && self.looped() && lcr & 0x40 != 0 {
            self.arrives(0, 0x10);
        }
    }
}

/// Does one random access to both. After a read, returns the register and the values of chip and
/// model.
fn step(bench: &Bench, model: &mut Model, random: &mut Random) -> (u64, u8, u8) {
    let value = random.next();
    match random.below(32) {
        0..8 => {
            bench.write(reg::RBR_THR, value);
            model.thr(value);
        }
        8..10 => {
            // Limited, so that the console's input queue never gets full.
            let room = 100_usize.saturating_sub(model.line.len());
            let typed: Vec<u8> = (value..=255).take(room.min(20)).collect();
            bench.console.type_input(&typed);
            model.line.extend(typed);
        }
        10 => {
            bench.write(reg::IER, value & 0x0f | IER_RECEIVED);
            model.write_ier(value & 0x0f | IER_RECEIVED);
        }
        11 => {
            // FIFOs are mostly on, and rarely cleared.
            let fcr = value & if value & 4 != 0 { 0xc2 } else { 0xc0 };
            let fcr = fcr | u8::from(value & 0x38 != 0);
            bench.write(reg::IIR_FCR, fcr);
            model.write_fcr(fcr);
        }
        12 => {
            bench.write(reg::LCR, value & 0x7f);
            model.write_control(value & 0x7f, model.mcr);
        }
        13 => {
            bench.write(reg::MCR, value);
            model.write_control(model.lcr, value & 0x1f);
        }
        14..18 => return (reg::LSR, bench.read(reg::LSR), model.lsr()),
        18..22 => return (reg::IIR_FCR, bench.read(reg::IIR_FCR), model.iir()),
        22..24 => return (reg::MSR, bench.read(reg::MSR), model.msr()),
        _ => return (reg::RBR_THR, bench.read(reg::RBR_THR), model.rbr()),
    }
    (0, 0, 0)
}

#[test]
fn the_chip_does_as_the_data_sheet_says() {
    let (mut bench, mut model, mut random) = (bench(), Model::default(), Random(0x16550));
    bench.write(reg::IER, IER_RECEIVED);
    model.write_ier(IER_RECEIVED);
    let mut level = false;
    let mut seen = BTreeSet::new();
    for number in 0..STEPS {
        if random.below(32) == 0 {
            bench = bench.moved();
            level = bench.levels().pop().expect("the new wire has a level");
        }
        let (register, chip, wanted) = step(&bench, &mut model, &mut random);
        assert_eq!(chip, wanted, "step {number}, register {register}");
        seen.insert((register, chip));
        level = bench.levels().pop().unwrap_or(level);
        let interrupt = model.cause() & 0x01 == 0;
        assert_eq!(level, interrupt, "step {number}: the wire");
    }
    assert!(seen.len() > 300, "most states were reached");
}

/// Whatever is written to any register, the FIFO does not grow beyond its size, and the chip can be
/// saved and restored.
#[test]
fn random_accesses_are_harmless() {
    let (mut bench, mut random) = (bench(), Random(0x8250));
    for number in 0..STEPS {
        if number % 64 == 0 {
            let saved = bench.uart.save().unwrap();
            bench = bench.moved();
            assert_eq!(bench.uart.save().unwrap(), saved);
            bench.console.type_input(&[random.next(); 30]);
            bench.uart.sysrq(b"suo");
        }
        let offset = u64::from(random.below(9));
        if random.below(3) == 0 {
            bench.read(offset);
        } else {
            bench.write(offset, random.next());
        }
        let chip = lock(&bench.uart.chip);
        assert!(chip.registers.fifo.len() <= super::super::fifo::DEPTH);
    }
}
