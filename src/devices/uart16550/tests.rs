mod fifo;
mod model;
mod modem;
mod saved;

use super::modem::{MCR_LOOPBACK, MSR_CONNECTED};
use super::*;
use crate::bus::{Device, IrqSink};
use crate::devices::console::OUTPUT_CAPACITY;
use crate::snapshot::Parts;

/// Records all levels of the interrupt line.
#[derive(Default)]
struct Wire(Mutex<Vec<bool>>);

impl IrqSink for Wire {
    fn set_level(&self, source: u32, high: bool) {
        assert_eq!(source, 10);
        lock(&self.0).push(high);
    }
    fn fdt_interrupt(&self, source: u32) -> Vec<u32> {
        vec![7, source, 4]
    }
}

struct Bench {
    uart: Arc<Uart>,
    console: Arc<Console>,
    wire: Arc<Wire>,
}

fn bench() -> Bench {
    let (console, wire) = (Arc::new(Console::default()), Arc::new(Wire::default()));
    let line = IrqLine::new(wire.clone(), 10);
    let uart = Uart::new(0x1000_0000, line, console.clone());
    Bench {
        uart,
        console,
        wire,
    }
}

impl Bench {
    fn read(&self, offset: u64) -> u8 {
        let mut data = [0];
        self.uart.read(offset, &mut data);
        data[0]
    }
    fn write(&self, offset: u64, value: u8) {
        self.uart.write(offset, &[value]);
    }
    /// LSR without the transmitter's bits. The transmitter must be idle, as always in loopback
    /// mode.
    fn line_status(&self) -> u8 {
        let lsr = self.read(reg::LSR);
        assert_eq!(lsr & LSR_TRANSMITTER_EMPTY, LSR_TRANSMITTER_EMPTY);
        lsr & !LSR_TRANSMITTER_EMPTY
    }
    /// Reads RBR as long as LSR shows that there is data.
    fn received(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.read(reg::LSR) & LSR_DATA_READY != 0 {
            bytes.push(self.read(reg::RBR_THR));
        }
        bytes
    }
    fn levels(&self) -> Vec<bool> {
        std::mem::take(&mut *lock(&self.wire.0))
    }
    /// Another UART that goes on where this one was, in a machine that was restored.
    fn moved(&self) -> Bench {
        self.uart.pause();
        let other = bench();
        other.uart.pause();
        other.console.load(self.console.save()).unwrap();
        let mut parts = Parts::new(self.uart.save().unwrap());
        other.uart.load(&mut parts).unwrap();
        parts.finish().unwrap();
        other.uart.resume();
        other
    }
    fn sent(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.console.close();
        self.console.take_output(&mut bytes);
        bytes
    }
}

#[test]
fn bytes_go_out() {
    let bench = bench();
    for byte in b"hello" {
        assert_eq!(bench.read(reg::LSR), LSR_TRANSMITTER_EMPTY);
        bench.write(reg::RBR_THR, *byte);
    }
    assert_eq!(bench.sent(), b"hello");
    assert!(bench.levels().is_empty());
}

#[test]
fn bytes_come_in_by_polling() {
    let bench = bench();
    assert_eq!(bench.read(reg::LSR) & LSR_DATA_READY, 0);
    bench.console.type_input(b"ok");
    for byte in b"ok" {
        assert_eq!(bench.read(reg::LSR) & LSR_DATA_READY, LSR_DATA_READY);
        assert_eq!(bench.read(reg::RBR_THR), *byte);
    }
    assert_eq!(bench.read(reg::LSR) & LSR_DATA_READY, 0);
}

#[test]
fn the_receive_interrupt_is_a_level() {
    let bench = bench();
    bench.write(reg::IER, IER_RECEIVED);
    assert!(bench.levels().is_empty());
    bench.console.type_input(b"ab");
    assert_eq!(bench.levels(), [true]);
    assert_eq!(bench.read(reg::IIR_FCR), IIR_RECEIVED);
    assert_eq!(bench.read(reg::RBR_THR), b'a');
    assert!(bench.levels().is_empty(), "one byte is still there");
    assert_eq!(bench.read(reg::RBR_THR), b'b');
    assert_eq!(bench.levels(), [false]);
    assert_eq!(bench.read(reg::IIR_FCR), IIR_NONE);
}

#[test]
fn the_transmit_interrupt_is_acknowledged_by_iir() {
    let bench = bench();
    bench.write(reg::IER, IER_TRANSMITTED);
    assert_eq!(bench.levels(), [true]);
    assert_eq!(bench.read(reg::IIR_FCR), IIR_TRANSMITTED);
    assert_eq!(bench.levels(), [false]);
    bench.write(reg::RBR_THR, b'x');
    assert_eq!(bench.levels(), [true]);
    bench.write(reg::IER, 0);
    assert_eq!(bench.levels(), [false]);
}

#[test]
fn received_data_comes_before_an_empty_transmitter() {
    let bench = bench();
    bench.write(reg::IER, IER_RECEIVED | IER_TRANSMITTED);
    bench.console.type_input(b"a");
    assert_eq!(bench.read(reg::IIR_FCR), IIR_RECEIVED);
    bench.read(reg::RBR_THR);
    assert_eq!(bench.read(reg::IIR_FCR), IIR_TRANSMITTED);
    assert_eq!(bench.read(reg::IIR_FCR), IIR_NONE);
}

#[test]
fn a_full_console_is_a_busy_transmitter() {
    let bench = bench();
    bench.console.write(&vec![0; OUTPUT_CAPACITY]);
    assert_eq!(bench.read(reg::LSR), 0);
    bench.write(reg::IER, IER_TRANSMITTED);
    assert!(bench.levels().is_empty());
    // The writer takes the bytes, writes them, and returns for more.
    let mut bytes = Vec::new();
    bench.console.take_output(&mut bytes);
    bench.console.close();
    bench.console.take_output(&mut bytes);
    assert_eq!(bench.levels(), [true]);
    assert_eq!(bench.read(reg::LSR), LSR_TRANSMITTER_EMPTY);
}

#[test]
fn a_burst_that_was_admitted_is_whole() {
    let bench = bench();
    for spare in [1, 5, 15, 16, 17] {
        let room = bench.console.output_room();
        bench.console.write(&vec![0; room - spare]);
        if bench.read(reg::LSR) & LSR_TRANSMITTER_EMPTY != 0 {
            assert!(bench.console.output_room() >= BURST);
        } else {
            // The transmitter is busy. Once there is room, it interrupts.
            bench.write(reg::IER, IER_TRANSMITTED);
            assert!(bench.levels().is_empty());
        }
        let mut bytes = Vec::new();
        bench.console.take_output(&mut bytes);
        bench.console.write(b"x");
        bench.console.take_output(&mut bytes);
        bench.console.write(b"y");
        bench.console.take_output(&mut bytes);
        assert_eq!(
            bench.levels().is_empty(),
            spare >= BURST,
            "{spare} to spare"
        );
        bench.write(reg::IER, 0);
        bench.levels();
    }
}

#[test]
fn resetting_the_receiver_loses_nothing_that_was_typed() {
    let bench = bench();
    bench.console.type_input(b"typed early");
    // An early console polls LSR before it transmits.
    bench.read(reg::LSR);
    // As Linux' serial8250_do_startup: clear the FIFOs, read all registers once, test the
    // transmitter's interrupt with OUT2 on, and read all registers again. RTS and IER are set
    // later.
    let clear = |bench: &Bench| {
        bench.write(reg::IIR_FCR, FCR_ENABLE);
        bench.write(reg::IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVER | 0x04);
        bench.write(reg::IIR_FCR, 0);
    };
    let read_everything = |bench: &Bench| {
        for register in [reg::LSR, reg::RBR_THR, reg::IIR_FCR, reg::MSR] {
            bench.read(register);
        }
    };
    clear(&bench);
    read_everything(&bench);
    bench.read(reg::LSR);
    bench.write(reg::MCR, MCR_OUT2);
    bench.write(reg::IER, IER_TRANSMITTED);
    bench.read(reg::LSR);
    bench.read(reg::IIR_FCR);
    bench.write(reg::IER, 0);
    read_everything(&bench);
    // The port is closed and opened again meanwhile: serial8250_do_shutdown reads the buffer once
    // more.
    bench.write(reg::MCR, 0);
    clear(&bench);
    bench.read(reg::RBR_THR);
    bench.write(reg::MCR, MCR_OUT2 | MCR_RTS | 1);
    bench.write(reg::IER, IER_RECEIVED);
    assert_eq!(bench.received(), b"typed early");
}

#[test]
fn loopback_sends_to_itself() {
    let bench = bench();
    bench.write(reg::MCR, MCR_LOOPBACK | 0x0a);
    assert_eq!(bench.read(reg::MSR) & 0xf0, 0x90, "RTS to CTS, OUT2 to DCD");
    bench.write(reg::RBR_THR, 0x5a);
    assert_eq!(bench.read(reg::LSR) & LSR_DATA_READY, LSR_DATA_READY);
    assert_eq!(bench.read(reg::RBR_THR), 0x5a);
    assert_eq!(bench.read(reg::LSR) & LSR_DATA_READY, 0);
    bench.write(reg::MCR, 0);
    assert_eq!(bench.read(reg::MSR) & 0xf0, MSR_CONNECTED);
    assert_eq!(bench.sent(), b"");
}

#[test]
fn registers_keep_what_was_written() {
    let bench = bench();
    bench.write(reg::SCR, 0xa5);
    bench.write(reg::LCR, LCR_DLAB | 3);
    bench.write(reg::RBR_THR, 0x12);
    bench.write(reg::IER, 0x34);
    assert_eq!(
        [bench.read(reg::RBR_THR), bench.read(reg::IER)],
        [0x12, 0x34]
    );
    bench.write(reg::LCR, 3);
    assert_eq!(bench.read(reg::IER), 0);
    assert_eq!(bench.read(reg::SCR), 0xa5);
    bench.write(reg::IIR_FCR, FCR_ENABLE);
    assert_eq!(bench.read(reg::IIR_FCR), IIR_FIFOS | IIR_NONE);
    assert_eq!(bench.sent(), b"");
}

#[test]
fn hostile_accesses_do_nothing() {
    let bench = bench();
    for offset in 0..SIZE {
        for len in [0, 1, 2, 4, 8] {
            let mut data = vec![0; len];
            bench.uart.read(offset, &mut data);
            if offset != reg::RBR_THR {
                bench.uart.write(offset, &vec![0xff; len]);
            }
        }
    }
    bench.uart.read(u64::MAX, &mut [0; 8]);
    bench.uart.write(u64::MAX, &[0; 8]);
}

/// Reads as Linux' driver does: LSR, then the buffer, as long as LSR shows that there is more.
#[test]
fn sysrq_comes_before_what_was_typed() {
    let bench = bench();
    assert!(bench.console.type_input(b"x"));
    bench.write(reg::IER, IER_RECEIVED);
    bench.levels();
    bench.uart.sysrq(b"su");
    let read = |offset| bench.read(offset);
    let mut got = Vec::new();
    loop {
        let lsr = read(reg::LSR);
        if lsr & LSR_DATA_READY == 0 {
            break;
        }
        got.push((lsr & LSR_BREAK != 0, read(reg::RBR_THR)));
    }
    let wanted = [
        (true, 0),
        (false, b's'),
        (true, 0),
        (false, b'u'),
        (false, b'x'),
    ];
    assert_eq!(got, wanted);
}
