//! The guest's console on rvmm's own standard streams: input, readers that lag or leave, and
//! signals.
#![cfg(target_arch = "riscv64")]

use crate::common::{POWERED_OFF, Rvmm, TERMINATED, nonce};

/// If so many bytes are in the console's pipe, nobody reads it. (The pipe holds 64 KiB, the flood
/// is 1 MiB.)
const STALLED: u64 = 32 << 10;

/// The output of the guest `flood`.
fn flood() -> String {
    let mut text = String::new();
    for number in 0..16384 {
        text.push_str(&format!("flood {number:08} {}\n", ".".repeat(48)));
    }
    text.push_str("flood: done\n");
    text
}

#[test]
fn input_by_dbcn_and_uart() {
    let mut vm = Rvmm::guest("echo").spawn();
    let (first, second) = (nonce(), nonce());
    vm.wait_for("ready\n");
    vm.send(format!("{first}\n"));
    vm.wait_for("uart ready\n");
    vm.send(format!("{second}\n"));
    let lines = [
        "ready",
        &format!("got {first}"),
        "uart ready",
        &format!("uart got {second}"),
    ];
    vm.finish().assert_console(POWERED_OFF, &lines);
}

/// Input that arrives before the guest asks for it, and then ends, reaches the guest completely.
#[test]
fn input_ahead_of_the_guest() {
    let mut vm = Rvmm::guest("echo").spawn();
    vm.send("first\nsecond\n");
    vm.close_stdin();
    vm.finish().assert_console(
        POWERED_OFF,
        &["ready", "got first", "uart ready", "uart got second"],
    );
}

#[test]
fn input_at_its_end() {
    let end = Rvmm::guest("console").stdin_null().run();
    assert!(end.console.ends_with("console: done\n"));
    end.assert_status(POWERED_OFF);
}

#[test]
fn input_closed() {
    let end = Rvmm::guest("console").stdin_closed().run();
    assert!(end.console.ends_with("console: done\n"));
    end.assert_status(POWERED_OFF);
}

#[test]
fn a_flood_is_complete() {
    let end = Rvmm::guest("flood").run();
    // Not assert_eq: a failure would print the flood twice more.
    assert!(
        end.console == flood(),
        "part of the flood is lost or changed"
    );
    end.assert_status(POWERED_OFF);
}

/// The guest writes more than rvmm can hold. DBCN reports short writes, and nothing is lost once
/// somebody reads.
#[test]
fn a_flood_that_stalls_is_complete() {
    let mut vm = Rvmm::guest("flood").console_unread().spawn();
    vm.wait_for_unread(STALLED);
    vm.read_console();
    let end = vm.finish();
    assert!(
        end.console == flood(),
        "part of the flood is lost or changed"
    );
    end.assert_status(POWERED_OFF);
}

/// The same with an output that another program made non-blocking.
#[test]
fn a_flood_on_a_non_blocking_output_is_complete() {
    let vm = Rvmm::guest("flood").stdout_nonblocking().console_unread();
    let mut vm = vm.spawn();
    vm.wait_for_unread(1);
    vm.read_console();
    let end = vm.finish();
    assert!(
        end.console == flood(),
        "something of the flood is lost or changed: {} bytes came",
        end.console.len()
    );
    end.assert_status(POWERED_OFF);
}

/// A reader that goes away (`rvmm ... | head`) ends neither rvmm nor the guest.
#[test]
fn a_reader_that_leaves() {
    let mut vm = Rvmm::guest("flood").console_unread().spawn();
    vm.wait_for_unread(STALLED);
    vm.close_console();
    vm.finish().assert_status(POWERED_OFF);
}

#[test]
fn sigterm_to_a_guest_that_spins() {
    let vm = Rvmm::guest("spin").spawn();
    vm.wait_for("spinning\n");
    vm.terminate();
    vm.finish().assert_console(TERMINATED, &["spinning"]);
}

#[test]
fn sigterm_to_a_guest_that_sleeps() {
    let vm = Rvmm::guest("idle").spawn();
    vm.wait_for("idle\n");
    vm.terminate();
    vm.finish().assert_console(TERMINATED, &["idle"]);
}

/// Output that nobody reads does not keep rvmm from ending.
#[test]
fn sigterm_while_nobody_reads() {
    let mut vm = Rvmm::guest("flood").console_unread().spawn();
    vm.wait_for_unread(STALLED);
    vm.terminate();
    vm.finish().assert_status(TERMINATED);
}
