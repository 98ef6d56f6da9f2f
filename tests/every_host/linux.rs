//! Linux as the guest: the kernel that the host itself runs, and our initramfs. Its init does what
//! the `rvmm.` words on the kernel's command line say. A nonce on the command line comes back in
//! the guest's answer, together with the ID of its SBI implementation (3: KVM). So the answer can
//! only come from this guest.
#![cfg(target_arch = "riscv64")]

use crate::common::host::{self, Kind};
use crate::common::{HOST_FAILED, Outcome, POWERED_OFF, RESET, Rvmm, TERMINATED, nonce};

/// Linux with this action, and a `nonce` that it prints.
fn linux(nonce: &str, action: &str) -> Rvmm {
    // A guest that panics ends at once, by a reset.
    let cmdline = format!("console=ttyS0 panic=-1 rvmm.nonce={nonce} rvmm.action={action}");
    Rvmm::linux().arg("--cmdline").arg(cmdline)
}

/// The guest reached userspace on hart 0 of KVM, and knows the nonce.
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
    let end = linux(&nonce, "poweroff").run();
    assert_userspace(&end, &nonce);
    end.assert_status(POWERED_OFF);
}

/// More vCPUs than the host has harts, all of them working at once.
#[test]
fn eight_cpus() {
    let nonce = nonce();
    let end = linux(&nonce, "smp")
        .args(["--cpus", "8", "--mem", "256M"])
        .run();
    assert!(end.console.contains("rvmm-guest: online 0-7"));
    assert!(end.console.contains("rvmm-guest: sums 8 different 1"));
    end.assert_status(POWERED_OFF);
}

#[test]
fn reboot_starts_it_again() {
    let nonce = nonce();
    let vm = linux(&nonce, "reboot").reboots().spawn();
    let banner = format!("rvmm-guest: userspace nonce={nonce}");
    vm.wait_for_times(&banner, 3);
    vm.terminate();
    vm.finish().assert_status(TERMINATED);
}

#[test]
fn reboot() {
    let nonce = nonce();
    let end = linux(&nonce, "reboot").run();
    assert_userspace(&end, &nonce);
    end.assert_status(RESET);
}

/// Without `--cmdline` the guest has a console, too.
#[test]
fn default_command_line() {
    let vm = Rvmm::linux().stdin_null().spawn();
    vm.wait_for("rvmm-guest: userspace nonce=none sbi-impl=3 hart=0");
}

/// A line typed at rvmm reaches a process in the guest, which answers. So the UART's receive
/// interrupt works.
#[test]
fn typed_input() {
    let nonce = nonce();
    let mut vm = linux(&nonce, "echo").spawn();
    vm.wait_for("rvmm-guest: ready");
    vm.send(format!("hello {nonce}\n"));
    vm.wait_for(&format!("rvmm-guest: got hello {nonce}"));
    vm.finish().assert_status(POWERED_OFF);
}

/// Not a byte is lost of input that is there before the guest's kernel starts.
#[test]
fn input_ahead_of_the_kernel() {
    let nonce = nonce();
    let mut vm = linux(&nonce, "echo").spawn();
    vm.send(format!("early {nonce}\n"));
    vm.close_stdin();
    vm.wait_for(&format!("rvmm-guest: got early {nonce}"));
    vm.finish().assert_status(POWERED_OFF);
}

/// The UART's interrupt arrives through the controller that fits the host. Its count rises with a
/// typed line, and again while the guest writes 4 KiB.
#[test]
fn uart_interrupts() {
    let controller = match host::kind() {
        Kind::Aia | Kind::AiaEmul => "APLIC-MSI",
        Kind::NoAia => "SiFive PLIC",
    };
    check_uart_interrupts(&[], controller);
}

/// The PLIC is rvmm's own, and exists on every host.
#[test]
fn uart_interrupts_by_plic() {
    check_uart_interrupts(&["--irqchip", "plic"], "SiFive PLIC");
}

/// On a host with an AIA, the guest can have it without the guest interrupt files.
#[test]
fn uart_interrupts_by_emulated_aia() {
    let flags = ["--irqchip", "aia-emul"];
    if host::kind() == Kind::NoAia {
        let end = linux(&nonce(), "irqs").args(flags).run();
        end.assert_refused(HOST_FAILED, &["AIA", "--irqchip plic"]);
    } else {
        check_uart_interrupts(&flags, "APLIC-MSI");
    }
}

#[track_caller]
fn check_uart_interrupts(flags: &[&str], controller: &str) {
    let nonce = nonce();
    let mut vm = linux(&nonce, "irqs").args(flags).spawn();
    vm.wait_for("rvmm-guest: ready");
    vm.send(format!("typed {nonce}\n"));
    let end = vm.finish();
    assert_userspace(&end, &nonce);
    assert!(
        end.console
            .contains(&format!("rvmm-guest: got typed {nonce}"))
    );
    let [before, typed, written] = [1, 2, 3].map(|n| row(&end.console, n, "ttyS0"));
    assert!(
        before.contains(controller),
        "{before:?} is not by the {controller}"
    );
    assert!(
        count(before) < count(typed),
        "{before:?} before a typed line, {typed:?} after"
    );
    assert!(
        count(typed) < count(written),
        "{typed:?} before 4 KiB of output, {written:?} after"
    );
    // Linux has a driver for the generation ID. A guest that was not restored gets no interrupt.
    let generation = row(&end.console, 3, "vmgenid");
    assert!(generation.contains(controller), "{generation:?}");
    assert_eq!(count(generation), 0, "{generation:?}");
    end.assert_status(POWERED_OFF);
}

/// The row of `device` in the n-th `/proc/interrupts` that the guest prints.
fn row<'a>(console: &'a str, n: u32, device: &str) -> &'a str {
    let begin = format!("rvmm-guest: irqs-begin {n}");
    let end = format!("rvmm-guest: irqs-end {n}");
    let mut lines = console
        .lines()
        .map(str::trim_end)
        .skip_while(|line| *line != begin);
    let mut lines = lines.by_ref().take_while(|line| *line != end);
    let row = lines.find(|line| line.ends_with(device));
    row.unwrap_or_else(|| panic!("no row for {device} behind {begin:?}"))
}

/// The number of interrupts in a row of `/proc/interrupts`: `10:`, one number for each CPU, then
/// names.
fn count(row: &str) -> u64 {
    row.split_whitespace()
        .skip(1)
        .map_while(|word| word.parse::<u64>().ok())
        .sum()
}

/// 64 MiB are too little for Debian's kernel: its map of memory sections alone takes 32 MiB.
#[test]
fn in_96_mib() {
    let nonce = nonce();
    let end = linux(&nonce, "poweroff").args(["--mem", "96M"]).run();
    assert_userspace(&end, &nonce);
    end.assert_status(POWERED_OFF);
}

/// rvmm refuses a memory size that cannot hold the guest, and names one that can. That one boots.
#[test]
fn in_the_size_that_rvmm_names() {
    let nonce = nonce();
    let vm = linux(&nonce, "poweroff").args(["--mem", "1K"]).spawn();
    let line = vm
        .finish()
        .assert_refused(HOST_FAILED, &["too small", "is enough"]);
    let size = line
        .split(|c: char| !c.is_ascii_alphanumeric())
        .rfind(|word| {
            let digits = word.trim_end_matches(['K', 'M', 'G']);
            *word != "1K"
                && digits.len() + 1 == word.len()
                && digits.bytes().all(|b| b.is_ascii_digit())
        })
        .unwrap_or_else(|| panic!("{line:?} names no size"));
    let end = linux(&nonce, "poweroff").args(["--mem", size]).run();
    assert_userspace(&end, &nonce);
    end.assert_status(POWERED_OFF);
}

/// Linux with much RAM that may use no more than `mem` of it. The initrd and the tree are low
/// enough.
#[track_caller]
fn check_mem_limit(mem: &str) {
    let nonce = nonce();
    let cmdline = format!("console=ttyS0 panic=-1 rvmm.nonce={nonce} mem={mem}");
    let end = Rvmm::linux()
        .args(["--mem", "512M", "--cmdline", &cmdline])
        .run();
    let limited = format!("Memory limited to {mem}B");
    assert!(end.console.contains(&limited), "no {limited:?}");
    assert_userspace(&end, &nonce);
    end.assert_status(POWERED_OFF);
}

#[test]
fn half_of_ram_by_mem() {
    check_mem_limit("256M");
}

/// No more than Linux needs: the initrd and the tree could not be higher.
#[test]
fn a_fifth_of_ram_by_mem() {
    check_mem_limit("96M");
}

/// Linux cuts off the end of the command line, and rvmm warns.
#[test]
fn a_command_line_longer_than_linux_keeps() {
    let nonce = nonce();
    let words = format!("console=ttyS0 panic=-1 rvmm.nonce={nonce} rvmm.action=poweroff rvmm.pad=");
    let cmdline = format!("{words}{}", "x".repeat(1100 - words.len()));
    let end = Rvmm::linux().args(["--cmdline", &cmdline]).run();
    assert_userspace(&end, &nonce);
    let warnings = end.log.lines().filter(|line| line.contains("--cmdline"));
    let warnings: Vec<&str> = warnings.collect();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    for word in ["1100 bytes", "Linux keeps 1023"] {
        assert!(warnings[0].contains(word), "{warnings:?} lacks {word:?}");
    }
    end.assert_status(POWERED_OFF);
}
