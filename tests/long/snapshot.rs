//! Snapshots by the hundred, under load, and a snapshot that is killed at any moment.
#![cfg(target_arch = "riscv64")]

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::common::disk::{MIB, disk, md5};
use crate::common::files::{debian, rvmm};
use crate::common::freezing::*;
use crate::common::net::{Tap, transfer};
use crate::common::pausing::wait_for_work;
use crate::common::{POWERED_OFF, Rvmm, Shell};

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
         printf %08d $n | dd of=/dev/vda bs=4096 seek=$at conv=notrunc oflag=direct,sync \
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

/// A Debian with four vCPUs, in the middle of fio with verification and of a TCP stream.
fn debian_goes_on(transport: &str) {
    let (freezer, tap) = (Freezer::new(), Tap::new(true));
    let image = freezer.scratch.file("data", vec![0; 32 * MIB]);
    let root = format!("{},snapshot=on", debian().display());
    let data = format!("{},id=data", image.display());
    let net = format!("tap={}", tap.name);
    let mut vm = Rvmm::virtio("console=ttyS0 quiet panic=-1 root=/dev/vda")
        .args(["--mem", "512M", "--cpus", "4", "--transport", transport])
        .args(["--disk", &root, "--disk", &data, "--net", &net])
        .args(freezer.ctl("ctl"))
        .spawn();
    vm.allow_seconds(900);
    vm.wait_for("rvmm-debian login: ");
    vm.send("root\n");
    vm.wait_for(":~# ");
    let guest = format!("{}/24", tap.address(2));
    vm.send(format!(
        "ip addr add {guest} dev eth0; ip link set eth0 up; \
         (i=0; while :; do i=$((i+1)); echo $i >/run/count; done) & \
         fio --name=mix --filename=/dev/vdb --direct=1 --rw=randwrite \
         --bssplit=512/10:4k/40:16k/30:64k/20 --size=8M --offset_increment=8M --numjobs=4 \
         --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --fsync=64 \
         --group_reporting >/run/fio; echo \"fio ended with $?\"\n"
    ));
    wait_for_work(vm.pid(), 3_000_000_000);
    freezer.freeze("ctl", "snap", &[]);
    let ended = vm.console().contains("fio ended");
    kill(vm);
    assert!(!ended, "fio had ended before");

    let mut vm = freezer.thaw("snap").spawn();
    vm.allow_seconds(900);
    vm.wait_for("fio ended with 0\r");
    vm.send(
        "grep -c 'err= 0' /run/fio; cat /run/count; sleep 1; cat /run/count; dmesg -l err,warn\n",
    );
    vm.send("md5sum </dev/vdb | sed 's/ .*/ is the sum/'\n");
    vm.wait_for(" is the sum\r");
    let console = vm.console();
    for bad in [
        "WARNING:",
        "BUG:",
        "Oops",
        "rcu: INFO",
        "soft lockup",
        "I/O error",
    ] {
        assert!(!console.contains(bad), "{bad}");
    }
    vm.send("poweroff -f\n");
    vm.finish().assert_status(POWERED_OFF);
    let sum = md5(&image);
    assert!(console.contains(&format!("{sum} is the sum")), "{sum}");
}

#[test]
fn debian_goes_on_over_pci() {
    debian_goes_on("pci");
}

#[test]
fn debian_goes_on_over_mmio() {
    debian_goes_on("mmio");
}

/// A guest whose network vhost serves. While changes are tracked, rvmm serves it.
#[test]
fn changes_under_load_with_vhost() {
    let (freezer, tap) = (Freezer::new(), Tap::new(false));
    let image = freezer.scratch.file("image", vec![3; 8 * MIB]);
    let [flag, value] = disk(&image, "");
    let net = format!("tap={},vhost", tap.name);
    let rvmm = Rvmm::virtio(CMDLINE).args([&flag, &value, "--net", &net, "--cpus", "2"]);
    let mut guest = Shell::of(rvmm.args(freezer.ctl("ctl")));
    guest.vm.allow_seconds(600);
    tap.configure(&mut guest);
    start_counting(&mut guest);
    guest.ok("(while :; do dd if=/dev/vda of=/tmp/read bs=64k iflag=direct 2>/dev/null; done) &");
    guest.ok(
        "(while :; do dd if=/dev/urandom of=/tmp/page bs=4k count=64 2>/dev/null; \
              dd if=/dev/zero of=/tmp/page bs=4k count=64 conv=notrunc 2>/dev/null; done) &",
    );
    let mut dirs = Vec::new();
    for (name, how) in [
        ("base", "--track"),
        ("one", "--diff"),
        ("two", "--diff"),
        ("three", "--diff"),
    ] {
        transfer(&tap, &mut guest, 2);
        freezer.freeze("ctl", name, &[how]);
        dirs.push(text(&freezer.path(name)));
    }
    let (before, sum) = (count(&mut guest), guest.ok("md5sum </dev/vda"));
    kill(guest.vm);
    let into = text(&freezer.path("whole"));
    let words = ["snapshot", "merge"]
        .map(String::from)
        .into_iter()
        .chain(dirs);
    printed(words.chain(["--into".into(), into]));
    let mut guest = Shell::restored(freezer.thaw("whole").spawn());
    guest.vm.allow_seconds(600);
    assert!(count(&mut guest) > 0 && before > 0);
    assert_eq!(guest.ok("md5sum </dev/vda"), sum);
    transfer(&tap, &mut guest, 2);
    kernel_is_content(&mut guest);
    guest.power_off();
}
