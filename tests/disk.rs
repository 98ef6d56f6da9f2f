//! Disks: what a guest does to them, what the host does to them meanwhile, and a Debian on one.
#![cfg(target_arch = "riscv64")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use common::files::{TempDir, debian};
use common::host::{self, Kind};
use common::{HOST_FAILED, Rvmm, Shell, USAGE, nonce};
use serde_json::Value;

const MIB: usize = 1 << 20;

/// `len` bytes that no other call gives: xorshift.
fn random(len: usize) -> Vec<u8> {
    let mut state = u64::from_str_radix(&nonce(), 16).expect("a number") | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn disk(path: &Path, flags: &str) -> [String; 2] {
    ["--disk".into(), format!("{}{flags}", path.display())]
}

/// Runs a command of the host's.
fn host_runs(command: &str) -> String {
    let output = Command::new("sh")
        .args(["-c", command])
        .output()
        .expect("sh");
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {text} {error}");
    text
}

fn md5(path: &Path) -> String {
    let line = host_runs(&format!("md5sum {}", path.display()));
    line.split_whitespace().next().expect("a sum").to_owned()
}

/// Reads and writes of all sizes, a flush, and what the host finds in the image.
fn check_io(transport: &str) {
    let scratch = TempDir::new();
    let a = scratch.file("a", random(8 * MIB));
    let b = scratch.file("b", random(2 * MIB));
    let [a0, a1] = disk(&a, ",id=first");
    let [b0, b1] = disk(&b, ",readonly");
    let mut guest = Shell::start([
        a0.as_str(),
        &a1,
        &b0,
        &b1,
        "--transport",
        transport,
        "--cpus",
        "2",
    ]);
    assert_eq!(
        guest.ok("grep -h . /sys/block/vd[ab]/serial"),
        "first\ndisk1"
    );
    assert_eq!(
        guest.ok("cat /sys/block/vda/size /sys/block/vdb/ro"),
        "16384\n1"
    );
    assert_eq!(
        guest.ok("ls /sys/block/vda/mq | wc -l"),
        "2",
        "a queue for each vCPU"
    );
    let sum = guest.ok("md5sum </dev/vda | cut -c1-32");
    assert_eq!(sum, md5(&a));
    assert_eq!(guest.ok("md5sum </dev/vdb | cut -c1-32"), md5(&b));
    assert_ne!(
        guest
            .run("dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync")
            .0,
        0
    );

    // Half of one disk to the other, in blocks that fit nothing.
    let copied = "dd if=/dev/vdb of=/dev/vda bs=3584 seek=7 conv=notrunc,fsync 2>/dev/null";
    guest.ok(copied);
    guest.ok("dd if=/dev/zero of=/dev/vda bs=1M seek=5 count=2 conv=notrunc,fsync 2>/dev/null");
    let sum = guest.ok("echo 3 >/proc/sys/vm/drop_caches; md5sum </dev/vda | cut -c1-32");
    guest.power_off();
    assert_eq!(md5(&a), sum);
    let (a, b) = (fs::read(&a).expect("a"), fs::read(&b).expect("b"));
    assert!(a[7 * 3584..][..2 * MIB] == b, "what was copied");
    assert!(a[5 * MIB..][..2 * MIB].iter().all(|byte| *byte == 0));
}

#[test]
fn pci_reads_and_writes() {
    check_io("pci");
}

#[test]
fn mmio_reads_and_writes() {
    check_io("mmio");
}

/// Two guests at once write all over the same image, and it stays as it was.
#[test]
fn snapshots_share_an_image() {
    let scratch = TempDir::new();
    let image = scratch.file("base", random(4 * MIB));
    let before = md5(&image);
    let [flag, value] = disk(&image, ",snapshot=on");
    let mut guests = [Shell::start([&flag, &value]), Shell::start([&flag, &value])];
    let mut sums = Vec::new();
    for guest in &mut guests {
        assert_eq!(guest.ok("md5sum </dev/vda | cut -c1-32"), before);
        guest.ok("dd if=/dev/urandom of=/dev/vda bs=7k count=500 conv=notrunc,fsync 2>/dev/null");
        sums.push(guest.ok("echo 3 >/proc/sys/vm/drop_caches; md5sum </dev/vda | cut -c1-32"));
    }
    assert!(sums[0] != sums[1] && sums[0] != before && sums[1] != before);
    guests.into_iter().for_each(|guest| drop(guest.power_off()));
    assert_eq!(md5(&image), before);
}

/// What a write cache holds is durable after a flush; without one, after each write.
#[test]
fn caches_are_told_to_the_guest() {
    let scratch = TempDir::new();
    let image = |name| scratch.file(name, vec![0; MIB]);
    let [f, a] = disk(&image("a"), "");
    let [_, b] = disk(&image("b"), ",cache=writethrough");
    let [_, c] = disk(&image("c"), ",cache=unsafe");
    let mut guest = Shell::start([&f, &a, &f, &b, &f, &c]);
    let told = guest.ok("cat /sys/block/vd[abc]/queue/write_cache");
    assert_eq!(told, "write back\nwrite through\nwrite back");
    for disk in ["vda", "vdb", "vdc"] {
        guest.ok(&format!(
            "dd if=/dev/urandom of=/dev/{disk} bs=64k count=8 conv=fsync 2>/dev/null"
        ));
    }
    guest.power_off();
}

/// The image gets shorter while the guest runs: what is gone is an I/O error, what is there goes on.
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
    assert_ne!(status, 0, "a read behind the end fails");
    let (status, _) =
        guest.run("dd if=/dev/zero of=/dev/vda bs=4k seek=700 count=1 conv=notrunc,fsync");
    assert_ne!(status, 0, "and so does a write");
    assert_eq!(
        file.metadata().expect("its size").len(),
        MIB as u64,
        "which makes nothing longer"
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
    assert_ne!(status, 0, "the guest is told");
    guest.vm.wait_for_log("No space left on device");
    guest.ok("dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null");
    drop(guest.power_off());
    host_runs(&format!("umount {mount}"));
}

/// The host's disk cannot read: a loop device whose file has lost its second half.
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
    assert_ne!(status, 0, "the guest is told");
    guest.vm.wait_for_log("Failed to read");
    guest.ok("dd if=/dev/vda of=/dev/null bs=64k count=1 iflag=direct 2>/dev/null");
    guest.power_off();
    host_runs(&format!("losetup -d {device}"));
}

/// 10,000 reads of 4 KiB: on PCI with messages none of them makes an exit to rvmm; by wire each
/// interrupt is looked at and acknowledged.
fn check_exits(transport: &str) {
    const READS: u64 = 10_000;
    let scratch = TempDir::new();
    let image = scratch.file("x", vec![0; 64 * MIB]);
    let stats = scratch.path().join("stats.json");
    let [flag, value] = disk(&image, "");
    let stats_flag = format!("--stats={}", stats.display());
    let mut guest = Shell::start([flag.as_str(), &value, "--transport", transport, &stats_flag]);
    guest.ok(&format!(
        "dd if=/dev/vda of=/dev/null bs=4k count={READS} iflag=direct 2>/dev/null"
    ));
    guest.power_off();
    let text = fs::read_to_string(&stats).expect("the statistics");
    let stats: Value = serde_json::from_str(&text).expect("JSON");
    let exits = stats["vcpus"][0]["exits"].as_array().expect("exits");
    let of_device = |exit: &&Value| {
        exit["device"] == "PCI" || exit["device"] == "virtio-mmio" || exit["device"] == "PLIC"
    };
    let exits: u64 = exits
        .iter()
        .filter(of_device)
        .filter_map(|exit| exit["count"].as_u64())
        .sum();
    let kernel = stats["vcpus"][0]["kvm"]["mmio_exit_kernel"]
        .as_u64()
        .expect("a number");
    eprintln!("{transport}: {exits} exits to rvmm and {kernel} in the kernel for {READS} reads");
    // Fewer than the reads where the disk was still at work: none is needed then.
    assert!(kernel >= READS / 2, "kicks stay in the kernel: {kernel}");
    match (transport, host::kind()) {
        ("pci", Kind::Aia | Kind::AiaEmul) => assert!(exits < READS / 20, "{exits}"),
        _ => assert!(exits < 8 * READS, "{exits}"),
    }
}

#[test]
fn pci_exits() {
    check_exits("pci");
}

#[test]
fn mmio_exits() {
    check_exits("mmio");
}

/// 31 devices for one hart: more queues than 31 interrupts could serve, and each of them works.
#[test]
fn more_queues_than_interrupts() {
    const DISKS: usize = 29;
    let scratch = TempDir::new();
    let mut flags: Vec<String> = ["--rng", "--virtio-console", "none"]
        .map(String::from)
        .into();
    for number in 0..DISKS {
        let image = scratch.file(&format!("{number}"), random(64 << 10));
        flags.extend(disk(&image, &format!(",id=d{number}")));
    }
    let mut guest = Shell::start(&flags);
    for number in 0..DISKS {
        let sum = md5(&scratch.path().join(number.to_string()));
        let find = format!("$(grep -lx d{number} /sys/block/*/serial | cut -d/ -f4)");
        let read =
            format!("dd if=/dev/{find} bs=4k iflag=direct 2>/dev/null | md5sum | cut -c1-32");
        assert_eq!(guest.ok(&read), sum, "disk d{number}");
    }
    guest.ok("head -c 64 /dev/hwrng >/dev/null");
    guest.ok("echo hello >/dev/hvc0");
    let end = guest.power_off();
    let count = |text: &str| end.log.lines().filter(|line| line.contains(text)).count();
    let (own, shared, pin) = (
        count("each queue its own"),
        count("queues share one"),
        count("by pin"),
    );
    assert_eq!(own + shared + pin, DISKS + 2, "{}", end.log);
    match host::kind() {
        Kind::Aia => assert_eq!(own, DISKS + 2),
        Kind::AiaEmul => assert!(
            own > 0 && pin > 0 && own + shared <= 12,
            "{own} {shared} {pin}"
        ),
        Kind::NoAia => assert_eq!(pin, DISKS + 2),
    }
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
    let image = scratch.file("x", vec![0; 4096]);
    let name = image.display().to_string();
    let both = kernel().args(["--disk", &name, "--disk", &name]).run();
    both.assert_refused(HOST_FAILED, &["lock", &name, "readonly or snapshot=on"]);
}

/// The guest's own init comes up from the disk, and a login at its console works.
fn check_debian(transport: &str) {
    let nonce = nonce();
    let [flag, value] = disk(&debian(), ",snapshot=on");
    let mut vm = Rvmm::virtio("console=ttyS0 quiet panic=-1 root=/dev/vda")
        .args([
            flag.as_str(),
            &value,
            "--mem",
            "512M",
            "--transport",
            transport,
        ])
        .spawn();
    vm.wait_for("rvmm-debian login: ");
    vm.send("root\n");
    vm.wait_for("root@rvmm-debian:~# ");
    vm.send(format!(
        "echo {nonce} $(cat /proc/1/comm) $(findmnt -no SOURCE /)\n"
    ));
    vm.wait_for(&format!("{nonce} systemd /dev/vda"));
    vm.send("poweroff -f\n");
    vm.finish().assert_status(common::POWERED_OFF);
}

#[test]
fn debian_over_pci() {
    check_debian("pci");
}

#[test]
fn debian_over_mmio() {
    check_debian("mmio");
}

/// A disk is the guest's still after a reset, and locked all the time.
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
    guest.vm.finish().assert_status(common::POWERED_OFF);
    let mut byte = [1];
    File::open(&image)
        .expect("the image")
        .read_exact_at(&mut byte, 4095)
        .expect("a byte");
    assert_eq!(byte, [0]);
}
