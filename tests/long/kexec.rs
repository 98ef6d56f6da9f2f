//! A Debian starts another kernel by kexec: once on request, and once because it crashed. The
//! second kernel starts with an initramfs of ours and all harts, and the disks still work.
#![cfg(target_arch = "riscv64")]

use std::fs;
use std::path::Path;

use crate::common::disk::{MIB, disk, md5};
use crate::common::files::{self, TempDir, debian};
use crate::common::{Rvmm, Shell, Vm, nonce};

/// Bytes of a disk that the second kernel reads.
const READ: usize = 4096;
/// The offset where it writes, behind what the first kernel wrote.
const SECOND: usize = 4096;

struct Debian {
    vm: Vm,
    scratch: TempDir,
    /// The text that the first kernel writes.
    word: String,
}

impl Debian {
    /// Logged in, on two harts. Besides its own disk the guest has: as /dev/vdb the next kernel, as
    /// vdc an initramfs for it, as vdd the loader, and as vde a disk to write to.
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
            "cat /dev/vdd >/run/guest-kexec && chmod +x /run/guest-kexec && \
             echo {word} >/dev/vde && sync && echo ready=$?\n"
        ));
        vm.wait_for("ready=0");
        Self { vm, scratch, word }
    }

    /// Loads the second kernel with this command of the loader, and runs `go`, which starts it.
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
    /// The text that the first kernel wrote, and the text that this one writes.
    first: String,
    word: String,
}

impl Second {
    /// Checks that all harts work; reads what was there, what the first kernel wrote, and Debian's
    /// file system; and writes to a disk.
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
        assert!(
            data.starts_with(self.first.as_bytes()),
            "the first kernel's text"
        );
        assert!(
            data[SECOND..].starts_with(self.word.as_bytes()),
            "the second kernel's text"
        );
    }
}

/// The value of --disk for a copy of a file, padded to whole sectors. A kernel, an initramfs and a
/// program can have zeros behind them.
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

/// It finds the crashed kernel's RAM in /proc/vmcore, with the notes that the kernel took when it
/// crashed.
#[test]
fn a_crash_kernel() {
    let debian = Debian::start("crashkernel=160M");
    let mut second = debian.next_kernel("crash", "echo c >/proc/sysrq-trigger");
    second
        .shell
        .ok("head -c 65536 /proc/vmcore | strings | grep '^CRASHTIME='");
    second.works();
}
