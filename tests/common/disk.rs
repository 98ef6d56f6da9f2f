//! Images, and a Debian that boots from one.

use std::path::Path;
use std::process::Command;

use super::files::debian;
use super::{POWERED_OFF, Rvmm, nonce};

pub(crate) const MIB: usize = 1 << 20;

/// `len` random bytes (xorshift), different for each call.
pub(crate) fn random(len: usize) -> Vec<u8> {
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

pub(crate) fn disk(path: &Path, flags: &str) -> [String; 2] {
    ["--disk".into(), format!("{}{flags}", path.display())]
}

/// Runs a shell command on the host, and returns its output.
pub(crate) fn host_runs(command: &str) -> String {
    let output = Command::new("sh")
        .args(["-c", command])
        .output()
        .expect("sh");
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {text} {error}");
    text
}

pub(crate) fn md5(path: &Path) -> String {
    let line = host_runs(&format!("md5sum {}", path.display()));
    line.split_whitespace().next().expect("a sum").to_owned()
}

/// The guest's own init starts from the disk, and a login at its console works.
pub(crate) fn debian_boots(transport: &str) {
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
    // The minute that this takes can be several on a loaded machine.
    vm.allow_seconds(900);
    vm.wait_for("rvmm-debian login: ");
    vm.send("root\n");
    vm.wait_for("root@rvmm-debian:~# ");
    vm.send(format!(
        "echo {nonce} $(cat /proc/1/comm) $(findmnt -no SOURCE /)\n"
    ));
    vm.wait_for(&format!("{nonce} systemd /dev/vda"));
    vm.send("poweroff -f\n");
    vm.finish().assert_status(POWERED_OFF);
}
