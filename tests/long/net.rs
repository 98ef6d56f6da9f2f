//! 1 GiB of TCP each way, with and without vhost.
#![cfg(target_arch = "riscv64")]

use crate::common::Shell;
use crate::common::net::{Tap, transfer};

/// MiB.
const MANY: usize = 1024;

fn check(more: &str) {
    let tap = Tap::new(false);
    let net = format!("tap={}{more}", tap.name);
    let mut guest = Shell::start(["--net", net.as_str()]);
    guest.vm.allow_seconds(1800);
    tap.configure(&mut guest);
    transfer(&tap, &mut guest, MANY);
    guest.power_off();
}

#[test]
fn tcp() {
    check("");
}

#[test]
fn tcp_by_vhost() {
    check(",vhost");
}
