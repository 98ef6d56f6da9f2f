//! Snapshots of machines under test.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::files::{TempDir, rvmm};
use super::{Rvmm, Shell, Vm};

/// Runs rvmm with these words.
pub(crate) fn rvmm_with<I: IntoIterator<Item: AsRef<OsStr>>>(words: I) -> Output {
    let mut command = Command::new(rvmm());
    command.args(words).output().expect("run rvmm")
}

/// What rvmm prints with these words. It must succeed.
#[track_caller]
pub(crate) fn printed<I: IntoIterator<Item: AsRef<OsStr>>>(words: I) -> String {
    let output = rvmm_with(words);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The lines of error of rvmm with these words. It must fail because of the host.
#[track_caller]
pub(crate) fn refused<I: IntoIterator<Item: AsRef<OsStr>>>(words: I) -> Vec<String> {
    let output = rvmm_with(words);
    assert_eq!(output.status.code(), Some(super::HOST_FAILED));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    error.lines().map(Into::into).collect()
}

/// A directory for snapshots and sockets of one case.
pub(crate) struct Freezer {
    pub(crate) scratch: TempDir,
}

impl Freezer {
    pub(crate) fn new() -> Self {
        Self {
            scratch: TempDir::new(),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// `--ctl` with a socket of this name.
    pub(crate) fn ctl(&self, name: &str) -> [String; 2] {
        ["--ctl".into(), self.path(name).display().to_string()]
    }

    /// Takes the snapshot `name` of the machine with this socket.
    #[track_caller]
    pub(crate) fn freeze(&self, socket: &str, name: &str, more: &[&str]) -> String {
        let (socket, dir) = (self.path(socket), self.path(name));
        let words = [OsStr::new("ctl"), socket.as_os_str()];
        let words = words
            .into_iter()
            .chain([OsStr::new("snapshot"), dir.as_os_str()]);
        printed(words.chain(more.iter().map(OsStr::new)))
    }

    /// rvmm, which restores the snapshot `name`.
    pub(crate) fn thaw(&self, name: &str) -> Rvmm {
        let rvmm = Rvmm::new().args(["restore", "-v", "--no-reboot"]);
        rvmm.arg(self.path(name))
    }
}

/// The value that the guest's shell shows for a counter that a process increments, read from the
/// file `/tmp/count`. Again and again the file has no line for a moment.
pub(crate) fn count(guest: &mut Shell) -> u64 {
    let text = guest.ok("until read count </tmp/count; do :; done; echo $count");
    text.parse().expect("a number")
}

/// Starts the process of [`count`].
pub(crate) fn start_counting(guest: &mut Shell) {
    guest.ok("(i=0; while :; do i=$((i+1)); echo $i >/tmp/count; done) &");
    while count(guest) == 0 {}
}

/// Checks that the guest's kernel has warned of nothing.
#[track_caller]
pub(crate) fn kernel_is_content(guest: &mut Shell) {
    let log = guest.ok("dmesg");
    for bad in [
        "WARNING:",
        "BUG:",
        "Oops",
        "rcu: INFO",
        "soft lockup",
        "I/O error",
        "blocked for more",
    ] {
        let line = log.lines().find(|line| line.contains(bad));
        assert_eq!(line, None, "the guest's kernel complains");
    }
}

/// Kills rvmm, as SIGKILL does.
pub(crate) fn kill(vm: Vm) {
    drop(vm);
}

/// The path as a string.
pub(crate) fn text(path: &Path) -> String {
    path.display().to_string()
}
