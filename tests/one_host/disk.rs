//! Disks, and what the host does to them while a guest runs. The kind of host makes no difference.
#![cfg(target_arch = "riscv64")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::common::disk::{MIB, disk, host_runs, md5, random};
use crate::common::files::TempDir;
use crate::common::{HOST_FAILED, Rvmm, Shell, TERMINATED, USAGE};

/// Two guests at once write all over the same image with `snapshot=on`, and it does not change.
#[test]
fn snapshots_share_an_image() {
    let scratch = TempDir::new();
    let image = scratch.file("base", random(4 * MIB));
    let before = md5(&image);
    let [flag, value] = disk(&image, ",snapshot=on");
    let place = format!("{value},snapshot-dir={}", scratch.path().display());
    let mut guests = [Shell::start([&flag, &value]), Shell::start([&flag, &place])];
    // This host has only RAM. Naming the directory avoids the warning.
    guests[0]
        .vm
        .wait_for_log("snapshot-dir=DIR chooses another place");
    let mut sums = Vec::new();
    for guest in &mut guests {
        assert_eq!(guest.ok("md5sum </dev/vda | cut -c1-32"), before);
        guest.ok("dd if=/dev/urandom of=/dev/vda bs=7k count=500 conv=notrunc,fsync 2>/dev/null");
        sums.push(guest.ok("echo 3 >/proc/sys/vm/drop_caches; md5sum </dev/vda | cut -c1-32"));
    }
    assert!(sums[0] != sums[1] && sums[0] != before && sums[1] != before);
    let [one, other] = guests.map(Shell::power_off);
    assert!(one.log.contains("fills the host's RAM"), "{}", one.log);
    assert!(!other.log.contains("fills the host's RAM"), "{}", other.log);
    assert_eq!(md5(&image), before);
}

/// The guest sees the kind of cache: with a write cache data is durable after a flush, without one
/// after each write.
#[test]
fn caches_are_told_to_the_guest() {
    let scratch = TempDir::new();
    let image = |name| scratch.file(name, vec![0; MIB]);
    let [f, a] = disk(&image("a"), "");
    let [_, b] = disk(&image("b"), ",cache=writethrough");
    let [_, c] = disk(&image("c"), ",cache=unsafe");
    let mut guest = Shell::start([&f, &a, &f, &b, &f, &c]);
    let caches = guest.ok("cat /sys/block/vd[abc]/queue/write_cache");
    assert_eq!(caches, "write back\nwrite through\nwrite back");
    for disk in ["vda", "vdb", "vdc"] {
        guest.ok(&format!(
            "dd if=/dev/urandom of=/dev/{disk} bs=64k count=8 conv=fsync 2>/dev/null"
        ));
    }
    guest.power_off();
}

/// The host loses data, and reports that only once. None of the writers that wait at the same time
/// may be told that its write is durable.
#[test]
fn what_is_acknowledged_is_not_lost() {
    const BLOCK: usize = 4096;
    let scratch = TempDir::new();
    let place = scratch.path().join("small");
    let (mount, backing) = (place.display(), place.join("backing"));
    let size = "mount -t tmpfs -o size=8M none";
    host_runs(&format!(
        "mkdir {mount} && {size} {mount} && truncate -s 64M {mount}/backing"
    ));
    let loops = format!("losetup -f && losetup $(losetup -f) {mount}/backing");
    let device = host_runs(&loops);
    let [flag, value] = disk(Path::new(&device), ",cache=writethrough");
    let mut guest = Shell::start([flag, value]);
    let write = "dd if=/tmp/x of=/dev/vda bs=4k count=1 oflag=direct conv=notrunc 2>/dev/null";
    guest.ok(&format!(
        "mkdir -p /tmp && yes | head -c {BLOCK} >/tmp/x && {write} seek=9999"
    ));
    // The host's file system is full from now on.
    host_runs(&format!(
        "dd if=/dev/zero of={mount}/rest bs=4k 2>/dev/null; true"
    ));
    let blocks = "for block in $(seq $first 4 199)";
    let four = "for first in 0 1 2 3";
    let acknowledged = guest.ok(&format!(
        "{four}; do ({blocks}; do {write} seek=$block && echo block $block; done) & done; wait"
    ));
    guest.vm.wait_for_log("Failed to write");
    let file = File::open(&backing).expect("the backing file");
    let lost = |block: u64| {
        let mut bytes = [0; BLOCK];
        file.read_exact_at(&mut bytes, block * BLOCK as u64)
            .expect("a block");
        !bytes.starts_with(b"y\ny\n")
    };
    assert!(!lost(9999), "there was room for this one");
    let blocks = acknowledged
        .lines()
        .filter_map(|line| line.strip_prefix("block "));
    let blocks: Vec<u64> = blocks
        .map(|block| block.parse().expect("a number"))
        .collect();
    let lost = blocks.iter().filter(|block| lost(**block)).count();
    assert_eq!(lost, 0, "of {} that were acknowledged", blocks.len());
    guest.power_off();
    drop(file);
    host_runs(&format!("losetup -d {device}; umount {mount}"));
}

/// The guest finds a partition table with O_DIRECT on the host, too.
#[test]
fn direct_is_the_same_disk() {
    const START: u8 = 8;
    const SECTORS: u16 = 4096;
    let scratch = TempDir::new();
    let mut content = random(4 * MIB);
    content[..512].fill(0);
    // The first entry of an MBR: a Linux partition, its first sector, its length.
    content[446 + 4] = 0x83;
    content[446 + 8] = START;
    content[446 + 12..][..2].copy_from_slice(&SECTORS.to_le_bytes());
    content[510..512].copy_from_slice(&[0x55, 0xaa]);
    let image = scratch.file("x", content);
    let [flag, value] = disk(&image, ",direct");
    let mut guest = Shell::start([flag, value]);
    let partition = guest.ok("cat /sys/block/vda/vda1/start /sys/block/vda/vda1/size");
    assert_eq!(partition, format!("{START}\n{SECTORS}"));
    assert_eq!(
        guest.ok("cat /sys/block/vda/queue/logical_block_size"),
        "512"
    );
    guest.ok(
        "dd if=/dev/urandom of=/dev/vda1 bs=512 count=99 seek=3 conv=notrunc,fsync 2>/dev/null",
    );
    let sum = guest.ok("echo 3 >/proc/sys/vm/drop_caches; md5sum </dev/vda | cut -c1-32");
    guest.power_off();
    assert_eq!(md5(&image), sum);
}

/// The image gets shorter while the guest runs. Accesses to the missing part are I/O errors; the
/// rest still works.
#[test]
fn a_truncated_image() {
    let scratch = TempDir::new();
    let image = scratch.file("x", random(4 * MIB));
    let [flag, value] = disk(&image, "");
    let mut guest = Shell::start([flag, value]);
    guest.ok("dd if=/dev/vda of=/dev/null bs=1M count=1 2>/dev/null");
    let file = File::options().write(true).open(&image).expect("the image");
    file.set_len(MIB as u64).expect("truncate it");
    let (status, _) = guest.run("dd if=/dev/vda of=/dev/null bs=1M skip=2 count=1");
    assert_ne!(status, 0, "a read behind the end must fail");
    let (status, _) =
        guest.run("dd if=/dev/zero of=/dev/vda bs=4k seek=700 count=1 conv=notrunc,fsync");
    assert_ne!(status, 0, "a write behind the end must fail");
    assert_eq!(
        file.metadata().expect("its size").len(),
        MIB as u64,
        "the write must not extend the image"
    );
    guest.ok("dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null");
    guest.vm.wait_for_log("the image was truncated");
    guest.power_off();
}

/// The host's file system is full.
#[test]
fn no_space_left() {
    let scratch = TempDir::new();
    let place = scratch.path().join("small");
    let mount = place.display();
    host_runs(&format!(
        "mkdir {mount} && mount -t tmpfs -o size=2M none {mount}"
    ));
    let image = place.join("x");
    let file = File::create(&image).expect("the image");
    file.set_len(8 * MIB as u64).expect("a sparse image");
    drop(file);
    let [flag, value] = disk(&image, "");
    let mut guest = Shell::start([flag, value]);
    let (status, _) = guest.run("dd if=/dev/urandom of=/dev/vda bs=64k conv=notrunc,fsync");
    assert_ne!(status, 0, "the guest must get an error");
    guest.vm.wait_for_log("No space left on device");
    guest.ok("dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null");
    drop(guest.power_off());
    host_runs(&format!("umount {mount}"));
}

/// The host's disk fails to read: a loop device whose file has lost its second half.
#[test]
fn the_hosts_disk_fails() {
    let scratch = TempDir::new();
    let file = scratch.file("backing", random(4 * MIB));
    let device = host_runs(&format!(
        "losetup -f && losetup $(losetup -f) {}",
        file.display()
    ));
    let [flag, value] = disk(Path::new(&device), "");
    let mut guest = Shell::start([flag, value]);
    let backing = File::options()
        .write(true)
        .open(&file)
        .expect("the backing file");
    backing.set_len(MIB as u64).expect("truncate it");
    let (status, _) = guest.run("dd if=/dev/vda of=/dev/null bs=64k skip=32 count=1 iflag=direct");
    assert_ne!(status, 0, "the guest must get an error");
    guest.vm.wait_for_log("Failed to read");
    guest.ok("dd if=/dev/vda of=/dev/null bs=64k count=1 iflag=direct 2>/dev/null");
    guest.power_off();
    host_runs(&format!("losetup -d {device}"));
}

#[test]
fn what_cannot_be_a_disk() {
    let scratch = TempDir::new();
    let kernel = || Rvmm::guest("shutdown");
    let refused = |flag: &str, status, words: &[&str]| {
        let end = kernel().args(["--disk", flag]).run();
        end.assert_refused(status, words);
    };
    refused("/nope", HOST_FAILED, &["disk", "/nope", "No such file"]);
    refused(
        "/dev/null",
        HOST_FAILED,
        &["/dev/null", "neither a file nor a block device"],
    );
    refused("/nope,cache=none", USAGE, &["writeback", "--disk"]);
    refused("/nope,direct,snapshot=on", USAGE, &["direct", "snapshot"]);
    refused("/nope,snapshot-dir=/tmp", USAGE, &["snapshot=on"]);
    let image = scratch.file("x", vec![0; 4096]);
    let name = image.display().to_string();
    let both = kernel().args(["--disk", &name, "--disk", &name]).run();
    both.assert_refused(USAGE, &["the same file", &name, "readonly or snapshot=on"]);
    let vm = Rvmm::guest("spin").args(["--disk", &name]).spawn();
    vm.wait_for("spinning\n");
    let other = kernel().args(["--disk", &name]).run();
    other.assert_refused(HOST_FAILED, &["lock", &name, "readonly or snapshot=on"]);
    vm.terminate();
    vm.finish().assert_status(TERMINATED);
}

/// After a reset the guest still has its disk, and the image is locked all the time.
#[test]
fn a_reset_keeps_disks() {
    let scratch = TempDir::new();
    let image = scratch.file("x", random(MIB));
    let [flag, value] = disk(&image, "");
    let cmdline = "console=ttyS0 quiet panic=-1 rvmm.action=sh";
    let rvmm = Rvmm::virtio(cmdline).reboots().args([&flag, &value]);
    let mut guest = Shell::of(rvmm);
    guest.ok("dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=notrunc,fsync 2>/dev/null");
    guest.vm.send("reboot -f\n");
    guest.vm.wait_for_times("rvmm-guest: userspace", 2);
    guest.vm.wait_for_times("rvmm-guest: ready", 3);
    let other = Rvmm::guest("shutdown").args([&flag, &value]).run();
    other.assert_refused(HOST_FAILED, &["lock"]);
    guest.vm.send("head -c 4096 /dev/vda | md5sum\n");
    guest.vm.wait_for("620f0b67a91f7f74151bc5be745b7110");
    guest.vm.send("poweroff -f\n");
    guest.vm.finish().assert_status(crate::common::POWERED_OFF);
    let mut byte = [1];
    File::open(&image)
        .expect("the image")
        .read_exact_at(&mut byte, 4095)
        .expect("a byte");
    assert_eq!(byte, [0]);
}
