//! The parts of the command line that need neither KVM nor a guest. Runs on any host.

use crate::common::{Outcome, Rvmm, USAGE};

fn rvmm(args: &[&str]) -> Outcome {
    Rvmm::new().args(args).stdin_null().run()
}

/// A wrong command line gives one line of error before rvmm looks at anything else (there is no
/// file `x`).
#[track_caller]
fn wrong(args: &[&str], words: &[&str]) -> String {
    rvmm(args).assert_one_line(USAGE, words)
}

#[test]
fn bare_rvmm_prints_a_short_help() {
    let end = rvmm(&[]);
    let help = format!("{}{}", end.console, end.log);
    assert!(
        help.contains("--kernel"),
        "the help must name the required flag"
    );
    assert!(help.lines().count() <= 24, "the help must fit on a screen");
}

#[test]
fn help_lists_the_exit_statuses() {
    let end = rvmm(&["--help"]);
    for status in ["120", "121", "122", "123", "124", "125", "128"] {
        assert!(
            end.console.contains(status),
            "--help does not explain exit status {status}"
        );
    }
    for flag in [
        "--kernel",
        "--initrd",
        "--cmdline",
        "--mem",
        "--cpus",
        "--log-file",
        "--dump-dtb",
        "--version",
    ] {
        assert!(end.console.contains(flag), "--help does not explain {flag}");
    }
    assert_eq!(end.log, "");
    end.assert_status(0);
}

#[test]
fn version() {
    rvmm(&["--version"]).assert_console(0, &[concat!("rvmm ", env!("CARGO_PKG_VERSION"))]);
}

#[test]
fn unknown_flag() {
    wrong(&["--kernel", "x", "--frobnicate"], &["--frobnicate"]);
}

#[test]
fn flag_without_its_value() {
    wrong(&["--kernel"], &["--kernel"]);
}

#[test]
fn initrd_without_a_kernel() {
    wrong(&["--initrd", "x"], &["--kernel"]);
}

#[test]
fn memory_sizes_that_are_none() {
    for size in [
        "0",
        "-1",
        "abc",
        "12Q",
        "",
        "1.5G",
        "99999999999999999999",
        "99999999T",
    ] {
        wrong(&["--kernel", "x", &format!("--mem={size}")], &["--mem"]);
    }
    wrong(&["--kernel", "x", "--mem", "-1"], &["-1"]);
}

#[test]
fn cpus() {
    wrong(&["--kernel", "x", "--cpus", "0"], &["--cpus", "0"]);
    wrong(&["--kernel", "x", "--cpus", "many"], &["--cpus", "many"]);
}

/// On other architectures than riscv64, the line says what is missing and what to do.
#[cfg(not(target_arch = "riscv64"))]
#[test]
fn other_architectures() {
    let end = rvmm(&["--kernel", "x"]);
    end.assert_one_line(
        crate::common::HOST_FAILED,
        &["64-bit RISC-V", std::env::consts::ARCH, "scripts/demo"],
    );
}
