//! `--trace` and `rvmm trace`.
#![cfg(target_arch = "riscv64")]

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::files::{TempDir, rvmm};
use crate::common::{HOST_FAILED, POWERED_OFF, Rvmm, Shell};

/// The output of `rvmm trace`, which must succeed.
#[track_caller]
fn printed(file: &Path, flags: &[&str]) -> String {
    let mut command = Command::new(rvmm());
    let output = command.arg("trace").arg(file).args(flags).output();
    let output = output.expect("run rvmm trace");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{flags:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The lines before the summary.
fn events(text: &str) -> Vec<&str> {
    text.lines().take_while(|line| !line.is_empty()).collect()
}

/// Linux with a disk: the trace has what the statistics have, and the disk's requests.
#[test]
fn a_boot_of_linux() {
    const BLOCKS: usize = 8;
    let scratch = TempDir::new();
    let disk = scratch.file("disk", vec![7; 1 << 20]).display().to_string();
    let (trace, stats) = (scratch.path().join("trace"), scratch.path().join("stats"));
    let mut shell = Shell::start([
        "--disk".to_owned(),
        format!("{disk},id=data"),
        format!("--trace={}", trace.display()),
        format!("--stats={}", stats.display()),
    ]);
    shell.ok(&format!(
        "dd if=/dev/vda of=/dev/null bs=4k count={BLOCKS} iflag=direct"
    ));
    shell.power_off();

    // The format of Perfetto and Chrome.
    let text = std::fs::read_to_string(&trace).expect("the trace");
    let json: Value = serde_json::from_str(&text).expect("JSON");
    let all = json.as_array().expect("an array");
    let spans: Vec<&Value> = all.iter().filter(|event| event["ph"] == "X").collect();
    let end = all.last().expect("an end");
    assert_eq!(end["args"]["dropped"], 0, "{end}");
    let reads = spans.iter().filter(|event| event["name"] == "request read");
    let direct = reads.filter(|event| event["args"]["bytes"] == 4096).count();
    assert!(direct >= BLOCKS, "{direct} reads of 4 KiB");

    // Each exit is in both, with the same time.
    let stats = std::fs::read_to_string(&stats).expect("the statistics");
    let stats: Value = serde_json::from_str(&stats).expect("JSON");
    let counted = stats["vcpus"][0]["exits"].as_array().expect("exits");
    let sum = |key: &str| {
        counted
            .iter()
            .filter_map(|exit| exit[key].as_u64())
            .sum::<u64>()
    };
    let exits: Vec<f64> = spans
        .iter()
        .filter(|event| event["cat"] == "exit")
        .map(|event| event["dur"].as_f64().expect("a time"))
        .collect();
    assert_eq!(exits.len() as u64, sum("count"));
    let (traced, counted) = (exits.iter().sum::<f64>() * 1e3, sum("time_ns") as f64);
    assert!(
        (traced - counted).abs() < counted / 1e3,
        "{traced} and {counted} ns"
    );

    // As text.
    let first = printed(&trace, &["--vcpu", "0"]);
    assert!(
        first.contains(" vcpu-0 ") && first.contains(" us  "),
        "{first}"
    );
    let slowest = printed(&trace, &["--slowest", "3"]);
    assert_eq!(events(&slowest).len(), 3, "{slowest}");
    let requests = printed(&trace, &["--kind", "request"]);
    assert!(requests.contains(" data.0 "), "{requests}");
    assert!(!requests.contains("MMIO"), "{requests}");
    let summary = printed(&trace, &["--summary"]);
    assert!(summary.starts_with("events "), "{summary}");
    assert!(summary.contains("\nrequest read "), "{summary}");
}

/// A guest that causes exits without an end fills the file, and no more.
#[test]
fn a_trace_has_a_largest_size() {
    const LIMIT: u64 = 64 << 10;
    let scratch = TempDir::new();
    let trace = scratch.path().join("trace");
    let end = Rvmm::guest("exits")
        .arg(format!("--trace={},limit=64K", trace.display()))
        .run();
    end.assert_status(POWERED_OFF);
    let size = std::fs::metadata(&trace).expect("the trace").len();
    assert!(size <= LIMIT && size > LIMIT / 2, "{size}");
    let text = printed(&trace, &["--summary"]);
    assert!(text.contains(" events were dropped"), "{text}");
    assert!(end.log.contains("lacks"), "{}", end.log);
}

#[test]
fn another_file_is_not_overwritten() {
    let scratch = TempDir::new();
    let other = scratch.file("other", "a letter\n");
    let end = Rvmm::guest("shutdown").arg("--trace").arg(&other).run();
    end.assert_status(HOST_FAILED);
    assert!(
        end.log.contains("the file has other content"),
        "{}",
        end.log
    );
    assert_eq!(std::fs::read(&other).expect("the file"), b"a letter\n");
    let mut command = Command::new(rvmm());
    let output = command
        .arg("trace")
        .arg(&other)
        .output()
        .expect("run rvmm trace");
    assert_eq!(output.status.code(), Some(HOST_FAILED));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("it is no trace of rvmm"), "{error}");
}
