//! Programs of a Debian for this host, from a disk image. They need none of the host's libraries.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::files::TempDir;

/// A disk with packages, mounted until this is dropped.
pub(crate) struct Programs(TempDir);

impl Programs {
    pub(crate) fn of(disk: &Path) -> Self {
        let root = TempDir::new();
        let mut mount = Command::new("mount");
        mount.args(["-t", "ext4", "-o", "ro"]).arg(disk);
        let status = mount.arg(root.path()).status().expect("run mount");
        assert!(status.success(), "{status}");
        Self(root)
    }

    pub(crate) fn usr(&self) -> PathBuf {
        self.0.path().join("usr")
    }

    /// Runs the program /usr/bin/NAME of the disk.
    pub(crate) fn command(&self, name: &str) -> Command {
        let usr = self.usr();
        let mut command = Command::new(usr.join("lib/ld-linux-riscv64-lp64d.so.1"));
        command
            .arg("--library-path")
            .arg(usr.join("lib/riscv64-linux-gnu"))
            .arg(usr.join("bin").join(name));
        command
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}
