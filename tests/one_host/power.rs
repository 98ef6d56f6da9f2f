//! SIGTERM that asks the guest to power off: `--on-sigterm poweroff`.
#![cfg(target_arch = "riscv64")]

use crate::common::files::debian;
use crate::common::{POWERED_OFF, Rvmm, Shell, TERMINATED};

const SH: &str = "console=ttyS0 quiet panic=-1 rvmm.action=sh";

/// Without a driver for the key, rvmm sends SysRq on the UART, which Linux supports.
#[test]
fn sysrq_powers_off() {
    let linux = Rvmm::linux().args(["--cmdline", SH, "--on-sigterm", "poweroff"]);
    let guest = Shell::of(linux);
    guest.vm.terminate();
    guest.vm.wait_for_log("SysRq to its UART");
    guest.vm.finish().assert_status(POWERED_OFF);
}

/// A program that reads the key's input device gets its events. The guest then ends in its own way.
#[test]
fn the_power_key_is_pressed() {
    for transport in ["pci", "mmio"] {
        let mut guest = Shell::start(["--on-sigterm", "poweroff", "--transport", transport]);
        assert_eq!(
            guest.ok("cat /sys/class/input/event0/device/name"),
            "rvmm power key"
        );
        // Four events of 24 bytes. The last eight of each are type, code and value.
        guest.vm.send(
            "exec 3</dev/input/event0; echo listening; \
             head -c 96 <&3 | od -An -v -tx1 -w24 | cut -c 49-; poweroff -f\n",
        );
        guest.vm.wait_for("listening\r");
        guest.vm.terminate();
        guest.vm.wait_for_log("pressed the guest's power key");
        let end = guest.vm.finish();
        end.assert_status(POWERED_OFF);
        for event in [" 01 00 74 00 01 00 00 00\r", " 01 00 74 00 00 00 00 00\r"] {
            assert!(end.console.contains(event), "{event:?}");
        }
    }
}

#[test]
fn systemd_powers_off() {
    let root = format!("{},snapshot=on", debian().display());
    let mut vm = Rvmm::virtio("console=ttyS0 quiet panic=-1 root=/dev/vda")
        .args(["--mem", "512M", "--cpus", "2", "--disk", &root])
        .args(["--on-sigterm", "poweroff,timeout=10m"])
        .spawn();
    vm.allow_seconds(900);
    vm.wait_for("rvmm-debian login: ");
    vm.send("root\n");
    vm.wait_for(":~# ");
    // The first login at the latest starts it, but does not wait for it.
    vm.send("systemctl start systemd-logind && echo logind runs\n");
    vm.wait_for("logind runs\r");
    vm.terminate();
    vm.wait_for_log("pressed the guest's power key");
    vm.finish().assert_status(POWERED_OFF);
}

/// A guest that ignores both the key and SysRq.
#[test]
fn a_guest_that_goes_on_is_ended() {
    let spin = |how| Rvmm::guest("spin").args(["--on-sigterm", how]).spawn();
    let timely = spin("poweroff,timeout=1s");
    timely.wait_for("spinning\n");
    timely.terminate();
    timely.finish().assert_status(TERMINATED);
    let impatient = spin("poweroff,timeout=1d");
    impatient.wait_for("spinning\n");
    impatient.terminate();
    impatient.wait_for_log("SysRq to its UART");
    impatient.terminate();
    impatient.finish().assert_status(TERMINATED);
}
