//! A guest's reset rebuilds the machine in the same process, as often as the guest likes. Also, the
//! ways in which a guest can end the machine.
#![cfg(target_arch = "riscv64")]

use crate::common::host::{self, Kind};
use crate::common::{POWERED_OFF, RESET, Rvmm, Vm};

const REBOOTS: u32 = 50;
/// How much rvmm's own memory may grow between the second and the last life, in KiB: only rounding
/// by caches.
const GROWTH_KIB: u64 = 64;

fn lives() -> Rvmm {
    // The guest writes to RAM well above its start.
    Rvmm::guest("lives").args(["--mem", "160M"])
}

/// Sends a line, and waits until the guest has printed it.
fn send_line(vm: &mut Vm, line: &str) {
    vm.send(format!("{line}\n"));
    vm.wait_for(&format!("life: {line}\n"));
}

fn fds(vm: &Vm) -> usize {
    let path = format!("/proc/{}/fd", vm.pid());
    std::fs::read_dir(&path).expect(&path).count()
}

fn threads(vm: &Vm) -> usize {
    let path = format!("/proc/{}/task", vm.pid());
    std::fs::read_dir(&path).expect(&path).count()
}

#[test]
fn fifty_reboots_leave_nothing_behind() {
    let mut vm = lives().reboots().spawn();
    let mut first = None;
    for life in 0..REBOOTS {
        // Cold, warm, and by a store to sifive_test, in turn.
        let how = ["c", "w", "t"][life as usize % 3];
        send_line(&mut vm, &format!("{how}{life}"));
        if life == 2 {
            send_line(&mut vm, "n1");
            first = Some((fds(&vm), vm.rss_kib()));
        }
    }
    send_line(&mut vm, "n2");
    let (fds_then, rss_then) = first.expect("measured");
    let (fds_now, rss_now, threads_now) = (fds(&vm), vm.rss_kib(), threads(&vm));
    send_line(&mut vm, "p");
    vm.finish().assert_status(POWERED_OFF);
    println!(
        "before: {fds_then} fds, RSS {rss_then} KiB; now: {fds_now} fds, RSS {rss_now} KiB, \
         {threads_now} threads"
    );
    assert!(
        fds_now <= fds_then,
        "{fds_then} descriptors then, {fds_now} now"
    );
    assert!(
        rss_now <= rss_then + GROWTH_KIB,
        "{rss_then} KiB then, {rss_now} KiB now"
    );
    assert!(threads_now <= 6, "{threads_now} threads");
}

#[test]
fn a_second_life_finds_nothing_of_the_first() {
    let (dirty, check) = match host::kind() {
        Kind::NoAia => ("l", "K"),
        Kind::Aia | Kind::AiaEmul => ("a", "k"),
    };
    let mut vm = lives().reboots().spawn();
    send_line(&mut vm, dirty);
    send_line(&mut vm, check);
    vm.wait_for("timer: ");
    send_line(&mut vm, "p");
    let end = vm.finish();
    end.assert_status(POWERED_OFF);
    let checks: Vec<&str> = end
        .console
        .lines()
        .filter(|l| !l.starts_with("life: "))
        .collect();
    assert!(checks.len() >= 17, "{checks:#?}");
    let wrong: Vec<&&str> = checks
        .iter()
        .filter(|line| !line.ends_with(": ok"))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Harts that were never started sleep in KVM_RUN while the machine is rebuilt and ended.
#[test]
fn a_reset_with_parked_harts() {
    let mut vm = lives().args(["--cpus", "4"]).reboots().spawn();
    for how in ["c", "w", "t"] {
        send_line(&mut vm, how);
    }
    send_line(&mut vm, "p");
    vm.finish().assert_status(POWERED_OFF);
}

/// The same with the PLIC, on a host with an AIA.
#[test]
fn a_second_life_with_a_plic() {
    let mut vm = lives().args(["--irqchip", "plic"]).reboots().spawn();
    send_line(&mut vm, "l");
    send_line(&mut vm, "K");
    vm.wait_for("timer: ");
    send_line(&mut vm, "p");
    let end = vm.finish();
    end.assert_status(POWERED_OFF);
    let wrong = |line: &&str| !line.starts_with("life: ") && !line.ends_with(": ok");
    assert_eq!(end.console.lines().find(wrong), None);
}

#[test]
fn no_reboot_ends_with_its_own_status() {
    for how in ["c", "w", "t"] {
        let mut vm = lives().spawn();
        send_line(&mut vm, how);
        vm.finish().assert_status(RESET);
    }
}

#[test]
fn a_guest_chooses_its_exit_status() {
    for (how, status) in [("p", 0), ("x", 42), ("y", 119)] {
        let mut vm = lives().reboots().spawn();
        send_line(&mut vm, how);
        vm.finish().assert_status(status);
    }
}

#[test]
fn a_signal_between_lives_ends_it() {
    let mut vm = lives().reboots().spawn();
    for life in 0..5 {
        send_line(&mut vm, &format!("c{life}"));
    }
    vm.terminate();
    vm.finish().assert_status(crate::common::TERMINATED);
}
