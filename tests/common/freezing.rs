//! Snapshots of machines under test.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::files::{TempDir, rvmm};
use super::{Rvmm, Shell, Vm};

/// Linux's message when the VM generation ID has changed.
pub(crate) const RESEEDED: &str = "crng reseeded due to virtual machine fork";

/// The command line of a Linux that runs commands.
pub(crate) const CMDLINE: &str = "console=ttyS0 quiet panic=-1 rvmm.action=sh";

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

/// The host's guest interrupt files, which all machines share. KVM does not show the interrupts of
/// a hart that gets none, so rvmm refuses to save it.
static GUEST_FILES: RwLock<()> = RwLock::new(());

/// A directory for snapshots and sockets of one case.
pub(crate) struct Freezer {
    pub(crate) scratch: TempDir,
    _shared: Option<RwLockReadGuard<'static, ()>>,
    _alone: Option<RwLockWriteGuard<'static, ()>>,
}

impl Freezer {
    pub(crate) fn new() -> Self {
        let shared = GUEST_FILES.read().unwrap_or_else(PoisonError::into_inner);
        Self {
            scratch: TempDir::new(),
            _shared: Some(shared),
            _alone: None,
        }
    }

    /// For a case that needs many guest interrupt files of the host. Waits until no other case
    /// freezes machines.
    pub(crate) fn alone() -> Self {
        let alone = GUEST_FILES.write().unwrap_or_else(PoisonError::into_inner);
        Self {
            scratch: TempDir::new(),
            _shared: None,
            _alone: Some(alone),
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

/// Parts of the lines with which a kernel warns.
pub(crate) const WARNINGS: [&str; 7] = [
    "WARNING:",
    "BUG:",
    "Oops",
    "rcu: INFO",
    "soft lockup",
    "I/O error",
    "blocked for more",
];

/// Checks that the guest's kernel has warned of nothing.
#[track_caller]
pub(crate) fn kernel_is_content(guest: &mut Shell) {
    let log = guest.ok("dmesg");
    for bad in WARNINGS {
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

/// Freezes a Linux whose harts, disk and network are busy, and lets it go on in another process.
#[cfg(target_arch = "riscv64")]
pub(crate) fn linux_goes_on(transport: &str) {
    let (freezer, tap) = (Freezer::new(), super::net::Tap::new(true));
    let image = freezer.scratch.file("image", vec![0; 8 << 20]);
    let [flag, value] = super::disk::disk(&image, "");
    let net = format!("tap={}", tap.name);
    let rvmm = Rvmm::virtio(CMDLINE)
        .args([
            &flag,
            &value,
            "--net",
            &net,
            "--rng",
            "--transport",
            transport,
        ])
        .args(["--cpus", "2", "--mem", "256M"]);
    let mut guest = Shell::of(rvmm.args(freezer.ctl("ctl")));
    tap.configure(&mut guest);
    start_counting(&mut guest);
    guest.ok("dd if=/dev/urandom of=/dev/vda bs=1M count=8 2>/dev/null; sync");
    let sum = guest.ok("md5sum </dev/vda");
    // A process that reads and one that writes, while the machine is frozen.
    guest.ok("(while :; do dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null; done) &");
    guest.ok("(while :; do dd if=/dev/vda of=/tmp/copy bs=1M count=1 2>/dev/null; sync; done) &");
    let before = count(&mut guest);

    freezer.freeze("ctl", "snap", &[]);
    super::net::transfer(&tap, &mut guest, 1);
    assert!(count(&mut guest) > before, "the original goes on");
    kill(guest.vm);

    let mut guest = Shell::restored(freezer.thaw("snap").spawn());
    guest.vm.allow_seconds(120);
    let (first, second) = (count(&mut guest), count(&mut guest));
    assert!(
        before <= first && first < second,
        "{before}, {first}, {second}"
    );
    assert_eq!(guest.ok("md5sum </dev/vda"), sum);
    guest.ok("echo 3 >/proc/sys/vm/drop_caches; md5sum </dev/vda | cmp - /dev/null | head -c 0");
    super::net::transfer(&tap, &mut guest, 1);
    guest.ok("head -c 64 /dev/hwrng >/dev/null");
    guest.ok("dd if=/dev/zero of=/dev/vda bs=1M count=1 conv=fsync 2>/dev/null");
    assert!(guest.ok("dmesg").contains(RESEEDED));
    kernel_is_content(&mut guest);
    let now = guest.ok("echo 3 >/proc/sys/vm/drop_caches; md5sum </dev/vda | cut -c1-32");
    guest.power_off();
    assert_eq!(super::disk::md5(&image), now);
}
