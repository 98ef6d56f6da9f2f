//! The harness of the integration tests. It runs rvmm as a child process, and captures the guest's
//! console and rvmm's messages.
//!
//! Nothing here waits for a fixed time. A case waits for a line, for the end of the process, or
//! until a pipe is full. Every process has one deadline, which only a hanging case reaches. If a
//! case fails, the command, the guest's console and rvmm's messages are shown.
//!
//! | variable           | meaning                             | default                     |
//! |--------------------|-------------------------------------|-----------------------------|
//! | `RVMM_TEST_BIN`    | the rvmm to test                    | cargo's build               |
//! | `RVMM_TEST_HOST`   | the kind: `aia`, `aia-emul`, `none` | any                         |
//! | `RVMM_TEST_KERNEL` | a Linux `Image`                     | `/boot/vmlinux-$(uname -r)` |
//! | `RVMM_TEST_GUESTS` | the output of `scripts/guests`      | `target/guests`             |
//! | `RVMM_TEST_DEBIAN` | a disk with a Debian for guests     | none: those cases fail      |
//! | `RVMM_TEST_KEXEC`  | the guests' loader for kexec        | cargo's build               |
#![allow(
    dead_code,
    unused_imports,
    reason = "every test file uses a part of this"
)]

pub(crate) mod ctl;
#[cfg(target_arch = "riscv64")]
pub(crate) mod disk;
pub(crate) mod files;
pub(crate) mod freezing;
#[cfg(target_arch = "riscv64")]
pub(crate) mod gdb;
#[cfg(target_arch = "riscv64")]
pub(crate) mod host;
#[cfg(target_arch = "riscv64")]
pub(crate) mod hugepages;
#[cfg(target_arch = "riscv64")]
pub(crate) mod net;
#[cfg(target_arch = "riscv64")]
pub(crate) mod pausing;
#[cfg(target_arch = "riscv64")]
pub(crate) mod programs;
mod shell;
mod vm;

pub(crate) use shell::{Shell, kallsyms};
pub(crate) use vm::{Outcome, Rvmm, Vm};

/// Exit status: the guest powered off.
pub(crate) const POWERED_OFF: i32 = 0;
/// Exit status: the guest asked for a reset.
pub(crate) const RESET: i32 = 120;
/// Exit status: the guest reported failure.
pub(crate) const GUEST_FAILED: i32 = 121;
/// Exit status: the guest cannot go on.
pub(crate) const CANNOT_GO_ON: i32 = 122;
/// Exit status: the host or its files failed.
pub(crate) const HOST_FAILED: i32 = 123;
/// Exit status: the time of `--timeout` is over.
pub(crate) const TIMED_OUT: i32 = 124;
/// Exit status: the command line is wrong.
pub(crate) const USAGE: i32 = 125;
/// Exit status: ended by SIGTERM (128 + 15).
pub(crate) const TERMINATED: i32 = 143;

/// Writes a measured figure to the log of the tests, also if the case passes.
pub(crate) fn measured(text: &str) {
    use std::io::Write;
    // libtest captures only what the macros print.
    let _ = writeln!(std::io::stderr(), "measured: {}", text.trim_end());
}

/// A text that no earlier run has seen.
pub(crate) fn nonce() -> String {
    use std::hash::{BuildHasher, Hasher, RandomState};
    format!("{:016x}", RandomState::new().build_hasher().finish())
}
