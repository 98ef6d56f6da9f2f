//! Linux's harts as processes see them: each tells the time, after it was offline too, and after the system slept. Hosts
//! of Linux 7.x reset a hart's `scounteren` when it starts; with 0 in it each clock of the vDSO ends its process by
//! SIGILL.
#![cfg(target_arch = "riscv64")]

mod common;

use std::fs;

use common::host::{self, Kind};
use common::{HOST_FAILED, Rvmm, Shell, TERMINATED, nonce};

const CPUS: u32 = 4;

fn linux(flags: &[&str]) -> Shell {
    // Lines of the kernel come while the system goes to sleep, too.
    let cmdline = "console=ttyS0 no_console_suspend panic=-1 rvmm.action=sh";
    let cpus = CPUS.to_string();
    let rvmm = Rvmm::virtio(cmdline).args(["--mem", "256M", "--cpus", &cpus]);
    Shell::of(rvmm.args(flags))
}

/// A process on this CPU reads the clock through the vDSO, by `rdtime`. (`date` would not: it asks for less.)
#[track_caller]
fn tells_time(shell: &mut Shell, cpu: u32) {
    let mask = 1 << cpu;
    let times = shell.ok(&format!("taskset {mask:x} time true"));
    assert!(times.contains("real"), "{times}");
}

#[test]
fn every_hart_tells_the_time() {
    let mut shell = linux(&[]);
    for cpu in 0..CPUS {
        tells_time(&mut shell, cpu);
    }
    shell.power_off();
}

#[test]
fn a_hart_that_was_offline_tells_the_time() {
    let mut shell = linux(&[]);
    for _ in 0..3 {
        for cpu in 1..CPUS {
            let online = format!("/sys/devices/system/cpu/cpu{cpu}/online");
            // The host looks for stopped harts 20 times a second.
            shell.ok(&format!("echo 0 >{online} && sleep 1 && echo 1 >{online}"));
            tells_time(&mut shell, cpu);
        }
    }
    shell.power_off();
}

/// However short it was offline, a hart's clocks work again soon.
#[test]
fn a_hart_that_was_offline_for_a_moment() {
    let mut shell = linux(&[]);
    for cpu in 1..CPUS {
        let online = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        let mask = 1 << cpu;
        // A clock may end its process for as long as the host has not looked.
        shell.ok(&format!(
            "sleep 1; echo 0 >{online}; echo 1 >{online}; until taskset {mask:x} time true; do :; done"
        ));
        tells_time(&mut shell, cpu);
    }
    shell.power_off();
}

/// Ticks of 10 ms that the process has used.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("its statistics");
    let (_, fields) = stat.rsplit_once(") ").expect("the name's end");
    let field = |index| -> u64 { fields.split(' ').nth(index).unwrap().parse().unwrap() };
    // utime and stime: fields 14 and 15 of proc_pid_stat(5).
    field(11) + field(12)
}

/// Linux suspends, uses next to no time of the host's, and wakes by a typed line.
fn sleeps(flags: &[&str]) {
    let mut shell = linux(flags);
    // Without it Linux only waits in each hart's idle loop (s2idle).
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
        shell.vm.wait_for(&format!("CPU{}: off", CPUS - 1));
        let before = ticks(shell.vm.pid());
        std::thread::sleep(ASLEEP);
        let used = ticks(shell.vm.pid()) - before;
        assert!(!shell.vm.console().contains("woke"), "nothing woke it");
        // One hart that ran would have used a hundred a second.
        assert!(used < 30 * ASLEEP.as_secs(), "{used} ticks");
        shell.vm.send("echo typed\n");
        shell.vm.wait_for(&format!("woke {word}\r"));
        shell.answered(2);
        for cpu in 0..CPUS {
            tells_time(&mut shell, cpu);
        }
    }
    shell.power_off();
}

/// Long enough to see what a sleeping guest costs.
const ASLEEP: std::time::Duration = std::time::Duration::from_secs(5);

#[test]
fn the_system_sleeps() {
    sleeps(&[]);
}

#[test]
fn the_system_sleeps_with_a_plic() {
    sleeps(&["--irqchip", "plic"]);
}

/// The file of an emulated IMSIC is as lost in a reset as one of hardware.
#[test]
fn the_system_sleeps_with_an_emulated_aia() {
    if host::kind() == Kind::NoAia {
        let end = Rvmm::virtio("").args(["--irqchip", "aia-emul"]).run();
        end.assert_refused(HOST_FAILED, &["AIA", "--irqchip plic"]);
    } else {
        sleeps(&["--irqchip", "aia-emul"]);
    }
}

/// A guest that sleeps ends as one that runs.
#[test]
fn sigterm_to_a_system_that_sleeps() {
    let mut shell = linux(&[]);
    if host::has_suspend() {
        shell.vm.send("echo mem >/sys/power/state\n");
        shell.vm.wait_for(&format!("CPU{}: off", CPUS - 1));
    }
    shell.vm.terminate();
    shell.vm.finish().assert_status(TERMINATED);
}
