//! Tests of the saved state.

use super::*;
use crate::snapshot::{Saved, testing};

/// A paused UART in which nearly every register differs from its value after a reset.
fn set_up() -> Bench {
    let bench = bench();
    bench.write(reg::LCR, LCR_DLAB);
    bench.write(reg::RBR_THR, 0x12);
    bench.write(reg::IER, 0x34);
    bench.write(reg::LCR, 0x1b);
    bench.write(reg::SCR, 0xa5);
    bench.write(reg::IIR_FCR, 0x80 | FCR_ENABLE);
    bench.write(reg::MCR, MCR_OUT2 | MCR_LOOPBACK);
    for byte in 0..18 {
        bench.write(reg::RBR_THR, byte);
    }
    bench.write(reg::LCR, LCR_BREAK);
    bench.write(reg::RBR_THR, 1);
    bench.write(reg::IER, IER_RECEIVED | IER_LINE_STATUS);
    bench.uart.sysrq(b"su");
    bench.uart.pause();
    bench
}

#[test]
fn all_of_the_chip_survives() {
    let bench = || -> Arc<Uart> { set_up().uart };
    testing::survives(bench, &["/divisor"]);
}

fn refused(change: impl Fn(&mut serde_json::Value)) -> String {
    let mut saved = set_up().uart.save().unwrap().remove(0);
    let mut state = serde_json::from_slice(&saved.json).unwrap();
    change(&mut state);
    saved.json = serde_json::to_vec(&state).unwrap();
    let error = bench().uart.load(&mut Parts::new(vec![saved])).unwrap_err();
    error.to_string()
}

#[test]
fn what_no_chip_has_is_refused() {
    let byte = serde_json::json!({ "byte": 0, "is_break": false });
    let bytes = |count| vec![byte.clone(); count].into();
    assert_eq!(
        refused(|state| state["ier"] = 0x1f.into()),
        "a 16550A can never have the value 0x1f in IER"
    );
    assert_eq!(
        refused(|state| state["mcr"] = 0x20.into()),
        "a 16550A can never have the value 0x20 in MCR with the changes 0x3 in MSR"
    );
    assert_eq!(
        refused(|state| state["msr_changes"] = 0x10.into()),
        "a 16550A can never have the value 0x18 in MCR with the changes 0x10 in MSR"
    );
    assert_eq!(
        refused(|state| state["fifo"] = bytes(17)),
        "a 16550A can never have the value 0x81 in FCR with 17 bytes in its FIFO"
    );
    assert_eq!(
        refused(|state| state["fcr"] = 0x80.into()),
        "a 16550A can never have the value 0x80 in FCR with 16 bytes in its FIFO"
    );
    assert_eq!(
        refused(|state| state["urgent"] = bytes(17)),
        "17 bytes to send first, and 16 are the limit"
    );
}

/// Input that arrived while the machine was paused raises the interrupt after the restore.
#[test]
fn the_wire_has_its_level_again() {
    let before = bench();
    before.write(reg::IER, IER_RECEIVED);
    before.uart.pause();
    before.console.type_input(b"a");
    assert!(before.levels().is_empty());
    let after = before.moved();
    assert_eq!(after.levels(), [false, true]);
    let later = after.moved();
    assert_eq!(later.levels(), [true]);
    assert_eq!(later.received(), b"a");
    assert_eq!(later.levels(), [false]);
}

#[test]
fn a_reset_chip_is_saved_as_such() {
    let saved = bench().uart.save().unwrap();
    let Saved { kind, version, .. } = &saved[0];
    assert_eq!((kind.as_str(), *version, saved.len()), ("uart16550", 1, 1));
    let state: serde_json::Value = serde_json::from_slice(&saved[0].json).unwrap();
    let reset = serde_json::json!({
        "ier": 0,
        "fcr": 0,
        "lcr": 0,
        "mcr": 0,
        "msr_changes": 0,
        "scr": 0,
        "divisor": [0, 0],
        "overrun": false,
        "transmitted": false,
        "listening": false,
        "shown": false,
        "fifo": [],
        "urgent": [],
        "interrupt": false,
    });
    assert_eq!(state, reset);
}
