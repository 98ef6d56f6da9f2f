//! Machines that are frozen to a snapshot, and go on in another process.
#![cfg(target_arch = "riscv64")]

use crate::common::Rvmm;
use crate::common::freezing::*;

#[test]
fn a_guest_goes_on_in_another_process() {
    let freezer = Freezer::new();
    let vm = Rvmm::guest("echo").args(freezer.ctl("ctl")).spawn();
    vm.wait_for("ready");
    let said = freezer.freeze("ctl", "snap", &[]);
    assert!(
        said.contains("of memory written; the guest was frozen for "),
        "{said}"
    );
    kill(vm);
    for round in 0..2 {
        let mut vm = freezer.thaw("snap").spawn();
        vm.send(format!("hello{round}\n"));
        vm.wait_for(&format!("got hello{round}"));
        assert!(!vm.console().starts_with("ready"), "it did not start again");
    }
}

/// A paused guest, and one that has not run its first instruction.
#[test]
fn a_paused_guest_can_be_frozen() {
    let freezer = Freezer::new();
    let vm = Rvmm::guest("echo")
        .args(freezer.ctl("ctl"))
        .arg("--pause")
        .spawn();
    vm.wait_for_log("the guest is paused");
    freezer.freeze("ctl", "first", &[]);
    kill(vm);
    let vm = freezer
        .thaw("first")
        .args(freezer.ctl("ctl"))
        .arg("--pause")
        .spawn();
    vm.wait_for_log("the guest is paused");
    freezer.freeze("ctl", "second", &[]);
    assert_eq!(vm.console(), "");
    kill(vm);
    let mut vm = freezer.thaw("second").spawn();
    vm.wait_for("ready");
    vm.send("on\n");
    vm.wait_for("got on");
}

#[test]
fn linux_goes_on_over_pci() {
    linux_goes_on("pci");
}
