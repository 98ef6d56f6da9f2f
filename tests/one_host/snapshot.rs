//! Snapshots: time, clones, changes, and what cannot be restored.
#![cfg(target_arch = "riscv64")]

mod errors;

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::disk::{MIB, disk};
use crate::common::freezing::*;
use crate::common::net::Tap;
use crate::common::{HOST_FAILED, POWERED_OFF, Rvmm, Shell};

/// Frozen and thawed again and again: each snapshot is of a restored machine.
#[test]
fn a_restored_guest_can_be_frozen_and_reset() {
    let freezer = Freezer::new();
    let rvmm = Rvmm::linux()
        .arg("--cmdline")
        .arg(CMDLINE)
        .args(["--cpus", "2"]);
    let mut guest = Shell::of(rvmm.args(freezer.ctl("ctl")));
    start_counting(&mut guest);
    for round in 0..4 {
        let before = count(&mut guest);
        let flags: &[&str] = if round % 2 == 0 { &[] } else { &["--live"] };
        freezer.freeze("ctl", "snap", flags);
        kill(guest.vm);
        guest = Shell::restored(freezer.thaw("snap").args(freezer.ctl("ctl")).spawn());
        assert!(count(&mut guest) >= before);
        kernel_is_content(&mut guest);
    }
    kill(guest.vm);
    let mut guest = Shell::restored(freezer.thaw("snap").reboots().spawn());
    guest.vm.send("exec reboot -f\n");
    guest.restarted();
    assert!(!guest.ok("dmesg").contains(RESEEDED), "it is a new kernel");
    guest.power_off();
}

/// Seconds since the guest's kernel started, by CLOCK_MONOTONIC.
fn uptime(guest: &mut Shell) -> f64 {
    let text = guest.ok("cut -d' ' -f1 /proc/uptime");
    text.parse().expect("a number")
}

#[test]
fn time_stops_or_jumps() {
    const PAUSE: Duration = Duration::from_secs(4);
    let freezer = Freezer::new();
    let rvmm = Rvmm::linux().arg("--cmdline").arg(CMDLINE);
    let mut guest = Shell::of(rvmm.args(freezer.ctl("ctl")));
    let socket = text(&freezer.path("ctl"));
    for clock in ["stop", "jump"] {
        let (began, before) = (Instant::now(), uptime(&mut guest));
        printed(["ctl", &socket, "pause"]);
        sleep(PAUSE);
        printed(["ctl", &socket, "resume", "--clock", clock]);
        let passed = uptime(&mut guest) - before;
        let really = began.elapsed().as_secs_f64();
        match clock {
            // The guest's clock shows hundredths of a second.
            "stop" => assert!(
                passed <= really - PAUSE.as_secs_f64() + 0.02,
                "{passed} of {really}"
            ),
            _ => assert!(passed + 0.02 >= PAUSE.as_secs_f64(), "{passed}"),
        }
        // The same for a snapshot.
        let (began, before) = (Instant::now(), uptime(&mut guest));
        freezer.freeze("ctl", "snap", &[]);
        kill(guest.vm);
        sleep(PAUSE);
        let rvmm = freezer.thaw("snap").args(["--clock", clock]);
        guest = Shell::restored(rvmm.args(freezer.ctl("ctl")).spawn());
        let passed = uptime(&mut guest) - before;
        let really = began.elapsed().as_secs_f64();
        match clock {
            "stop" => assert!(
                passed <= really - PAUSE.as_secs_f64() + 0.02,
                "{passed} of {really}"
            ),
            _ => assert!(passed + 0.02 >= PAUSE.as_secs_f64(), "{passed}"),
        }
    }
    kernel_is_content(&mut guest);
    guest.power_off();
}

/// Two clones without virtio-rng.
#[test]
fn clones_differ() {
    let (freezer, tap) = (Freezer::new(), Tap::new(false));
    let net = format!("tap={}", tap.name);
    let rvmm = Rvmm::virtio(CMDLINE)
        .args(["--net", &net])
        .args(freezer.ctl("ctl"));
    let mut guest = Shell::of(rvmm);
    guest.ok("head -c 16 /dev/urandom >/tmp/before");
    freezer.freeze("ctl", "snap", &[]);
    kill(guest.vm);
    let mut seen = Vec::new();
    for mac in ["52:54:00:00:00:01", "52:54:00:00:00:02"] {
        let net = format!("{net},mac={mac}");
        let mut clone = Shell::restored(freezer.thaw("snap").args(["--net", &net]).spawn());
        let random = clone.ok("head -c 16 /dev/urandom | md5sum");
        assert!(clone.ok("dmesg").contains(RESEEDED));
        let before = clone.ok("md5sum </tmp/before");
        // The driver reads the address again when it is bound again.
        clone.ok("d=$(basename $(readlink /sys/class/net/eth0/device)); \
             cd /sys/bus/virtio/drivers/virtio_net; echo $d >unbind; echo $d >bind; cd /");
        assert_eq!(clone.ok("cat /sys/class/net/eth0/address"), mac);
        kill(clone.vm);
        seen.push((random, before));
    }
    assert_ne!(seen[0].0, seen[1].0, "their random numbers");
    assert_eq!(seen[0].1, seen[1].1, "their past");
}

/// Merges `base` and the three changes after it to `whole`.
fn merge(freezer: &Freezer) {
    let of = |name: &str| text(&freezer.path(name));
    let part = refused(["restore", &of("two")]);
    assert!(
        part[0].contains("it has only changes: make it whole"),
        "{part:?}"
    );
    let (base, one, two, three) = (of("base"), of("one"), of("two"), of("three"));
    let order = refused(["snapshot", "merge", &base, &two, "--into", &of("bad")]);
    assert!(order[0].contains("give them in their order"), "{order:?}");
    assert!(!freezer.path("bad").exists());
    let into = of("whole");
    printed([
        "snapshot", "merge", &base, &one, &two, &three, "--into", &into,
    ]);
    let verified = printed(["snapshot", "verify", &into]);
    assert!(
        verified.starts_with("the snapshot is whole: "),
        "{verified}"
    );
    let size = |name: &str| {
        let shown = printed(["snapshot", "show", "--json", &of(name)]);
        let shown: Value = serde_json::from_str(&shown).expect("JSON");
        shown["memory"].as_u64().expect("a number")
    };
    assert!(
        size("three") < size("base") / 4,
        "{} of {}",
        size("three"),
        size("base")
    );
}

/// A page of the guest that has become zero, a disk that is read and written, a disk with an
/// overlay, and pages that only rvmm writes.
#[test]
fn changes_make_a_whole() {
    let freezer = Freezer::new();
    let image = freezer.scratch.file("image", vec![7; 4 * MIB]);
    let base = freezer.scratch.file("base.img", vec![7; 4 * MIB]);
    let [flag, value] = disk(&image, "");
    let rvmm = Rvmm::virtio(CMDLINE)
        .args([&flag, &value])
        .args(disk(&base, ",snapshot=on"))
        .args(freezer.ctl("ctl"));
    let mut guest = Shell::of(rvmm);
    start_counting(&mut guest);
    guest.ok("dd if=/dev/urandom of=/tmp/data bs=1M count=2 2>/dev/null");
    let early = refused([
        "ctl",
        &text(&freezer.path("ctl")),
        "snapshot",
        &text(&freezer.path("x")),
        "--diff",
    ]);
    assert_eq!(
        early,
        ["rvmm: there is no snapshot to compare with: take one with --track before"]
    );
    freezer.freeze("ctl", "base", &["--track"]);
    guest.ok("dd if=/dev/zero of=/tmp/data bs=1M count=1 conv=notrunc 2>/dev/null");
    freezer.freeze("ctl", "one", &["--diff"]);
    // What is refused does not end the chain.
    for name in ["base", "one"] {
        let (socket, there) = (text(&freezer.path("ctl")), text(&freezer.path(name)));
        let twice = refused(["ctl", &socket, "snapshot", &there, "--diff"]);
        assert!(twice[0].contains("is there already"), "{twice:?}");
    }
    guest.ok("echo overlay | dd of=/dev/vdb conv=fsync,notrunc 2>/dev/null");
    guest.ok("dd if=/dev/vda of=/tmp/disk bs=1M iflag=direct 2>/dev/null");
    freezer.freeze("ctl", "two", &["--diff"]);
    guest.ok("echo last >/tmp/last");
    freezer.freeze("ctl", "three", &["--diff"]);
    guest.ok("echo 3 >/proc/sys/vm/drop_caches");
    let sums = guest.ok("md5sum /tmp/data /tmp/disk /tmp/last /dev/vdb");
    let before = count(&mut guest);
    kill(guest.vm);

    merge(&freezer);
    let mut guest = Shell::restored(freezer.thaw("whole").spawn());
    guest.ok("echo 3 >/proc/sys/vm/drop_caches");
    assert_eq!(
        guest.ok("md5sum /tmp/data /tmp/disk /tmp/last /dev/vdb"),
        sums
    );
    let after = count(&mut guest);
    assert!(
        after > 0 && after.abs_diff(before) < before.max(1000),
        "{after}, {before}"
    );
    kernel_is_content(&mut guest);
    guest.power_off().assert_status(POWERED_OFF);
}

/// The original and two clones of it, each with a disk of its own.
#[test]
fn a_fork_has_its_own_disks() {
    let freezer = Freezer::new();
    let image = freezer.scratch.file("image", vec![7; 4 * MIB]);
    let [flag, value] = disk(&image, "");
    let rvmm = Rvmm::virtio(CMDLINE)
        .args([&flag, &value])
        .args(freezer.ctl("ctl"));
    let mut guest = Shell::of(rvmm);
    guest.ok("echo shared | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null");
    start_counting(&mut guest);
    let (socket, dir) = (text(&freezer.path("ctl")), text(&freezer.path("clones")));
    let said = printed([
        "ctl",
        &socket,
        "fork",
        "2",
        "--dir",
        &dir,
        "--console",
        "pty",
    ]);
    assert_eq!(said.lines().count(), 3, "{said}");
    guest.ok("echo parent | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null");
    for number in 1..=2 {
        let socket = format!("{dir}/{number}/ctl");
        let status = printed(["ctl", &socket, "status", "--json"]);
        let status: Value = serde_json::from_str(&status).expect("JSON");
        assert_eq!(status["state"], "running");
        printed(["ctl", &socket, "stop"]);
    }
    let copy = fs::read(format!("{dir}/snapshot/disk-disk0")).expect("the copy");
    assert!(
        copy.starts_with(b"shared\n"),
        "the copy is of the moment of the fork"
    );
    assert_eq!(copy.len(), 4 * MIB);
    guest.power_off();
    assert!(
        fs::read(&image)
            .expect("the image")
            .starts_with(b"parent\n")
    );
}

/// The copy of its disk has moved, and belongs to the restored guest.
#[test]
fn a_restored_guest_gets_another_disk() {
    let freezer = Freezer::new();
    let image = freezer.scratch.file("image", vec![7; 4 * MIB]);
    let [flag, value] = disk(&image, ",id=data");
    let rvmm = Rvmm::virtio(CMDLINE).args([&flag, &value]);
    let mut guest = Shell::of(rvmm.args(freezer.ctl("ctl")));
    guest.ok("echo before | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null");
    freezer.freeze("ctl", "snap", &["--disks"]);
    guest.ok("echo after_ | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null");
    guest.power_off();
    let other = freezer.path("other");
    fs::rename(freezer.path("snap/disk-data"), &other).expect("the copy");
    let thaw = |disk: &str| freezer.thaw("snap").args(["--disk", disk]);
    let wrong = thaw(&format!("path={},id=dat", other.display())).run();
    wrong.assert_refused(HOST_FAILED, &["dat"]);
    let mut guest = Shell::restored(thaw(&format!("path={},id=data", other.display())).spawn());
    let first = "dd if=/dev/vda bs=4096 count=1 iflag=direct 2>/dev/null | head -n 1";
    assert_eq!(guest.ok(first), "before");
    guest.ok("echo latest | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null");
    kernel_is_content(&mut guest);
    guest.power_off();
    for (path, line) in [(&image, "after_\n"), (&other, "latest\n")] {
        assert!(
            fs::read(path).expect("a disk").starts_with(line.as_bytes()),
            "{line}"
        );
    }
}
