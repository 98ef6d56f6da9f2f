//! Snapshots of what has changed: under load, and of RAM in huge pages.

use std::net::TcpListener;
use std::thread;

use crate::common::disk::{MIB, disk, random};
use crate::common::freezing::*;
use crate::common::hugepages::HugePages;
use crate::common::net::{Tap, send, transfer};
use crate::common::{Rvmm, Shell, measured};

/// A snapshot with everything, and three with changes after it.
const PARTS: [(&str, &str); 4] = [
    ("base", "--track"),
    ("one", "--diff"),
    ("two", "--diff"),
    ("three", "--diff"),
];

/// Merges all parts, and restores the result.
fn merged(freezer: &Freezer) -> Shell {
    let dirs = PARTS.map(|(name, _)| text(&freezer.path(name)));
    let words = ["snapshot", "merge"].map(String::from).into_iter();
    let into = ["--into".into(), text(&freezer.path("whole"))];
    printed(words.chain(dirs).chain(into));
    printed(["snapshot", "verify", &text(&freezer.path("whole"))]);
    let mut guest = Shell::restored(freezer.thaw("whole").args(freezer.ctl("ctl")).spawn());
    guest.vm.allow_seconds(600);
    guest
}

/// Receives a MiB to a file, which has the sum of what was sent.
fn receive(tap: &Tap, guest: &mut Shell, file: &str) {
    let listener = TcpListener::bind((tap.address(1), 0)).expect("listen");
    let port = listener.local_addr().expect("its address").port();
    let host = tap.address(1);
    thread::scope(|scope| {
        let sent = scope.spawn(|| send(&listener, |number| number < 1));
        let received = guest.ok(&format!(
            "nc {host} {port} </dev/null >{file}; md5sum <{file} | cut -c1-32"
        ));
        assert_eq!(received, sent.join().expect("the sender"));
    });
}

/// A guest whose network vhost serves. While changes are tracked, rvmm serves it. RAM gets pages
/// from the network, from the disk, and pages that were not zero and are now.
#[test]
fn changes_under_load_with_vhost() {
    let (freezer, tap) = (Freezer::new(), Tap::new(false));
    let image = freezer.scratch.file("image", random(2 * MIB));
    let [flag, value] = disk(&image, "");
    let net = format!("tap={},vhost", tap.name);
    let rvmm = Rvmm::virtio(CMDLINE).args([&flag, &value, "--net", &net, "--cpus", "2"]);
    let mut guest = Shell::of(rvmm.args(freezer.ctl("ctl")));
    guest.vm.allow_seconds(600);
    tap.configure(&mut guest);
    start_counting(&mut guest);
    guest.ok("mkdir /tmp/kept; dd if=/dev/urandom of=/tmp/kept/zero bs=1M count=4 2>/dev/null");
    guest.ok("(while :; do dd if=/dev/vda of=/tmp/read bs=64k iflag=direct 2>/dev/null; done) &");
    let mut before = 0;
    for (number, (name, how)) in PARTS.into_iter().enumerate() {
        receive(&tap, &mut guest, &format!("/tmp/kept/net-{name}"));
        let zero = "dd if=/dev/zero of=/tmp/kept/zero bs=1M count=1 conv=notrunc";
        guest.ok(&format!("{zero} seek={number} 2>/dev/null"));
        let read = "dd if=/dev/vda bs=64k iflag=direct";
        guest.ok(&format!("{read} of=/tmp/kept/disk-{name} 2>/dev/null"));
        transfer(&tap, &mut guest, 1);
        before = count(&mut guest);
        let said = freezer.freeze("ctl", name, &[how]);
        measured(&format!("{how} under load: {said}"));
    }
    let sums = guest.ok("md5sum /tmp/kept/*");
    kill(guest.vm);
    let mut guest = merged(&freezer);
    let after = count(&mut guest);
    assert!(before <= after, "{before}, {after}");
    assert_eq!(guest.ok("md5sum /tmp/kept/*"), sums);
    assert!(count(&mut guest) > after);
    transfer(&tap, &mut guest, 2);
    kernel_is_content(&mut guest);
    guest.power_off();
}

/// Linux 6.12 fails if a guest writes to a huge page that it has touched before it was tracked.
#[test]
fn changes_in_huge_pages() {
    const MEM: &str = "128M,hugepages=2M";
    let _pages = HugePages::reserve(64);
    let freezer = Freezer::new();
    let rvmm = Rvmm::virtio(CMDLINE).args(["--mem", MEM]);
    let mut guest = Shell::of(rvmm.args(freezer.ctl("ctl")));
    start_counting(&mut guest);
    guest.ok("dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null");
    freezer.freeze("ctl", "live", &["--live"]);
    for (name, how) in PARTS {
        guest.ok("dd if=/dev/urandom of=/tmp/data bs=1M seek=3 count=1 conv=notrunc 2>/dev/null");
        let said = freezer.freeze("ctl", name, &[how]);
        measured(&format!("{how} of huge pages: {said}"));
    }
    let sum = guest.ok("md5sum /tmp/data");
    let before = count(&mut guest);
    // Untracked again, it goes on in huge pages.
    freezer.freeze("ctl", "all", &[]);
    guest.ok("dd if=/dev/urandom of=/tmp/other bs=1M count=4 2>/dev/null");
    assert!(count(&mut guest) >= before);
    kernel_is_content(&mut guest);
    kill(guest.vm);

    let mut guest = merged(&freezer);
    assert_eq!(guest.ok("md5sum /tmp/data"), sum);
    // The restored one, too, can be tracked.
    freezer.freeze("ctl", "again", &["--track"]);
    guest.ok("dd if=/dev/urandom of=/tmp/data bs=1M count=8 conv=notrunc 2>/dev/null");
    freezer.freeze("ctl", "diff", &["--diff"]);
    assert!(count(&mut guest) > 0);
    kernel_is_content(&mut guest);
    guest.power_off();
}
