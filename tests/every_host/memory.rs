//! What backs guest RAM.
#![cfg(target_arch = "riscv64")]

use crate::common::{HOST_FAILED, POWERED_OFF, Rvmm, USAGE};

const RESERVED: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Reserves huge pages. Dropped, it restores the number from before.
struct HugePages(String);

impl HugePages {
    fn reserve(count: u64) -> Self {
        let before = std::fs::read_to_string(RESERVED).expect("a host with hugetlb");
        std::fs::write(RESERVED, count.to_string()).expect("root reserves huge pages");
        let got = std::fs::read_to_string(RESERVED).expect("the number of pages");
        assert_eq!(got.trim(), count.to_string(), "the host has the memory");
        Self(before)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(RESERVED, self.0.trim());
    }
}

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
