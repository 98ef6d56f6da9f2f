//! A machine that is paused and resumed: `--ctl`, `--pause` and `rvmm ctl`.
#![cfg(target_arch = "riscv64")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::common::ctl::Ctl;
use crate::common::files::{TempDir, rvmm};
use crate::common::host::{self, Kind};
use crate::common::pausing::{cpu_time, nothing_is_lost, wait_for_work};
use crate::common::{HOST_FAILED, POWERED_OFF, Rvmm, Shell, USAGE, nonce};

/// Rounds in the ordinary run; `long_pause` runs more.
const ROUNDS: u32 = 100;

/// Runs `rvmm ctl` with these words.
fn ctl(socket: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(rvmm());
    command.arg("ctl").arg(socket).args(words);
    command.output().expect("run rvmm ctl")
}

/// The output of `rvmm ctl`, which must succeed.
#[track_caller]
fn printed(socket: &Path, words: &[&str]) -> String {
    let output = ctl(socket, words);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The single line of error of `rvmm ctl`, which must fail with `status`.
#[track_caller]
fn refused(socket: &Path, words: &[&str], status: i32) -> String {
    let output = ctl(socket, words);
    assert_eq!(output.status.code(), Some(status), "{words:?}");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(error.lines().count(), 1, "{error}");
    error
}

/// Every command, as a user types it.
#[test]
fn the_commands_of_ctl() {
    let scratch = TempDir::new();
    let socket = scratch.path().join("ctl");
    let at = socket.display().to_string();
    let vm = Rvmm::guest("echo").args(["--ctl", &at]).spawn();
    vm.wait_for("ready");
    assert!(
        printed(&socket, &["status"]).starts_with("running: 1 vCPUs, 128 MiB of RAM, 0 resets\n")
    );
    for _ in 0..2 {
        assert_eq!(printed(&socket, &["pause"]), "");
        assert!(printed(&socket, &["status"]).starts_with("paused: "));
    }
    let json = printed(&socket, &["status", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json["devices"]["uart"]["kind"], "uart16550");
    for _ in 0..2 {
        assert_eq!(printed(&socket, &["resume"]), "");
    }
    let tree = scratch.path().join("tree");
    printed(&socket, &["dump-dtb", &tree.display().to_string()]);
    let bytes = std::fs::read(&tree).expect("the tree");
    assert_eq!(bytes[..4], [0xd0, 0x0d, 0xfe, 0xed]);
    assert!(refused(&socket, &["stats"], HOST_FAILED).contains("--stats"));
    refused(&socket, &["fly"], USAGE);
    // A second machine cannot take the name.
    let second = Rvmm::guest("echo").args(["--ctl", &at]).run();
    second.assert_status(HOST_FAILED);
    assert!(
        second.log.contains("another process listens"),
        "{}",
        second.log
    );
    printed(&socket, &["stop"]);
    vm.finish().assert_status(POWERED_OFF);
    assert!(!socket.exists());
    assert!(refused(&socket, &["status"], HOST_FAILED).contains("No such file"));
}

/// Statistics of a running machine, several times.
#[test]
fn statistics_are_told_meanwhile() {
    let scratch = TempDir::new();
    let socket = scratch.path().join("ctl");
    let at = socket.display().to_string();
    let mut vm = Rvmm::guest("pause").args(["--ctl", &at, "--stats"]).spawn();
    vm.wait_for("ready");
    let mut ctl = Ctl::connect(&socket);
    let mut loads = || {
        let stats = ctl.ask("stats");
        let exits = &stats["stats"]["vcpus"][0]["exits"];
        let exits = exits.as_array().expect("exits").iter();
        let counts = exits.map(|exit| exit["count"].as_u64().expect("a count"));
        counts.sum::<u64>()
    };
    let first = loads();
    assert!(loads() > first);
    vm.send("x");
    let end = vm.finish();
    end.assert_console(POWERED_OFF, &["ready", "no result is lost"]);
    assert!(end.log.contains("exits to rvmm"), "{}", end.log);
}

/// A control group that limits the threads of the process in it.
struct Group(PathBuf);

impl Group {
    /// Puts process `pid` into a group of its own.
    fn of(pid: u32, scratch: &TempDir) -> Self {
        let root = scratch.path().join("cgroup");
        std::fs::create_dir(&root).expect("a folder");
        let mut mount = Command::new("mount");
        mount.args(["-t", "cgroup2", "none"]).arg(&root);
        assert!(mount.status().expect("run mount").success());
        std::fs::write(root.join("cgroup.subtree_control"), "+pids").expect("add pids");
        let group = root.join(format!("rvmm-test-{pid}"));
        std::fs::create_dir(&group).expect("a group");
        std::fs::write(group.join("cgroup.procs"), pid.to_string()).expect("enter the group");
        Group(group)
    }

    fn limit_threads(&self, limit: &str) {
        std::fs::write(self.0.join("pids.max"), limit).expect("set a limit");
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let root = self.0.parent().expect("a folder");
        let _ = Command::new("umount").arg(root).status();
    }
}

/// If the host has no room for a vCPU's thread, the command fails. The machine stays paused, and
/// can go on later.
#[test]
fn vcpus_that_cannot_be_started_are_not_lost() {
    let scratch = TempDir::new();
    let socket = scratch.path().join("ctl");
    let at = socket.display().to_string();
    let vm = Rvmm::guest("pause");
    let mut vm = vm.args(["--ctl", &at, "--stats", "--cpus", "2"]).spawn();
    vm.wait_for("ready");
    let group = Group::of(vm.pid(), &scratch);
    let mut ctl = Ctl::connect(&socket);
    for command in ["resume", "stats"] {
        if command == "resume" {
            ctl.done("pause");
        }
        group.limit_threads("1");
        let reply = ctl.ask(command);
        group.limit_threads("max");
        let reason = reply["refused"].as_str().unwrap_or_default();
        assert!(
            reason.contains("cannot be resumed now: Failed to"),
            "{reply}"
        );
        assert_eq!(ctl.status()["state"], "paused");
        ctl.done("resume");
        assert_eq!(ctl.status()["state"], "running");
    }
    vm.send("x");
    let end = vm.finish();
    end.assert_console(POWERED_OFF, &["ready", "no result is lost"]);
}

/// A pause between an exit and the next entry does not lose the exit's result.
#[track_caller]
fn no_result_is_lost(guest: &str, more: &[&str]) {
    let scratch = TempDir::new();
    let socket = scratch.path().join("ctl");
    let at = socket.display().to_string();
    let mut vm = Rvmm::guest(guest).args(["--ctl", &at]).args(more).spawn();
    vm.wait_for("ready");
    let mut ctl = Ctl::connect(&socket);
    for _ in 0..4 * ROUNDS {
        wait_for_work(vm.pid(), 1_000_000);
        ctl.done("pause");
        ctl.done("resume");
    }
    vm.send("x");
    let end = vm.finish();
    end.assert_console(POWERED_OFF, &["ready", "no result is lost"]);
}

#[test]
fn no_load_and_no_call_is_lost() {
    no_result_is_lost("pause", &[]);
}

/// On a host with AIA, a guest without one has CSRs that rvmm serves.
#[test]
fn no_csr_is_lost() {
    if host::kind() == Kind::NoAia {
        // Guests on this host have no such CSR. The case is run all the same.
        return no_result_is_lost("pause", &["--irqchip", "plic"]);
    }
    no_result_is_lost("pausecsr", &["--irqchip", "plic"]);
}

/// During a pause no thread of rvmm runs, and no process of the guest.
#[test]
fn a_paused_machine_stands_still() {
    let scratch = TempDir::new();
    let socket = scratch.path().join("ctl");
    let at = socket.display().to_string();
    let mut guest = Shell::start(["--cpus", "4", "--rng", "--ctl", &at]);
    guest.ok("(while :; do :; done) & (while :; do date >/tmp/date; done) &");
    let mut ctl = Ctl::connect(&socket);
    ctl.done("pause");
    let pid = guest.vm.pid();
    // The threads that answered are idle again once two looks agree. Each look takes time of
    // another process.
    let mut before = cpu_time(pid);
    loop {
        crate::common::disk::host_runs("head -c 4000000 /dev/urandom | md5sum");
        let after = cpu_time(pid);
        if after == before {
            break;
        }
        before = after;
    }
    guest.vm.send("echo typed meanwhile\n");
    ctl.done("resume");
    guest.answered(1);
    assert!(guest.vm.console().contains("typed meanwhile"));
    guest.power_off();
}

/// The guest does not start before it is resumed. The same holds after a reset by a command.
#[test]
fn a_machine_can_begin_paused() {
    let scratch = TempDir::new();
    let socket = scratch.path().join("ctl");
    let at = socket.display().to_string();
    let word = nonce();
    let mut vm = Rvmm::guest("echo")
        .args(["--cpus", "2", "--ctl", &at, "--pause"])
        .spawn();
    vm.wait_for_log("the guest is paused");
    let mut ctl = Ctl::connect(&socket);
    assert_eq!(ctl.status()["state"], "paused");
    ctl.done("reset");
    assert_eq!(ctl.status()["state"], "paused");
    assert_eq!(ctl.status()["resets"], 1);
    assert_eq!(vm.console(), "", "the guest must not have run");
    ctl.done("resume");
    vm.wait_for("ready");
    ctl.done("reset");
    assert_eq!(ctl.status()["state"], "running");
    vm.send(format!("{word}\n"));
    vm.wait_for(&word);
    vm.terminate();
    vm.finish().assert_status(crate::common::TERMINATED);
}

/// SIGTERM and `--timeout` end a paused machine, too.
#[test]
fn a_paused_machine_ends() {
    let scratch = TempDir::new();
    let socket = scratch.path().join("ctl");
    let at = socket.display().to_string();
    let guest = |more: &[&str]| {
        let vm = Rvmm::guest("spin")
            .args(["--ctl", &at, "--pause"])
            .args(more)
            .spawn();
        vm.wait_for_log("the guest is paused");
        vm
    };
    let vm = guest(&[]);
    vm.terminate();
    vm.finish().assert_status(crate::common::TERMINATED);
    guest(&["--timeout", "1s"])
        .finish()
        .assert_status(crate::common::TIMED_OUT);
}

#[test]
fn nothing_is_lost_under_load() {
    nothing_is_lost(ROUNDS, &[]);
}
