//! Configuration files, time-outs, signals, and consoles of a machine.
#![cfg(target_arch = "riscv64")]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use crate::common::{HOST_FAILED, POWERED_OFF, Rvmm, TERMINATED, TIMED_OUT, USAGE, files};

/// Exit status: ended by SIGINT (128 + 2).
const INTERRUPTED: i32 = 130;

fn temporary(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("rvmm-machine-{}-{name}", std::process::id()))
}

#[test]
fn a_timeout_ends_a_guest_that_spins() {
    let end = Rvmm::guest("spin").args(["--timeout", "2s"]).run();
    end.assert_console(TIMED_OUT, &["spinning"]);
}

#[test]
fn a_guest_that_ends_in_time_ends_as_ever() {
    let end = Rvmm::guest("shutdown").args(["--timeout", "5m"]).run();
    end.assert_status(POWERED_OFF);
}

#[test]
fn sigint_ends_a_guest_that_spins() {
    let vm = Rvmm::guest("spin").spawn();
    vm.wait_for("spinning\n");
    vm.signal("INT");
    vm.finish().assert_console(INTERRUPTED, &["spinning"]);
}

/// Signals that no program is known to send to rvmm, and that end a process at once by default.
#[test]
fn other_signals_end_a_guest_that_spins_in_order() {
    for (name, number) in [("USR1", 10), ("ALRM", 14), ("XCPU", 24)] {
        let vm = Rvmm::guest("spin").spawn();
        vm.wait_for("spinning\n");
        vm.signal(name);
        vm.finish().assert_console(128 + number, &["spinning"]);
    }
}

/// The statistics go to a full pipe that its reader does not read. rvmm waits for the reader until
/// a signal comes.
#[test]
fn a_signal_after_the_machine_has_ended_ends_rvmm() {
    let path = temporary("fifo");
    let made = Command::new("mkfifo").arg(&path).status().expect("mkfifo");
    assert!(made.success());
    let mut options = File::options();
    let options = options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK);
    let mut reader = options.open(&path).expect("open it");
    while reader.write(&[b'x'; 4096]).is_ok() {}
    let stats = format!("--stats={}", path.display());
    let mut vm = Rvmm::guest("shutdown").arg(stats).spawn();
    vm.wait_for_log("powered off");
    // The first signal may still ask a machine for its end.
    while !vm.has_ended() {
        vm.terminate();
        sleep(Duration::from_millis(10));
    }
    let end = vm.finish();
    fs::remove_file(&path).expect("remove it");
    let (code, signal) = (end.status.code(), end.status.signal());
    let is_killed = code == Some(TERMINATED) || signal == Some(libc::SIGTERM);
    assert!(is_killed, "exit status: {}", end.status);
}

/// The threads that start before the main loop waits for signals, and the others.
#[test]
fn no_other_thread_takes_a_signal() {
    let path = temporary("trace");
    let trace = format!("--trace={}", path.display());
    let vm = Rvmm::guest("spin")
        .args(["--timeout", "1000s", "--cpus", "2"])
        .arg(trace)
        .spawn();
    vm.wait_for("spinning\n");
    let tasks = fs::read_dir(format!("/proc/{}/task", vm.pid())).expect("its threads");
    let mut count = 0;
    for task in tasks {
        let status = task.expect("a thread").path().join("status");
        let status = fs::read_to_string(status).expect("its status");
        let blocked = status
            .lines()
            .find_map(|line| line.strip_prefix("SigBlk:\t"));
        let blocked = u64::from_str_radix(blocked.expect("a mask"), 16).expect("a number");
        assert!(blocked & (1 << (libc::SIGTERM - 1)) != 0, "{status}");
        count += 1;
    }
    vm.terminate();
    vm.finish().assert_status(TERMINATED);
    fs::remove_file(&path).expect("remove it");
    assert!(count >= 6, "{count} threads");
}

/// SIGXFSZ, SIGTTIN, SIGTTOU: the read or write fails with an error instead.
#[test]
fn signals_that_mean_nothing_change_nothing() {
    let vm = Rvmm::guest("spin").spawn();
    vm.wait_for("spinning\n");
    for number in ["25", "21", "22"] {
        vm.signal(number);
    }
    vm.signal("INT");
    vm.finish().assert_console(INTERRUPTED, &["spinning"]);
}

#[test]
fn what_was_ignored_stays_ignored() {
    let vm = Rvmm::guest("spin").after("trap '' HUP").spawn();
    vm.wait_for("spinning\n");
    vm.signal("HUP");
    vm.signal("INT");
    vm.finish().assert_console(INTERRUPTED, &["spinning"]);
}

/// `ulimit -f` counts units of 512 bytes. A file that may not grow behaves like a full disk.
#[test]
fn a_limit_on_files_loses_output_and_not_the_guest() {
    let path = temporary("limited");
    let console = format!("file={}", path.display());
    let vm = Rvmm::guest("flood").after("ulimit -f 64");
    let end = vm.arg("--console").arg(console).run();
    let file = fs::read(&path).expect("the console's file");
    fs::remove_file(&path).expect("remove it");
    assert_eq!(file.len(), 64 * 512);
    assert!(end.log.contains("File too large"), "{}", end.log);
    end.assert_status(POWERED_OFF);
}

#[test]
fn a_stopped_machine_goes_on() {
    let vm = Rvmm::guest("spin").spawn();
    vm.wait_for("spinning\n");
    vm.signal("TSTP");
    vm.wait_until_stopped();
    vm.signal("CONT");
    vm.signal("INT");
    vm.finish().assert_console(INTERRUPTED, &["spinning"]);
}

#[test]
fn no_console_is_no_output() {
    let end = Rvmm::guest("console").args(["--console", "none"]).run();
    assert!(end.console.is_empty());
    end.assert_status(POWERED_OFF);
}

#[test]
fn what_is_printed_runs() {
    let kernel = files::guest("console");
    let printed = Rvmm::new()
        .arg("--kernel")
        .arg(&kernel)
        .args(["--mem", "32M", "--irqchip", "plic", "--print-config"])
        .run();
    printed.assert_status(POWERED_OFF);
    let path = temporary("config");
    fs::write(&path, &printed.console).expect("write the configuration");
    let end = Rvmm::new().arg("--config").arg(&path).arg("-v").run();
    fs::remove_file(&path).expect("remove it");
    assert!(end.console.contains("console: done"));
    assert!(end.log.contains("PLIC"));
    end.assert_status(POWERED_OFF);
}

#[test]
fn a_configuration_with_an_unknown_key_is_refused() {
    let path = temporary("unknown");
    fs::write(&path, r#"{ "kernel": "Image", "memory": "1G" }"#).expect("write the configuration");
    let end = Rvmm::new().arg("--config").arg(&path).run();
    fs::remove_file(&path).expect("remove it");
    end.assert_one_line(USAGE, &["memory", "mem", "irqchip"]);
}

#[test]
fn a_configuration_that_is_not_there() {
    let end = Rvmm::new().args(["--config", "/nope.json"]).run();
    end.assert_one_line(HOST_FAILED, &["/nope.json", "No such file"]);
}
