//! The files that the cases use: built ones, files of the host, and temporary ones.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// The rvmm under test.
pub(crate) fn rvmm() -> PathBuf {
    env::var_os("RVMM_TEST_BIN")
        .unwrap_or_else(|| env!("CARGO_BIN_EXE_rvmm").into())
        .into()
}

/// One of our own guests, built from `resources/guests/NAME.S`.
pub(crate) fn guest(name: &str) -> PathBuf {
    built(&format!("{name}.img"))
}

/// The same guest as an ELF file, with its symbols.
pub(crate) fn guest_elf(name: &str) -> PathBuf {
    built(&format!("{name}.elf"))
}

/// The initramfs whose init does what the `rvmm.` words on the kernel's command line say.
pub(crate) fn initramfs() -> PathBuf {
    built("initramfs.cpio.gz")
}

/// The Linux kernel: the one in RVMM_TEST_KERNEL, else the one that this host runs.
pub(crate) fn kernel() -> PathBuf {
    let kernel = env::var_os("RVMM_TEST_KERNEL").map_or_else(
        || {
            let release = fs::read_to_string("/proc/sys/kernel/osrelease")
                .expect("read the kernel's release");
            PathBuf::from(format!("/boot/vmlinux-{}", release.trim()))
        },
        PathBuf::from,
    );
    assert!(
        kernel.is_file(),
        "no Linux kernel at {}: name one in RVMM_TEST_KERNEL",
        kernel.display()
    );
    kernel
}

/// The same initramfs with the modules that Debian's kernel needs for virtio devices. With `root=`
/// on the command line it boots that disk.
pub(crate) fn virtio_initramfs() -> PathBuf {
    built("virtio.cpio.gz")
}

/// A disk with a Debian for guests. No case writes to it.
pub(crate) fn debian() -> PathBuf {
    let disk = env::var_os("RVMM_TEST_DEBIAN");
    disk.expect("RVMM_TEST_DEBIAN names a disk with a Debian: scripts/test makes one")
        .into()
}

/// The program `resources/kexec`, with which a guest loads another kernel.
pub(crate) fn kexec_loader() -> PathBuf {
    let loader = env::var_os("RVMM_TEST_KEXEC").map_or_else(
        || Path::new(env!("CARGO_BIN_EXE_rvmm")).with_file_name("examples/guest-kexec"),
        PathBuf::from,
    );
    assert!(
        loader.is_file(),
        "{} is missing: cargo build --example guest-kexec",
        loader.display()
    );
    loader
}

fn built(name: &str) -> PathBuf {
    let dir = env::var_os("RVMM_TEST_GUESTS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guests"),
        PathBuf::from,
    );
    let file = dir.join(name);
    assert!(
        file.is_file(),
        "{} is missing: run scripts/guests to build it",
        file.display()
    );
    file
}

/// A temporary directory of one case. Dropped, it is removed.
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "rvmm-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = env::temp_dir().join(name);
        fs::create_dir(&dir).unwrap_or_else(|e| panic!("create {}: {e}", dir.display()));
        TempDir(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file, and returns its path.
    pub(crate) fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let file = self.0.join(name);
        fs::write(&file, content).unwrap_or_else(|e| panic!("write {}: {e}", file.display()));
        file
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
