//! Network interfaces: several queues, taps that go away, addresses. The kind of host makes no
//! difference.
#![cfg(target_arch = "riscv64")]

use crate::common::net::{Tap, ip, tcp};
use crate::common::{HOST_FAILED, Rvmm, Shell, USAGE};

/// A pair of queues for each vCPU, on a tap that was made for several.
#[test]
fn tcp_by_several_queues() {
    tcp("pci", "", "2", true);
    tcp("pci", ",vhost", "2", true);
}

#[test]
fn addresses_are_told() {
    let tap = Tap::new(false);
    let address = |more: &str| {
        let net = format!("tap={}{more}", tap.name);
        let mut guest = Shell::start(["--net", net.as_str()]);
        let address = guest.ok("cat /sys/class/net/eth0/address");
        guest.power_off();
        address
    };
    assert_eq!(address(",mac=52:54:00:ab:cd:ef"), "52:54:00:ab:cd:ef");
    let own = address("");
    assert!(own.starts_with("52:54:"), "{own}");
    assert_eq!(address(""), own, "the same at every start");
}

/// The tap is deleted while the guest uses it. The guest's link goes down, and the guest goes on.
#[test]
fn a_tap_that_goes_away() {
    tap_goes_away("");
    tap_goes_away(",vhost");
}

fn tap_goes_away(more: &str) {
    let tap = Tap::new(false);
    let net = format!("tap={}{more}", tap.name);
    let mut guest = Shell::start(["--net", net.as_str()]);
    tap.configure(&mut guest);
    assert_eq!(guest.ok("cat /sys/class/net/eth0/carrier"), "1");
    ip(&format!("link del {}", tap.name));
    guest.vm.wait_for_log("the guest's link is down");
    guest.ok("while [ \"$(cat /sys/class/net/eth0/carrier)\" != 0 ]; do :; done");
    let (status, _) = guest.run(&format!("ping -c 1 -W 1 {} >/dev/null", tap.address(1)));
    assert_ne!(status, 0);
    guest.ok("true");
    guest.power_off();
}

/// The tap is down for a while.
#[test]
fn a_tap_that_is_down() {
    let tap = Tap::new(false);
    let net = format!("tap={}", tap.name);
    let mut guest = Shell::start(["--net", net.as_str()]);
    tap.configure(&mut guest);
    ip(&format!("link set {} down", tap.name));
    let ping = format!("ping -c 1 -W 1 {} >/dev/null", tap.address(1));
    assert_ne!(guest.run(&ping).0, 0);
    ip(&format!("link set {} up", tap.name));
    guest.ok(&format!("until {ping}; do :; done"));
    guest.power_off();
}

/// A device without bus master enable transfers nothing, and works again with its next driver.
/// Kexec relies on that.
#[test]
fn a_device_that_loses_the_bus() {
    for more in ["", ",vhost"] {
        let tap = Tap::new(false);
        let net = format!("tap={}{more}", tap.name);
        let mut guest = Shell::start(["--net", net.as_str()]);
        tap.configure(&mut guest);
        let ping = format!("ping -c 1 -W 1 {} >/dev/null", tap.address(1));
        let device = guest.ok("basename $(readlink -f /sys/class/net/eth0/device/..)");
        // Only memory space enable.
        guest.ok(&format!(
            "printf '\\002' | \
             dd of=/sys/bus/pci/devices/{device}/config bs=1 seek=4 conv=notrunc 2>/dev/null"
        ));
        guest.vm.wait_for_log("its bus master enable is off");
        assert_ne!(guest.run(&ping).0, 0);
        for act in ["unbind", "bind"] {
            guest.ok(&format!(
                "echo {device} > /sys/bus/pci/drivers/virtio-pci/{act}"
            ));
        }
        tap.configure(&mut guest);
        guest.power_off();
    }
}

/// A guest that starts again has its interface again.
#[test]
fn a_reset_keeps_interfaces() {
    let tap = Tap::new(false);
    let net = format!("tap={}", tap.name);
    let cmdline = "console=ttyS0 quiet panic=-1 rvmm.action=sh";
    let rvmm = Rvmm::virtio(cmdline)
        .reboots()
        .args(["--net", net.as_str()]);
    let mut guest = Shell::of(rvmm);
    tap.configure(&mut guest);
    guest.vm.send("reboot -f\n");
    guest.vm.wait_for_times("rvmm-guest: userspace", 2);
    guest.restarted();
    tap.configure(&mut guest);
    guest.power_off();
}

#[test]
fn what_cannot_be_an_interface() {
    let refused = |net: &str, status, words: &[&str]| {
        let end = Rvmm::new()
            .args(["--kernel", "/guest/Image", "--net", net])
            .run();
        end.assert_one_line(status, words);
    };
    refused(
        "tap=nope",
        HOST_FAILED,
        &["nope", "ip tuntap add dev nope mode tap"],
    );
    refused("tap=lo", HOST_FAILED, &["\"lo\"", "not a tap"]);
    refused("tap=a,mac=1:2", USAGE, &["52:54:00:12:34:56"]);
    let tap = Tap::new(false);
    let net = format!("tap={}", tap.name);
    let mut guest = Shell::start(["--net", net.as_str()]);
    refused(&net, HOST_FAILED, &[&tap.name, "another process uses it"]);
    guest.ok("true");
    guest.power_off();
}
