//! fio with verification in a Debian with four vCPUs, and a check of its image on the host. Also
//! Debian over MMIO.
#![cfg(target_arch = "riscv64")]

use std::process::Command;

use crate::common::Rvmm;
use crate::common::files::{TempDir, debian};

const JOBS: u32 = 4;
const EACH_MIB: u32 = 8;

fn check(transport: &str) {
    let scratch = TempDir::new();
    let image = scratch.file("x", []);
    let file = std::fs::File::options()
        .write(true)
        .open(&image)
        .expect("the image");
    file.set_len(u64::from(JOBS * EACH_MIB) << 20)
        .expect("its size");
    let root = format!("{},snapshot=on", debian().display());
    let data = format!("{},id=data", image.display());
    let mut vm = Rvmm::virtio("console=ttyS0 quiet panic=-1 root=/dev/vda")
        .args(["--mem", "512M", "--cpus", "4", "--transport", transport])
        .args(["--disk", &root, "--disk", &data])
        .spawn();
    vm.allow_seconds(900);
    vm.wait_for("rvmm-debian login: ");
    vm.send("root\n");
    vm.wait_for(":~# ");
    vm.send(format!(
        "fio --name=mix --filename=/dev/vdb --direct=1 --rw=randwrite \
         --bssplit=512/10:4k/40:16k/30:64k/20 --size={EACH_MIB}M --offset_increment={EACH_MIB}M \
         --numjobs={JOBS} --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 \
         --fsync=64 --group_reporting; echo \"fio ended with $?\"; \
         md5sum </dev/vdb | sed 's/ .*/ is the sum/'\n"
    ));
    vm.wait_for(" is the sum\r");
    let console = vm.console();
    assert!(console.contains("fio ended with 0\r"), "fio found errors");
    assert!(console.contains("err= 0"), "fio found errors");
    vm.send("poweroff -f\n");
    vm.finish().assert_status(crate::common::POWERED_OFF);
    let sum = Command::new("md5sum").arg(&image).output().expect("md5sum");
    let sum = String::from_utf8_lossy(&sum.stdout)[..32].to_owned();
    assert!(
        console.contains(&format!("{sum} is the sum")),
        "the image has {sum}"
    );
}

#[test]
fn fio_over_pci() {
    check("pci");
}

#[test]
fn fio_over_mmio() {
    check("mmio");
}

#[test]
fn debian_over_mmio() {
    crate::common::disk::debian_boots("mmio");
}
