//! Disks on every kind of host: the data that a guest reads and writes, the exits that it causes,
//! and a Debian that boots from one.
#![cfg(target_arch = "riscv64")]

use std::fs;

use crate::common::Shell;
use crate::common::disk::{MIB, debian_boots, disk, md5, random};
use crate::common::files::TempDir;
use crate::common::host::{self, Kind};
use serde_json::Value;

/// Reads and writes of all sizes, a flush, and the contents of the image on the host.
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

    // Copies half of one disk to the other, in blocks whose size is no power of two.
    let copied = "dd if=/dev/vdb of=/dev/vda bs=3584 seek=7 conv=notrunc,fsync 2>/dev/null";
    guest.ok(copied);
    guest.ok("dd if=/dev/zero of=/dev/vda bs=1M seek=5 count=2 conv=notrunc,fsync 2>/dev/null");
    let sum = guest.ok("echo 3 >/proc/sys/vm/drop_caches; md5sum </dev/vda | cut -c1-32");
    guest.power_off();
    assert_eq!(md5(&a), sum);
    let (a, b) = (fs::read(&a).expect("a"), fs::read(&b).expect("b"));
    assert!(a[7 * 3584..][..2 * MIB] == b, "the copied data differs");
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

/// 10,000 reads of 4 KiB. On PCI with messages, no read causes an exit to rvmm. With a wire, the
/// guest reads and acknowledges the cause of each interrupt.
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
    // There are fewer notifications than reads if the disk was still busy: it needs none then.
    assert!(
        kernel >= READS / 2,
        "notifications must stay in the kernel: {kernel}"
    );
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

/// 31 devices for one hart have more queues than 31 interrupts can serve one by one. Each of them
/// works.
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
fn debian_over_pci() {
    debian_boots("pci");
}
