//! Our own guests (`resources/guests/`). Each shows one behaviour. A case checks rvmm's exit status
//! and the exact lines on the console.
#![cfg(target_arch = "riscv64")]

use crate::common::files::TempDir;
use crate::common::host::kvm_gives_fetch_faults;
use crate::common::{CANNOT_GO_ON, GUEST_FAILED, POWERED_OFF, RESET, Rvmm, TIMED_OUT};

/// Runs guest `name` to its end, and compares all its output.
#[track_caller]
fn check(name: &str, status: i32, lines: &[&str]) {
    Rvmm::guest(name).run().assert_console(status, lines);
}

/// The simplest guest: it makes the SBI call that shuts down, and rvmm exits with 0.
#[test]
fn shutdown() {
    check("shutdown", POWERED_OFF, &[]);
}

#[test]
fn shutdown_for_a_failure() {
    check("failure", GUEST_FAILED, &[]);
}

#[test]
fn cold_reboot() {
    check("reset", RESET, &[]);
}

#[test]
fn console() {
    let end = Rvmm::guest("console").args(["--mem", "128M"]).run();
    // If the host's kernel supports the legacy calls, this call reaches rvmm with its byte, and the
    // answer is in a0 only. Otherwise (Debian) KVM refuses it like an unknown extension, and a1 has
    // the error's value. rvmm has no influence on that.
    let putchar = if end.console.contains("putchar: [X]") {
        "putchar: [X] a0=0 a1=kept"
    } else if end.console.contains("a1=kept") {
        "putchar: [] a0=-2 a1=kept"
    } else {
        "putchar: [] a0=-2 a1=lost"
    };
    end.assert_console(
        POWERED_OFF,
        &[
            "hart=0 fdt=ok",
            "dbcn: hello from DBCN",
            "error=0 count=22",
            "byte: hello by write_byte",
            "errors=0",
            "uart: hello from the UART",
            putchar,
            "write address zero: -3",
            "write below RAM: -3",
            "write across the end: -3",
            "write at the end: -3",
            "write all and more: -3",
            "write high half: -3",
            "write longest: -3",
            "write wrapping: -3",
            "write into the UART: -3",
            "read address zero: -3",
            "read across the end: -3",
            "read high half: -3",
            "read longest: -3",
            "read wrapping: -3",
            "error=0 count=0",
            "", // RAM's last byte
            "error=0 count=1",
            "error=0 count=0",
            "console: done",
        ],
    );
}

/// A guest that measures the UART finds a 16550A: a FIFO of 16 bytes, or of one with FIFOs off.
#[test]
fn uart() {
    check(
        "uart",
        POWERED_OFF,
        &[
            "off: overrun=2 lsr=61 kept=1 first=2 last=2",
            "on: overrun=17 lsr=61 kept=16 first=1 last=16",
            "trigger off: none=1 first=4 available=1",
            "trigger 1: none=c1 first=c4 available=1",
            "trigger 4: none=c1 first=cc available=4",
            "trigger 8: none=c1 first=cc available=8",
            "trigger 14: none=c1 first=cc available=14",
            "flushed: lsr=60 iir=c1",
            "dtr: 22 20",
            "rts: 13 10",
            "out1: 41 40",
            "out2: 8c 80",
            "none: 8 0",
            "break: lsr=e1 rbr=5a lsr=f1 lsr=61 rbr=0 lsr=60",
            "priority: c6 c4 c2 c0 c1",
            "no loop: msr=b0",
            "uart: done",
        ],
    );
}

#[test]
fn touching_what_is_not_there() {
    check(
        "missing",
        POWERED_OFF,
        &[
            "nowhere: lbu=ff lhu=ffff lwu=ffffffff ld=ffffffffffffffff",
            "nowhere: stored",
            "uart: scratch=5a",
            "uart: odd accesses done",
            "sbi unknown extension: -2",
            "sbi experimental: -2",
            "sbi vendor: -2",
            "sbi unknown function: -2",
            "sbi probe experimental: 0",
            "csr read: trap cause=2",
            "csr write: trap cause=2",
            "missing: alive",
        ],
    );
}

/// An instruction that is illegal on the host's harts, too. The guest takes a trap and goes on. If
/// the firmware below the host's kernel loses the trap (see `illegal.S`), the guest cannot go on.
#[test]
fn illegal_instruction() {
    let end = Rvmm::guest("illegal").run();
    if end.console.contains("trap") {
        let lines = [
            "illegal: now",
            "csr read: trap cause=2",
            "csr write: trap cause=2",
        ];
        end.assert_console(POWERED_OFF, &lines);
    } else {
        end.assert_console(CANNOT_GO_ON, &["illegal: now"]);
    }
}

/// The entropy source. KVM cannot hide it from a guest if the host's harts have one. Elsewhere the
/// access is an illegal instruction, which the guest reports as a failure.
#[test]
fn seed() {
    let end = Rvmm::guest("seed").run();
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").expect("read /proc/cpuinfo");
    if cpuinfo.contains("_zkr") {
        end.assert_console(POWERED_OFF, &["seed: es16"]);
    } else {
        assert!(!end.console.contains("seed"), "there is no entropy source");
        let code = end.status.code();
        assert!(
            code == Some(GUEST_FAILED) || code == Some(CANNOT_GO_ON),
            "exit status: {}",
            end.status
        );
    }
}

/// An instruction that no kernel's KVM emulates.
#[test]
fn unrunnable_atomic() {
    let end = Rvmm::guest("amo").run();
    end.assert_console(CANNOT_GO_ON, &["amo"]);
    assert!(
        end.log.lines().any(|line| line.starts_with("rvmm: ")),
        "rvmm says why"
    );
}

/// A fetch from an address without memory is an instruction access fault, on every host kernel.
#[test]
fn fetch_faults() {
    check(
        "fetch",
        POWERED_OFF,
        &[
            "supervisor: cause=1 epc=4000000 tval=4000000 spp=1 spie=1 sie=0",
            "user: cause=1 epc=4000004 tval=4000004 spp=0 spie=1 sie=0",
            "mapped: cause=1 epc=c0001000 tval=c0001000 spp=1 spie=0 sie=0",
            "translation off, relative to the jump: cause=1 epc=0 tval=0 spp=1 spie=0 sie=0",
        ],
    );
}

/// The guest's trap handler runs, and its instruction ends the machine.
#[test]
fn unrunnable_jump() {
    let end = Rvmm::guest("unrunnable").run();
    end.assert_console(CANNOT_GO_ON, &["jumping", "fault: cause=1"]);
    assert!(
        end.log.lines().any(|line| line.starts_with("rvmm: ")),
        "rvmm says why"
    );
}

/// The trap handler's address has no memory either. Newer kernels give the fault to the hart
/// themselves, again and again.
#[test]
fn no_trap_handler() {
    let end = Rvmm::guest("nohandler").args(["--timeout", "20s"]).run();
    if kvm_gives_fetch_faults() {
        end.assert_console(TIMED_OUT, &["jumping"]);
        return;
    }
    end.assert_console(CANNOT_GO_ON, &["jumping"]);
    let why = "its trap handler (stvec) is at 0x4000000, outside RAM";
    assert!(end.log.contains(why), "{}", end.log);
}

/// A driver that accepts only the low 32 features works. The address map and the vendor are QEMU's.
#[test]
fn a_small_virtio_driver() {
    let scratch = TempDir::new();
    let nonce = crate::common::nonce();
    let mut sector = [b'.'; 512];
    sector[..nonce.len()].copy_from_slice(nonce.as_bytes());
    let image = scratch.file("disk", sector);
    let image = image.to_str().expect("UTF-8");
    let end = Rvmm::guest("smalldriver")
        .args(["--transport", "mmio", "--disk", image])
        .run();
    let read = String::from_utf8_lossy(&sector[..16]);
    end.assert_console(
        POWERED_OFF,
        &[
            "magic=74726976 version=2 device=2 vendor=554d4551",
            "negotiated: status=b",
            "ready: status=f",
            &format!("read: status=0 sector={read}"),
        ],
    );
}
