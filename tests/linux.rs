//! Linux as the guest: the kernel that the host itself runs, and our initramfs, whose init does what the `rvmm.` words on the
//! kernel's command line say. A nonce on the command line comes back in the guest's answer, and the guest reports the id of
//! the SBI implementation below it (3: KVM), so the answer is the guest's and nobody else's.
#![cfg(target_arch = "riscv64")]

mod common;

use common::{HOST_FAILED, Outcome, POWERED_OFF, RESET, Rvmm, boot, nonce};

/// Linux with this action, and `nonce` to be told again.
fn linux(nonce: &str, action: &str) -> Rvmm {
    let cmdline = format!("console=ttyS0 rvmm.nonce={nonce} rvmm.action={action}");
    Rvmm::linux().arg("--cmdline").arg(cmdline)
}

/// The guest came to userspace on hart 0 of KVM, and knows the nonce.
#[track_caller]
fn assert_userspace(end: &Outcome, nonce: &str) {
    let banner = format!("rvmm-guest: userspace nonce={nonce} sbi-impl=3 hart=0");
    assert!(
        end.console.lines().any(|line| line.trim_end() == banner),
        "no line {banner:?}"
    );
}

#[test]
fn to_userspace_and_power_off() {
    let nonce = nonce();
    let Some(vm) = boot(linux(&nonce, "poweroff")) else {
        return;
    };
    let end = vm.finish();
    assert_userspace(&end, &nonce);
    end.assert_status(POWERED_OFF);
}

#[test]
fn reboot() {
    let nonce = nonce();
    let Some(vm) = boot(linux(&nonce, "reboot")) else {
        return;
    };
    let end = vm.finish();
    assert_userspace(&end, &nonce);
    end.assert_status(RESET);
}

/// Without `--cmdline` the guest has a console all the same.
#[test]
fn default_command_line() {
    let Some(vm) = boot(Rvmm::linux().stdin_null()) else {
        return;
    };
    vm.wait_for("rvmm-guest: userspace nonce=none sbi-impl=3 hart=0");
}

/// A line typed at rvmm reaches a process in the guest, which answers it: the UART's receive interrupt works.
#[test]
fn typed_input() {
    let nonce = nonce();
    let Some(mut vm) = boot(linux(&nonce, "echo")) else {
        return;
    };
    vm.wait_for("rvmm-guest: ready");
    vm.send(format!("hello {nonce}\n"));
    vm.wait_for(&format!("rvmm-guest: got hello {nonce}"));
    vm.finish().assert_status(POWERED_OFF);
}

/// The UART's interrupt arrives: its count rises while the guest writes 4 KiB.
#[test]
fn uart_interrupts() {
    let nonce = nonce();
    let Some(vm) = boot(linux(&nonce, "irqs")) else {
        return;
    };
    let end = vm.finish();
    let (before, after) = (uart_count(&end.console, 1), uart_count(&end.console, 2));
    assert!(
        after > before,
        "ttyS0's interrupts: {before} before 4 KiB of output, {after} after"
    );
    end.assert_status(POWERED_OFF);
}

/// The interrupts counted for ttyS0 in the guest's n-th print of `/proc/interrupts`.
fn uart_count(console: &str, n: u32) -> u64 {
    let (begin, end) = (
        format!("rvmm-guest: irqs-begin {n}"),
        format!("rvmm-guest: irqs-end {n}"),
    );
    let row = console
        .lines()
        .skip_while(|line| line.trim_end() != begin)
        .take_while(|line| line.trim_end() != end)
        .find(|line| line.trim_end().ends_with("ttyS0"))
        .unwrap_or_else(|| panic!("no row for ttyS0 behind {begin:?}"));
    // "10:   45   APLIC-MSI-...  10 Level  ttyS0": one count for each CPU, then the names.
    row.split_whitespace()
        .skip(1)
        .map_while(|word| word.parse::<u64>().ok())
        .sum()
}

#[test]
fn in_64_mib() {
    let nonce = nonce();
    let Some(vm) = boot(linux(&nonce, "poweroff").args(["--mem", "64M"])) else {
        return;
    };
    let end = vm.finish();
    assert_userspace(&end, &nonce);
    end.assert_status(POWERED_OFF);
}

/// rvmm refuses a memory that cannot hold the guest, and names one that does: that one boots.
#[test]
fn in_the_size_that_rvmm_names() {
    let nonce = nonce();
    let Some(vm) = boot(linux(&nonce, "poweroff").args(["--mem", "1K"])) else {
        return;
    };
    let line = vm
        .finish()
        .assert_refused(HOST_FAILED, &["too small", "at least --mem"]);
    let size = line
        .split(|c: char| !c.is_ascii_alphanumeric())
        .rfind(|word| {
            let digits = word.trim_end_matches(['K', 'M', 'G']);
            *word != "1K"
                && digits.len() + 1 == word.len()
                && digits.bytes().all(|b| b.is_ascii_digit())
        })
        .unwrap_or_else(|| panic!("{line:?} names no size"));
    let Some(vm) = boot(linux(&nonce, "poweroff").args(["--mem", size])) else {
        return;
    };
    let end = vm.finish();
    assert_userspace(&end, &nonce);
    end.assert_status(POWERED_OFF);
}
