//! What backs guest RAM.
#![cfg(target_arch = "riscv64")]

use crate::common::hugepages::HugePages;
use crate::common::{HOST_FAILED, POWERED_OFF, Rvmm, USAGE};

/// One case for all of this, because huge pages belong to the whole host.
#[test]
fn ram_in_huge_pages() {
    let pages = HugePages::reserve(16);
    let vm = Rvmm::guest("idle")
        .args(["--mem", "32M,hugepages=2M"])
        .spawn();
    vm.wait_for("idle\n");
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", vm.pid())).expect("smaps");
    assert!(smaps.contains("KernelPageSize:     2048 kB"), "{smaps}");
    // This guest has all 16.
    let two = Rvmm::guest("shutdown")
        .args(["--mem", "4M,hugepages=2M"])
        .run();
    two.assert_one_line(HOST_FAILED, &["huge pages of 2 MiB", "nr_hugepages"]);
    vm.terminate();
    vm.finish();
    let end = Rvmm::guest("firstbyte")
        .args(["--mem", "32M,hugepages=2M"])
        .run();
    end.assert_status(POWERED_OFF);
    assert_eq!(end.console, "!");
    drop(pages);
}

#[test]
fn wrong_sizes_are_told() {
    let end = Rvmm::guest("shutdown")
        .args(["--mem", "33M,hugepages=2M"])
        .run();
    end.assert_one_line(USAGE, &["33M,hugepages=2M", "multiple"]);
    let end = Rvmm::guest("shutdown")
        .args(["--mem", "32M,hugepages=3M"])
        .run();
    end.assert_one_line(USAGE, &["`3M`", "`2M`"]);
}
