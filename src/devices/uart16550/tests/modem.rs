//! Tests of the modem control lines, and of the changes that MSR reports.

use super::super::modem::*;
use super::*;

const DCTS: u8 = 0x01;
const DDSR: u8 = 0x02;
const TERI: u8 = 0x04;
const DDCD: u8 = 0x08;

#[test]
fn outputs_come_back_as_inputs() {
    let bench = bench();
    for outputs in 0..16 {
        bench.write(reg::MCR, MCR_LOOPBACK | outputs);
        assert_eq!(bench.read(reg::MCR), MCR_LOOPBACK | outputs);
        let mut inputs = 0;
        for (output, input) in [
            (MCR_DTR, MSR_DSR),
            (MCR_RTS, MSR_CTS),
            (MCR_OUT1, MSR_RI),
            (MCR_OUT2, MSR_DCD),
        ] {
            if outputs & output != 0 {
                inputs |= input;
            }
        }
        assert_eq!(bench.read(reg::MSR) & 0xf0, inputs, "MCR {outputs:#x}");
    }
}

#[test]
fn each_change_is_told_once() {
    let bench = bench();
    assert_eq!(bench.read(reg::MSR), MSR_CONNECTED, "nothing has changed");
    bench.write(reg::MCR, MCR_LOOPBACK);
    assert_eq!(bench.read(reg::MSR), DCTS | DDSR | DDCD);
    assert_eq!(bench.read(reg::MSR), 0);
    for (output, input, on, off) in [
        (MCR_DTR, MSR_DSR, DDSR, DDSR),
        (MCR_RTS, MSR_CTS, DCTS, DCTS),
        (MCR_OUT1, MSR_RI, 0, TERI),
        (MCR_OUT2, MSR_DCD, DDCD, DDCD),
    ] {
        bench.write(reg::MCR, MCR_LOOPBACK | output);
        assert_eq!(bench.read(reg::MSR), input | on);
        assert_eq!(bench.read(reg::MSR), input);
        bench.write(reg::MCR, MCR_LOOPBACK);
        assert_eq!(bench.read(reg::MSR), off);
        bench.write(reg::MCR, MCR_LOOPBACK | output);
        bench.write(reg::MCR, MCR_LOOPBACK);
        assert_eq!(bench.read(reg::MSR), on | off, "there and back");
    }
    bench.write(reg::MCR, 0);
    assert_eq!(bench.read(reg::MSR), MSR_CONNECTED | DCTS | DDSR | DDCD);
}

/// Without loopback, the chip's outputs have no effect on its inputs.
#[test]
fn outputs_alone_change_nothing() {
    let bench = bench();
    bench.write(reg::IER, IER_MODEM_STATUS);
    for outputs in 0..16 {
        bench.write(reg::MCR, outputs);
        assert_eq!(bench.read(reg::MSR), MSR_CONNECTED);
    }
    assert!(bench.levels().is_empty());
}

#[test]
fn a_change_interrupts_until_msr_is_read() {
    let bench = bench();
    bench.write(reg::MCR, MCR_LOOPBACK);
    bench.read(reg::MSR);
    bench.write(reg::IER, IER_MODEM_STATUS);
    assert!(bench.levels().is_empty());
    bench.write(reg::MCR, MCR_LOOPBACK | MCR_OUT2);
    assert_eq!(bench.levels(), [true]);
    assert_eq!(bench.read(reg::IIR_FCR), IIR_MODEM_STATUS);
    assert_eq!(bench.read(reg::IIR_FCR), IIR_MODEM_STATUS);
    assert_eq!(bench.read(reg::MSR), MSR_DCD | DDCD);
    assert_eq!(bench.levels(), [false]);
    assert_eq!(bench.read(reg::IIR_FCR), IIR_NONE);
}
