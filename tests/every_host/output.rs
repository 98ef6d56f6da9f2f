//! More output than anybody keeps: 100 MiB through DBCN, to a file, to a reader that leaves, and to
//! a reader that sleeps.
#![cfg(target_arch = "riscv64")]

use crate::common::{GUEST_FAILED, POWERED_OFF, Rvmm};

const TORRENT: usize = 100 << 20;
const LAST: &str = "torrent: done\n";
/// The limit for rvmm's resident memory, in KiB: the guest's 16 MiB and rvmm itself, but not the
/// output.
const PEAK_KIB: u64 = (16 + 8) << 10;

fn torrent() -> Rvmm {
    Rvmm::guest("torrent").args(["--mem", "16M"])
}

#[test]
fn a_torrent_into_a_file_is_complete() {
    let path = std::env::temp_dir().join(format!("rvmm-torrent-{}", std::process::id()));
    let console = format!("file={}", path.display());
    let end = torrent().arg("--console").arg(console).run();
    let file = std::fs::read(&path).expect("the console's file");
    std::fs::remove_file(&path).expect("remove it");
    assert_eq!(file.len(), TORRENT + LAST.len());
    assert!(file.ends_with(LAST.as_bytes()));
    assert!(end.console.is_empty());
    end.assert_status(POWERED_OFF);
}

#[test]
fn a_torrent_whose_reader_leaves_runs_to_its_end() {
    let mut vm = torrent().console_unread().spawn();
    vm.wait_for_unread(1000);
    vm.close_console();
    vm.finish().assert_status(POWERED_OFF);
}

/// The guest's clock goes on while nobody reads, and the guest gives up after three seconds. What
/// rvmm has accepted is there for a reader that wakes up later.
#[test]
fn a_torrent_nobody_reads_blocks_no_vcpu_and_fills_no_memory() {
    let mut vm = torrent().console_unread().spawn();
    vm.wait_for_log("reported a failure");
    let peak = vm.peak_rss_kib();
    assert!(peak <= PEAK_KIB, "{peak} KiB resident");
    vm.read_console();
    let end = vm.finish();
    assert!(
        (64 << 10..TORRENT).contains(&end.console.len()),
        "{} bytes came",
        end.console.len()
    );
    end.assert_status(GUEST_FAILED);
}
