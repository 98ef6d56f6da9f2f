//! Processes read the clock on each of Linux's harts: after the start, after the hart was offline,
//! and after the system slept. Hosts with Linux 7.x reset a hart's `scounteren` when it starts. If
//! it stays 0, each clock of the vDSO kills its process with SIGILL.
#![cfg(target_arch = "riscv64")]

use std::fs;

use crate::common::host::{self, Kind};
use crate::common::{Rvmm, Shell, TERMINATED, nonce};

/// Hosts without the SBI's suspend reset no hart's register. On them two harts are enough.
fn cpus() -> u32 {
    if host::has_suspend() { 4 } else { 2 }
}

fn linux(flags: &[&str]) -> Shell {
    // The kernel prints lines while the system goes to sleep, too.
    let cmdline = "console=ttyS0 no_console_suspend panic=-1 rvmm.action=sh";
    let cpus = cpus().to_string();
    let rvmm = Rvmm::virtio(cmdline).args(["--mem", "256M", "--cpus", &cpus]);
    Shell::of(rvmm.args(flags))
}

/// A process on this CPU reads the clock through the vDSO, with `rdtime`. (`date` would not: it
/// asks for a coarser clock.)
#[track_caller]
fn reads_clock(shell: &mut Shell, cpu: u32) {
    let mask = 1 << cpu;
    let times = shell.ok(&format!("taskset {mask:x} time true"));
    assert!(times.contains("real"), "{times}");
}

/// After the start, after a second offline, and after a moment offline.
#[test]
fn every_hart_tells_the_time() {
    let mut shell = linux(&[]);
    for cpu in 0..cpus() {
        reads_clock(&mut shell, cpu);
    }
    for cpu in 1..cpus() {
        let online = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        // rvmm looks for stopped harts 20 times a second.
        shell.ok(&format!("echo 0 >{online}; sleep 1; echo 1 >{online}"));
        reads_clock(&mut shell, cpu);
    }
    for cpu in 1..cpus() {
        let online = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        let mask = 1 << cpu;
        // Until rvmm has looked, a clock may kill its process here.
        shell.ok(&format!(
            "for _ in 1 2 3; do echo 0 >{online}; echo 1 >{online}; done; \
             until taskset {mask:x} time true; do :; done"
        ));
        reads_clock(&mut shell, cpu);
    }
    shell.power_off();
}

/// Ticks of 10 ms of CPU time that the process has used.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("its statistics");
    let (_, fields) = stat.rsplit_once(") ").expect("the name's end");
    let field = |index| -> u64 { fields.split(' ').nth(index).unwrap().parse().unwrap() };
    // utime and stime: fields 14 and 15 of proc_pid_stat(5).
    field(11) + field(12)
}

/// Linux suspends, uses almost no CPU time of the host, and wakes up when a line is typed.
fn sleeps(flags: &[&str]) {
    let mut shell = linux(flags);
    // Without it, Linux only waits in each hart's idle loop (s2idle).
    let states = shell.ok("cat /sys/power/mem_sleep");
    let suspends = host::has_suspend();
    assert_eq!(states.contains("deep"), suspends, "{states}");
    if suspends {
        let word = nonce();
        shell.ok("echo enabled >/sys/class/tty/ttyS0/power/wakeup");
        shell
            .vm
            .send(format!("echo mem >/sys/power/state && echo woke {word}\n"));
        shell.vm.wait_for("Disabling non-boot CPUs");
        shell.vm.wait_for(&format!("CPU{}: off", cpus() - 1));
        let before = ticks(shell.vm.pid());
        std::thread::sleep(ASLEEP);
        let used = ticks(shell.vm.pid()) - before;
        assert!(!shell.vm.console().contains("woke"), "nothing woke it");
        // One running hart would have used a hundred ticks a second.
        assert!(used < 30 * ASLEEP.as_secs(), "{used} ticks");
        shell.vm.send("echo typed\n");
        shell.vm.wait_for(&format!("woke {word}\r"));
        shell.answered(2);
        for cpu in 0..cpus() {
            reads_clock(&mut shell, cpu);
        }
    }
    shell.power_off();
}

/// Long enough to see how much CPU time a sleeping guest uses.
const ASLEEP: std::time::Duration = std::time::Duration::from_secs(5);

/// With each interrupt controller. Without the SBI's suspend they make no difference.
#[test]
fn the_system_sleeps() {
    sleeps(&[]);
    if host::has_suspend() {
        sleeps(&["--irqchip", "plic"]);
        if host::kind() != Kind::NoAia {
            sleeps(&["--irqchip", "aia-emul"]);
        }
        sigterm_to_a_system_that_sleeps();
    }
}

/// A sleeping machine ends like a running one.
fn sigterm_to_a_system_that_sleeps() {
    let mut shell = linux(&[]);
    shell.vm.send("echo mem >/sys/power/state\n");
    shell.vm.wait_for(&format!("CPU{}: off", cpus() - 1));
    shell.vm.terminate();
    shell.vm.finish().assert_status(TERMINATED);
}
