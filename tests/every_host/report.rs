//! Guests that cannot go on, or get nowhere, and what rvmm reports of them.
#![cfg(target_arch = "riscv64")]

use crate::common::ctl::Ctl;
use crate::common::files::{TempDir, guest_elf};
use crate::common::host::kvm_gives_fetch_faults;
use crate::common::{CANNOT_GO_ON, Rvmm, Shell, TERMINATED, USAGE, Vm, kallsyms};

const TRAP_LOOP: &str = "hart 0 gets nowhere: it takes the same trap again and again";
const PANIC: &str = "its kernel has panicked";

/// rvmm with this guest and its symbols.
fn with_symbols(name: &str) -> Rvmm {
    Rvmm::guest(name)
        .arg("--symbols")
        .arg(guest_elf(name))
        .args(["--on-crash", "report,watch=200ms"])
}

/// Waits for the last line of a report, and returns all messages so far.
fn report(vm: &Vm) -> String {
    vm.wait_for_log("  called from:");
    vm.log()
}

#[track_caller]
fn has_lines(log: &str, lines: &[&str]) {
    for line in lines {
        assert!(log.contains(line), "{line:?} in:\n{log}");
    }
}

/// Ends a guest that would run on.
fn kill(vm: Vm) {
    vm.terminate();
    vm.finish().assert_status(TERMINATED);
}

#[test]
fn a_jump_without_a_trap_handler() {
    let vm = with_symbols("wildjump").spawn();
    vm.wait_for("jumping");
    if kvm_gives_fetch_faults() {
        vm.wait_for_log(TRAP_LOOP);
        let log = report(&vm);
        has_lines(
            &log,
            &[
                "hart 0: at 0x0, in supervisor mode",
                "pc leads to nothing",
                "instruction: none can be read there",
                "last trap: instruction access fault, at 0x0",
                "hint: stvec does not point to code",
            ],
        );
        return kill(vm);
    }
    let end = vm.finish();
    end.assert_console(CANNOT_GO_ON, &["jumping"]);
    has_lines(
        &end.log,
        &[
            "in supervisor mode",
            "pc leads to nothing",
            "instruction: none can be read there",
            "hint: stvec does not point to code",
            "its trap handler (stvec) is at 0x0, outside RAM",
        ],
    );
}

/// The guest handles all its traps itself, so there is no exit.
#[test]
fn a_trap_handler_that_is_not_mapped() {
    let vm = with_symbols("badvector").spawn();
    vm.wait_for("turning paging on");
    vm.wait_for_log(TRAP_LOOP);
    has_lines(
        &report(&vm),
        &[
            "hart 0: at 0x40001000, in supervisor mode",
            "pc leads to nothing: it is not mapped",
            "last trap: instruction page fault, at 0x40001000",
            "hint: stvec does not point to code",
            "page tables (Sv39) of pc, 0x40001000:",
            "level 2: 0000000000000000 at",
            "not mapped",
        ],
    );
    kill(vm);
}

#[test]
fn a_trap_handler_that_does_not_step() {
    let vm = with_symbols("samestep").spawn();
    vm.wait_for("stepping");
    vm.wait_for_log(TRAP_LOOP);
    has_lines(
        &report(&vm),
        &[
            "last trap: illegal instruction, at 0x",
            "(main+0x",
            "hint: CSR 0x680 belongs to machine mode or the hypervisor",
        ],
    );
    kill(vm);
}

#[test]
fn an_atomic_on_the_uart() {
    let end = with_symbols("amouart").run();
    end.assert_console(CANNOT_GO_ON, &["amo"]);
    has_lines(
        &end.log,
        &[
            "(main+0x",
            "pc leads to RAM, where the kernel was loaded",
            "amoswap.w",
            "hint: atomic and vector instructions work on RAM only",
            "the guest cannot go on: KVM_RUN failed",
        ],
    );
}

/// The hart waits in its trap handler. A report on demand says why.
#[test]
fn a_stack_that_grew_out_of_ram() {
    let scratch = TempDir::new();
    let socket = scratch.path().join("ctl");
    let vm = with_symbols("smallstack").arg("--ctl").arg(&socket).spawn();
    vm.wait_for("calling");
    let mut ctl = Ctl::connect(&socket);
    vm.wait_for("!");
    let text = ctl.ask("report")["report"].take();
    let text = text.as_str().expect("text");
    has_lines(
        text,
        &[
            "hart 0: at 0x",
            "(wait+0x",
            "last trap: instruction access fault",
            "hint: sp is outside RAM: the stack grew too far",
        ],
    );
    kill(vm);
}

#[test]
fn a_panic_of_linux() {
    let scratch = TempDir::new();
    let image = scratch.file("symbols", kallsyms(&scratch));
    let vm = Rvmm::virtio("console=ttyS0 quiet panic=0 rvmm.action=sh")
        .arg("--symbols")
        .arg(&image)
        .args(["--on-crash", "report,watch=200ms"]);
    let mut shell = Shell::of(vm);
    shell.vm.send("echo c >/proc/sysrq-trigger\n");
    shell.vm.wait_for_log(PANIC);
    // The log gets the report line by line, and this line comes after the one of panic().
    shell.vm.wait_for_log("(sysrq_handle_crash+0x");
    has_lines(&report(&shell.vm), &["in supervisor mode", "(panic+0x"]);
    kill(shell.vm);
}

/// The machine stays, to be looked at and restarted.
#[test]
fn a_guest_that_cannot_go_on_is_paused() {
    let scratch = TempDir::new();
    let socket = scratch.path().join("ctl");
    let vm = Rvmm::guest("amouart")
        .args(["--on-crash", "pause", "--ctl"])
        .arg(&socket)
        .spawn();
    vm.wait_for_log("the guest is paused");
    let mut ctl = Ctl::connect(&socket);
    assert_eq!(ctl.status()["state"], "paused");
    let text = ctl.ask("report")["report"].take();
    has_lines(text.as_str().expect("text"), &["amoswap.w"]);
    // It cannot go on where it is, but it can start again.
    ctl.done("resume");
    vm.wait_for_log_times("the guest is paused", 2);
    vm.wait_for_times("amo\n", 1);
    ctl.done("reset");
    ctl.done("resume");
    vm.wait_for_times("amo\n", 2);
    ctl.done("stop");
    vm.finish().assert_status(0);
}

#[test]
fn a_guest_that_cannot_go_on_is_restarted() {
    let vm = Rvmm::guest("amouart").args(["--on-crash", "reset"]).spawn();
    vm.wait_for_times("amo\n", 20);
    vm.terminate();
    let end = vm.finish();
    end.assert_status(TERMINATED);
    // A guest that crashes after each reset does not flood the log.
    let reports = end.log.matches("  called from:").count();
    assert!((1..20).contains(&reports), "{reports} reports");
}

/// Busy guests that are well are not reported, however often rvmm looks.
#[test]
fn a_busy_guest_is_left_alone() {
    const GUESTS: [&str; 4] = ["spin", "faulting", "ticking", "userspin"];
    let watched = |name| {
        Rvmm::guest(name)
            .args(["-vv", "--on-crash", "report,watch=10ms"])
            .spawn()
    };
    let idle = watched("idle");
    for vm in GUESTS.map(watched) {
        vm.wait_for_log("hart 0 gets on: 200 samples show it");
        assert!(!vm.log().contains("gets nowhere"), "{}", vm.log());
        kill(vm);
    }
    // A hart that waits is not sampled.
    assert!(!idle.log().contains("hart 0"), "{}", idle.log());
    kill(idle);
}

#[test]
fn a_file_without_symbols_is_refused() {
    let scratch = TempDir::new();
    let file = scratch.file("symbols", "80000000 T start\nnot a symbol\n");
    let end = Rvmm::guest("echo").arg("--symbols").arg(&file).run();
    end.assert_status(crate::common::HOST_FAILED);
    let why = format!("Failed to load symbols {file:?}: line 2 is no symbol");
    assert!(end.log.contains(&why), "{}", end.log);
    let end = Rvmm::guest("echo").args(["--on-crash", "stop"]).run();
    end.assert_status(USAGE);
    assert!(end.log.contains("`report`"), "{}", end.log);
}
