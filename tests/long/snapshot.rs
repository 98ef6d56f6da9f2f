//! Snapshots by the hundred, under load, and a snapshot that is killed at any moment.
#![cfg(target_arch = "riscv64")]

mod changes;
mod clocks;
mod debian;

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::common::disk::{MIB, disk};
use crate::common::files::rvmm;
use crate::common::freezing::*;
use crate::common::pausing::wait_for_work;
use crate::common::{Rvmm, Shell};

/// Nanoseconds that the vCPUs run between two snapshots.
const WORK: u64 = 300_000_000;

#[test]
fn linux_goes_on_over_mmio() {
    linux_goes_on("mmio");
}

/// Two vCPUs and a disk are busy, and each round is a process of its own.
#[test]
fn a_hundred_rounds_under_load() {
    let freezer = Freezer::new();
    let image = freezer.scratch.file("image", vec![0; 8 * MIB]);
    let [flag, value] = disk(&image, "");
    let rvmm = Rvmm::virtio(CMDLINE).args([&flag, &value, "--cpus", "2"]);
    let mut guest = Shell::of(rvmm.args(freezer.ctl("ctl")));
    guest.vm.allow_seconds(600);
    // Writes blocks with their number, reads each back, and ends when one is wrong.
    guest.ok("echo 'n=0; while :; do n=$((n+1)); at=$((n % 1000)); \
         printf %08d $n | dd of=/dev/vda bs=4096 seek=$at conv=notrunc,sync oflag=direct \
         2>/dev/null; \
         back=$(dd if=/dev/vda bs=4096 skip=$at count=1 iflag=direct 2>/dev/null | head -c 8); \
         [ \"$back\" = $(printf %08d $n) ] || { echo \"$n: $back\" >/tmp/wrong; exit; }; \
         echo $n >/tmp/blocks; done' >/tmp/load; sh /tmp/load & true");
    start_counting(&mut guest);
    let mut before = 0;
    for round in 0..100 {
        let seen = count(&mut guest);
        assert!(seen >= before, "round {round}: {seen} after {before}");
        before = seen;
        guest.ok("test ! -e /tmp/wrong");
        wait_for_work(guest.vm.pid(), WORK);
        freezer.freeze("ctl", "snap", &[]);
        kill(guest.vm);
        guest = Shell::restored(freezer.thaw("snap").args(freezer.ctl("ctl")).spawn());
        guest.vm.allow_seconds(300);
    }
    let blocks: u64 = guest.ok("cat /tmp/blocks").parse().expect("a number");
    assert!(blocks > 10, "the disk was hardly used: {blocks} blocks");
    guest.ok("test ! -e /tmp/wrong");
    kernel_is_content(&mut guest);
    guest.power_off();
}

/// The moments are spread over the whole time that a snapshot takes. An earlier snapshot stays as
/// it was, or there is a whole new one.
#[test]
fn a_killed_snapshot_is_whole_or_absent() {
    let freezer = Freezer::new();
    let (snap, fresh) = (text(&freezer.path("snap")), text(&freezer.path("fresh")));
    let mut whole = 0;
    let (mut time, mut round) = (Duration::ZERO, 0u32);
    const ROUNDS: u32 = 200;
    while round < ROUNDS {
        let vm = Rvmm::guest("echo").args(freezer.ctl("ctl")).spawn();
        vm.wait_for("ready");
        if round == 0 {
            let began = Instant::now();
            freezer.freeze("ctl", "snap", &[]);
            time = began.elapsed();
        }
        // Every second one has no earlier snapshot.
        let dir = if round % 2 == 0 { &snap } else { &fresh };
        let _ = fs::remove_dir_all(&fresh);
        let client = Command::new(rvmm())
            .args(["ctl", &text(&freezer.path("ctl")), "snapshot", dir])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        // Up to a little more than a snapshot takes, so that some are complete.
        sleep(time * round * 5 / (ROUNDS * 4));
        kill(vm);
        client.expect("a client").wait().expect("its end");
        let verified = |dir: &str| {
            let done = rvmm_with(["snapshot", "verify", dir]);
            done.status.success()
        };
        assert!(
            verified(&snap),
            "round {round}: the earlier snapshot is damaged"
        );
        if fs::exists(&fresh).expect("ask") {
            whole += 1;
            assert!(
                verified(&fresh),
                "round {round}: half a snapshot has its name"
            );
        }
        round += 1;
    }
    assert!(
        (1..ROUNDS / 2).contains(&whole),
        "{whole} of {} were complete",
        ROUNDS / 2
    );
    let mut vm = freezer.thaw("snap").spawn();
    vm.send("on\n");
    vm.wait_for("got on");
    // What the killed ones left is gone after the next one.
    let vm = Rvmm::guest("echo").args(freezer.ctl("ctl")).spawn();
    vm.wait_for("ready");
    for name in ["snap", "fresh"] {
        freezer.freeze("ctl", name, &[]);
    }
    let names = fs::read_dir(freezer.scratch.path()).expect("the directory");
    let names = names.map(|entry| entry.expect("an entry").file_name());
    let left: Vec<_> = names
        .filter(|name| name.to_string_lossy().contains("unfinished"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
