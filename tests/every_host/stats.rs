//! `--stats`: rvmm's and KVM's counts match what the guest did.
#![cfg(target_arch = "riscv64")]

use crate::common::files::TempDir;
use crate::common::{POWERED_OFF, Rvmm};
use serde_json::Value;

/// `exits.S` does each of its four actions so often.
const EACH: u64 = 10_100;

fn count(stats: &Value, kind: &str) -> u64 {
    let exits = stats["vcpus"][0]["exits"].as_array().expect("exits");
    let exit = exits.iter().find(|exit| exit["kind"] == kind);
    let exit = exit.unwrap_or_else(|| panic!("no {kind} in {stats:#}"));
    exit["count"].as_u64().expect("a number")
}

#[test]
fn json_has_every_exit() {
    let scratch = TempDir::new();
    let path = scratch.path().join("stats.json");
    let end = Rvmm::guest("exits")
        .arg(format!("--stats={}", path.display()))
        .run();
    end.assert_status(POWERED_OFF);
    assert_eq!(end.console.lines().count(), 4, "{}", end.console);
    let text = std::fs::read_to_string(&path).expect("the statistics");
    let stats: Value = serde_json::from_str(&text).expect("JSON");
    let (read, write) = ("MMIO read 0x10000007", "MMIO write 0x10000007");
    assert_eq!(count(&stats, read), EACH);
    assert_eq!(count(&stats, write), EACH);
    assert_eq!(count(&stats, "SBI DBCN 0"), EACH);
    assert_eq!(count(&stats, "the end"), 1);
    let exits = stats["vcpus"][0]["exits"].as_array().expect("exits");
    let uart = exits.iter().find(|exit| exit["kind"] == read);
    assert_eq!(uart.expect("the read")["device"], "UART");

    // KVM counted the same exits, and also the calls that it served itself.
    let mmio = exits
        .iter()
        .filter(|e| e["kind"].as_str().is_some_and(|k| k.starts_with("MMIO")));
    let mmio: u64 = mmio.filter_map(|exit| exit["count"].as_u64()).sum();
    let kvm = &stats["vcpus"][0]["kvm"];
    assert_eq!(kvm["mmio_exit_user"], mmio);
    assert!(kvm["exits"].as_u64() >= Some(4 * EACH), "{kvm}");
    assert!(stats["run_ns"].as_u64() > Some(0));
}

#[test]
fn text_goes_to_standard_error() {
    let end = Rvmm::guest("firstbyte").arg("--stats").run();
    end.assert_status(POWERED_OFF);
    assert_eq!(end.console, "!");
    for part in [
        "time: ",
        "vCPU 0, counted by KVM:",
        "MMIO write 0x10000000 (UART)",
    ] {
        assert!(end.log.contains(part), "{part}: {}", end.log);
    }
}

#[test]
fn a_file_that_cannot_be_written_is_told() {
    let end = Rvmm::guest("shutdown").arg("--stats=/nope/stats").run();
    end.assert_status(crate::common::HOST_FAILED);
    let last = end.log.lines().last().expect("a line");
    assert!(last.starts_with("rvmm: Failed to write statistics \"/nope/stats\": No such file"));
}
