//! A Debian starts another kernel by kexec: because it was asked to, and because it crashed. The second kernel turns up
//! with an initramfs of ours and all harts, and the disks still work.
#![cfg(target_arch = "riscv64")]

mod common;

use std::fs;
use std::path::Path;

use common::disk::{MIB, disk, md5};
use common::files::{self, TempDir, debian};
use common::{Rvmm, Shell, Vm, nonce};

/// Bytes of a disk that the second kernel reads.
const READ: usize = 4096;
/// Where it writes, behind what the first wrote.
const SECOND: usize = 4096;

struct Debian {
    vm: Vm,
    scratch: TempDir,
    /// What the first kernel writes.
    word: String,
}

impl Debian {
    /// Logged in, on two harts. Behind its own disk it has the next kernel as /dev/vdb, an initramfs for it as vdc, the
    /// loader as vdd, and vde to write to.
    fn start(cmdline: &str) -> Self {
        let scratch = TempDir::new();
        let [_, root] = disk(&debian(), ",snapshot=on");
        let kernel = sectors(&scratch, "kernel", &files::kernel());
        let initrd = sectors(&scratch, "initrd", &files::virtio_initramfs());
        let loader = sectors(&scratch, "loader", &files::kexec_loader());
        let data = scratch.file("data", vec![0; MIB]);
        let mut vm = Rvmm::virtio(&format!(
            "console=ttyS0 quiet panic=-1 root=/dev/vda {cmdline}"
        ))
        .args(["--mem", "512M", "--cpus", "2", "--disk", &root])
        .args(["--disk", &kernel, "--disk", &initrd, "--disk", &loader])
        .args(disk(&data, ",id=data"))
        .spawn();
        vm.allow_seconds(900);
        vm.wait_for("rvmm-debian login: ");
        vm.send("root\n");
        vm.wait_for(":~# ");
        let word = nonce();
        vm.send(format!(
            "cat /dev/vdd >/run/guest-kexec && chmod +x /run/guest-kexec && echo {word} >/dev/vde && sync && \
             echo ready=$?\n"
        ));
        vm.wait_for("ready=0");
        Self { vm, scratch, word }
    }

    /// Loads the second kernel by this command of the loader's, and runs `go`, which starts it.
    fn next_kernel(self, load: &str, go: &str) -> Second {
        let Self {
            mut vm,
            scratch,
            word,
        } = self;
        let nonce = nonce();
        let cmdline = format!("console=ttyS0 quiet panic=-1 rvmm.action=sh rvmm.nonce={nonce}");
        vm.send(format!(
            "/run/guest-kexec {load} /dev/vdb /dev/vdc '{cmdline}' && echo loaded=$?\n"
        ));
        vm.wait_for("loaded=0");
        vm.send(format!("{go}\n"));
        vm.wait_for(&format!("rvmm-guest: userspace nonce={nonce}"));
        Second {
            shell: Shell::on(vm),
            scratch,
            first: word,
            word: nonce,
        }
    }
}

struct Second {
    shell: Shell,
    scratch: TempDir,
    /// What the first kernel wrote, and what this one writes.
    first: String,
    word: String,
}

impl Second {
    /// Has all harts, reads what was there, what the first wrote and Debian's file system, and writes to a disk.
    fn works(mut self) {
        let shell = &mut self.shell;
        assert_eq!(shell.ok("nproc"), "2");
        let image = fs::read(self.scratch.path().join("kernel")).expect("the image");
        let sum = md5(&self.scratch.file("start", &image[..READ]));
        let read = shell.ok(&format!("head -c {READ} /dev/vdb | md5sum"));
        assert!(read.starts_with(&sum), "{read}, not {sum}");
        shell.ok("mount /dev/vda /tmp");
        assert_eq!(shell.ok("cat /tmp/etc/hostname"), "rvmm-debian");
        shell.ok("umount /tmp");
        assert_eq!(shell.ok("head -n 1 /dev/vde"), self.first);
        shell.ok(&format!(
            "echo {} | dd of=/dev/vde bs={SECOND} seek=1 conv=notrunc,fsync 2>/dev/null",
            self.word
        ));
        drop(self.shell.power_off());
        let data = fs::read(self.scratch.path().join("data")).expect("the data");
        assert!(data.starts_with(self.first.as_bytes()), "the first's word");
        assert!(
            data[SECOND..].starts_with(self.word.as_bytes()),
            "the second's"
        );
    }
}

/// A copy of whole sectors, as the value of --disk. Neither a kernel nor an initramfs nor a program minds zeros behind.
fn sectors(scratch: &TempDir, name: &str, file: &Path) -> String {
    let mut bytes = fs::read(file).expect("the file");
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    let copy = scratch.file(name, bytes);
    format!("{},readonly", copy.display())
}

#[test]
fn kexec() {
    let second = Debian::start("").next_kernel("load", "/run/guest-kexec go");
    second.works();
}

/// It finds the other's RAM in /proc/vmcore, with what that noted as it crashed.
#[test]
fn a_crash_kernel() {
    let debian = Debian::start("crashkernel=160M");
    let mut second = debian.next_kernel("crash", "echo c >/proc/sysrq-trigger");
    second
        .shell
        .ok("head -c 65536 /proc/vmcore | strings | grep '^CRASHTIME='");
    second.works();
}
