//! Tests of the receive FIFO: its capacity, its interrupts, and the errors that it reports.

use super::*;

const FCR_TRIGGER_4: u8 = 0x40;
const FCR_TRIGGER_8: u8 = 0x80;
const FCR_TRIGGER_14: u8 = 0xc0;
const WORD_OF_8: u8 = 0x03;
const DR: u8 = LSR_DATA_READY;
const OE: u8 = LSR_OVERRUN;
const BI: u8 = LSR_BREAK;
const ERROR: u8 = LSR_ERROR_IN_FIFO;

/// A UART in loopback mode, with this FCR.
fn looped(fcr: u8) -> Bench {
    let bench = bench();
    bench.write(reg::IIR_FCR, fcr);
    bench.write(reg::MCR, MCR_LOOPBACK);
    bench
}

impl Bench {
    fn send(&self, bytes: impl IntoIterator<Item = u8>) {
        for byte in bytes {
            self.write(reg::RBR_THR, byte);
        }
    }
    /// The cause of the interrupt, without the bits that show whether FIFOs are on.
    fn cause(&self) -> u8 {
        self.read(reg::IIR_FCR) & !IIR_FIFOS
    }
}

#[test]
fn without_fifos_the_second_byte_overruns_the_first() {
    let bench = looped(0);
    bench.send([1]);
    assert_eq!(bench.line_status(), DR);
    bench.send([2]);
    assert_eq!(bench.line_status(), DR | OE);
    assert_eq!(bench.line_status(), DR, "reported once");
    assert_eq!(bench.received(), [2], "the newer byte");
}

#[test]
fn with_fifos_the_seventeenth_byte_overruns_and_is_lost() {
    let bench = looped(FCR_ENABLE);
    bench.send(0..16);
    assert_eq!(bench.line_status(), DR);
    bench.send([16]);
    assert_eq!(bench.line_status(), DR | OE);
    bench.send([17]);
    assert_eq!(bench.received(), (0..16).collect::<Vec<u8>>());
}

/// A read of the FIFO makes room for one more byte.
#[test]
fn a_fifo_goes_round() {
    let bench = looped(FCR_ENABLE);
    bench.send(0..16);
    for byte in 16..100 {
        assert_eq!(bench.read(reg::RBR_THR), byte - 16);
        bench.send([byte]);
        assert_eq!(bench.line_status(), DR);
    }
}

/// Linux' size_fifo in drivers/tty/serial/8250 sends 256 bytes and counts those that it can read
/// back.
#[test]
fn linux_measures_sixteen() {
    let bench = bench();
    bench.console.type_input(b"typed meanwhile");
    bench.read(reg::LSR);
    bench.write(reg::IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVER | 0x04);
    bench.write(reg::MCR, MCR_LOOPBACK);
    bench.write(reg::LCR, LCR_DLAB);
    bench.write(reg::RBR_THR, 1);
    bench.write(reg::IER, 0);
    bench.write(reg::LCR, WORD_OF_8);
    bench.send(0..=255);
    assert_eq!(bench.received().len(), 16);
}

#[test]
fn the_trigger_level_tells_available_data_from_a_timeout() {
    for (fcr, level) in [
        (0, 1),
        (FCR_ENABLE, 1),
        (FCR_ENABLE | FCR_TRIGGER_4, 4),
        (FCR_ENABLE | FCR_TRIGGER_8, 8),
        (FCR_ENABLE | FCR_TRIGGER_14, 14),
    ] {
        let looped = looped(fcr);
        let typed = bench();
        typed.write(reg::IIR_FCR, fcr);
        for bench in [&looped, &typed] {
            bench.write(reg::IER, IER_RECEIVED);
            assert_eq!(bench.cause(), IIR_NONE);
        }
        for count in 1..=level {
            looped.send([0]);
            typed.console.type_input(b"x");
            let cause = if count < level {
                IIR_TIMEOUT
            } else {
                IIR_RECEIVED
            };
            assert_eq!(looped.cause(), cause, "byte {count} of {level}, looped");
            assert_eq!(typed.cause(), cause, "byte {count} of {level}, typed");
        }
    }
}

#[test]
fn the_wire_is_high_until_the_fifo_is_empty() {
    let bench = looped(FCR_ENABLE | FCR_TRIGGER_8);
    bench.write(reg::IER, IER_RECEIVED);
    bench.send(0..9);
    assert_eq!(bench.levels(), [true]);
    for left in (1..9).rev() {
        bench.read(reg::RBR_THR);
        let cause = if left < 8 { IIR_TIMEOUT } else { IIR_RECEIVED };
        assert_eq!(bench.cause(), cause, "{left} are left");
    }
    assert!(bench.levels().is_empty());
    bench.read(reg::RBR_THR);
    assert_eq!(bench.levels(), [false]);
    assert_eq!(bench.cause(), IIR_NONE);
}

#[test]
fn a_flush_empties_the_fifo() {
    let bench = looped(FCR_ENABLE | FCR_TRIGGER_4);
    bench.write(reg::IER, IER_RECEIVED);
    bench.send(0..5);
    assert_eq!(bench.levels(), [true]);
    bench.write(reg::IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVER);
    assert_eq!(bench.levels(), [false]);
    assert_eq!(bench.line_status(), 0);
    bench.send(0..16);
    assert_eq!(bench.received().len(), 16);
}

/// Turning FIFOs on or off clears them. Without FIFOs, the other bits of FCR have no effect.
#[test]
fn fifos_that_change_are_emptied() {
    let bench = looped(FCR_ENABLE);
    bench.send(0..3);
    bench.write(reg::IIR_FCR, FCR_ENABLE | FCR_TRIGGER_8);
    assert_eq!(bench.line_status(), DR, "they stay on");
    bench.write(reg::IIR_FCR, 0);
    assert_eq!(bench.line_status(), 0);
    bench.send([7]);
    bench.write(reg::IIR_FCR, FCR_CLEAR_RECEIVER | FCR_TRIGGER_14);
    assert_eq!(bench.line_status(), DR, "they stay off");
    bench.write(reg::IER, IER_RECEIVED);
    assert_eq!(bench.read(reg::IIR_FCR), IIR_RECEIVED);
    bench.write(reg::IIR_FCR, FCR_ENABLE);
    assert_eq!(bench.line_status(), 0);
    assert_eq!(bench.read(reg::IIR_FCR), IIR_FIFOS | IIR_NONE);
}

#[test]
fn an_overrun_is_told_after_a_flush() {
    let bench = looped(0);
    bench.send([1, 2]);
    bench.write(reg::IIR_FCR, FCR_ENABLE);
    assert_eq!(bench.line_status(), OE);
    assert_eq!(bench.line_status(), 0);
}

#[test]
fn interrupts_come_by_their_priority() {
    let bench = looped(FCR_ENABLE);
    bench.write(reg::IER, IER_BITS);
    bench.read(reg::MSR);
    bench.write(reg::MCR, MCR_LOOPBACK | MCR_RTS);
    bench.send(0..17);
    assert_eq!(bench.cause(), IIR_LINE_STATUS);
    assert_eq!(bench.line_status(), DR | OE);
    assert_eq!(bench.cause(), IIR_RECEIVED);
    assert_eq!(bench.received().len(), 16);
    assert_eq!(bench.cause(), IIR_TRANSMITTED);
    assert_eq!(bench.cause(), IIR_MODEM_STATUS);
    assert_eq!(bench.levels(), [true], "the wire was high all the time");
    bench.read(reg::MSR);
    assert_eq!(bench.cause(), IIR_NONE);
    assert_eq!(bench.levels(), [false]);
}

#[test]
fn an_interrupt_that_is_not_enabled_does_not_come() {
    for ier in [0, IER_RECEIVED, IER_TRANSMITTED, IER_MODEM_STATUS] {
        let bench = looped(0);
        bench.read(reg::MSR);
        bench.write(reg::IER, ier);
        bench.write(reg::LCR, LCR_BREAK);
        bench.write(reg::LCR, 0);
        bench.send([1, 2]);
        assert_ne!(bench.cause(), IIR_LINE_STATUS, "IER {ier:#x}");
    }
}

#[test]
fn a_break_in_loopback_is_received() {
    let bench = looped(0);
    bench.write(reg::IER, IER_LINE_STATUS);
    bench.write(reg::LCR, WORD_OF_8 | LCR_BREAK);
    assert_eq!(bench.levels(), [true]);
    assert_eq!(bench.cause(), IIR_LINE_STATUS);
    bench.send([1]);
    assert_eq!(bench.line_status(), DR | BI, "nothing gets through it");
    assert_eq!(bench.levels(), [false]);
    assert_eq!(bench.line_status(), DR, "reported once");
    bench.write(reg::LCR, WORD_OF_8);
    assert_eq!(bench.received(), [0], "one zero, however long it was");
    bench.send([2]);
    assert_eq!(bench.received(), [2]);
}

/// The break bit has an effect on the receiver only in loopback mode.
#[test]
fn a_break_begins_with_the_bit_and_with_loopback() {
    let bench = bench();
    bench.write(reg::LCR, LCR_BREAK);
    bench.read(reg::LSR);
    assert_eq!(bench.line_status(), 0);
    bench.write(reg::MCR, MCR_LOOPBACK);
    assert_eq!(bench.line_status(), DR | BI);
    bench.write(reg::MCR, MCR_LOOPBACK | MCR_RTS);
    bench.write(reg::LCR, LCR_BREAK | WORD_OF_8);
    assert_eq!(bench.line_status(), DR, "it is the same break");
}

#[test]
fn an_error_waits_for_its_byte() {
    let bench = looped(FCR_ENABLE | FCR_TRIGGER_14);
    bench.write(reg::IER, IER_LINE_STATUS);
    bench.send([1]);
    for _ in 0..2 {
        bench.write(reg::LCR, LCR_BREAK);
        bench.write(reg::LCR, 0);
    }
    bench.send([2]);
    assert_eq!(bench.cause(), IIR_NONE);
    assert_eq!(bench.line_status(), DR | ERROR);
    assert_eq!(bench.line_status(), DR | ERROR, "it is still in there");
    assert_eq!(bench.read(reg::RBR_THR), 1);
    assert_eq!(bench.cause(), IIR_LINE_STATUS);
    assert_eq!(bench.line_status(), DR | ERROR | BI);
    assert_eq!(bench.line_status(), DR | ERROR, "the other one");
    assert_eq!(bench.read(reg::RBR_THR), 0);
    assert_eq!(bench.line_status(), DR | ERROR | BI);
    assert_eq!(bench.line_status(), DR);
    assert_eq!(bench.read(reg::RBR_THR), 0);
    assert_eq!(bench.received(), [2]);
}

#[test]
fn a_break_finds_no_room_in_a_full_fifo() {
    let bench = looped(FCR_ENABLE);
    bench.send(0..16);
    bench.write(reg::LCR, LCR_BREAK);
    assert_eq!(bench.line_status(), DR | OE);
    assert_eq!(bench.received(), (0..16).collect::<Vec<u8>>());
}

#[test]
fn the_line_is_not_received_in_loopback() {
    let bench = looped(FCR_ENABLE);
    bench.console.type_input(b"typed");
    bench.uart.sysrq(b"s");
    assert_eq!(bench.line_status(), 0);
    bench.write(reg::IER, IER_RECEIVED | IER_LINE_STATUS);
    assert_eq!(bench.cause(), IIR_NONE);
    assert_eq!(bench.read(reg::RBR_THR), 0);
    bench.send(*b"looped");
    assert_eq!(bench.read(reg::RBR_THR), b'l');
    bench.write(reg::MCR, 0);
    assert_eq!(bench.received(), b"ooped\0styped");
}

/// That the guest saw data in loopback mode does not count as having seen the line's data.
#[test]
fn blind_reads_after_loopback_take_nothing() {
    let bench = looped(FCR_ENABLE);
    bench.console.type_input(b"typed");
    bench.send([1]);
    assert_eq!(bench.received(), [1]);
    bench.send([2]);
    assert_eq!(bench.line_status(), DR);
    bench.write(reg::MCR, 0);
    assert_eq!(bench.read(reg::RBR_THR), 2);
    assert_eq!(bench.read(reg::RBR_THR), 0);
    bench.read(reg::LSR);
    assert_eq!(bench.received(), b"typed");
}

#[test]
fn what_is_typed_never_overruns_and_outlives_a_flush() {
    for fcr in [0, FCR_ENABLE, FCR_ENABLE | FCR_TRIGGER_14] {
        let bench = bench();
        bench.write(reg::IIR_FCR, fcr);
        bench.read(reg::LSR);
        let typed: Vec<u8> = (0..100).collect();
        bench.console.type_input(&typed);
        bench.uart.sysrq(b"s");
        let mut got = Vec::new();
        for flush in [fcr | FCR_CLEAR_RECEIVER, fcr ^ FCR_ENABLE, fcr] {
            assert_eq!(bench.read(reg::LSR) & (DR | OE), DR);
            got.push(bench.read(reg::RBR_THR));
            bench.write(reg::IIR_FCR, flush);
            bench.read(reg::LSR);
        }
        got.extend(bench.received());
        assert_eq!(got[..2], [0, b's']);
        assert_eq!(got[2..], typed);
    }
}

/// The line's bytes only fill the room that looped bytes leave in the FIFO.
#[test]
fn the_line_waits_for_room() {
    let bench = looped(FCR_ENABLE);
    bench.write(reg::IER, IER_RECEIVED | IER_LINE_STATUS);
    bench.send(0..16);
    bench.write(reg::MCR, 0);
    bench.uart.sysrq(b"s");
    assert_eq!(bench.line_status(), DR, "the break is not in the FIFO yet");
    bench.read(reg::RBR_THR);
    assert_eq!(bench.line_status(), DR | ERROR);
}

#[test]
fn sysrq_is_a_break_and_its_key() {
    let bench = bench();
    bench.write(reg::IIR_FCR, FCR_ENABLE);
    bench.write(reg::IER, IER_RECEIVED | IER_LINE_STATUS);
    bench.uart.sysrq(b"su");
    assert_eq!(bench.cause(), IIR_LINE_STATUS);
    assert_eq!(bench.line_status(), DR | ERROR | BI);
    assert_eq!(bench.line_status(), DR | ERROR, "the other break");
    assert_eq!(bench.cause(), IIR_RECEIVED);
    assert_eq!(bench.received(), b"\0s\0u");
    assert_eq!(bench.levels(), [true, false]);
}
