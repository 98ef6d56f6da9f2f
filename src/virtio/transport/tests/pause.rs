//! Tests pauses through the transports, as the machine pauses its devices.

use super::*;

/// The device serves requests from during the pause after it. An interrupt that is not acknowledged
/// stays pending.
#[test]
fn a_device_pauses_behind_its_registers() {
    for guest in Guest::both() {
        let device = guest.device.clone().unwrap();
        assert_eq!(device.id(), "echo");
        guest.make_ready();
        guest.offer(0);
        guest.wait_until("the wire", Guest::is_high);
        device.pause();
        let described = device.describe();
        assert_eq!(described["paused"], true);
        assert_eq!(described["interrupt_status"], 1);
        guest.offer(1);
        assert_eq!(guest.status(), u64::from(READY));
        assert_eq!((guest.used(0), guest.used(1)), (1, 0));
        assert!(guest.is_high());
        device.resume();
        guest.wait_until("the request", |g| g.used(1) == 1);
        guest.set_status(0);
        guest.works();
    }
}

/// A machine may end while its devices are paused.
#[test]
fn a_paused_device_can_go() {
    for guest in Guest::both() {
        guest.works();
        guest.device.as_ref().unwrap().pause();
    }
}

#[test]
fn a_device_on_pci_has_no_node_of_its_own() {
    let guest = Guest::pci(3);
    let device = guest.device.as_ref().unwrap();
    let mut tree = FdtWriter::new().unwrap();
    let root = tree.begin_node("").unwrap();
    device.fdt_node(&mut tree).unwrap();
    tree.end_node(root).unwrap();
    let mut empty = FdtWriter::new().unwrap();
    let root = empty.begin_node("").unwrap();
    empty.end_node(root).unwrap();
    assert_eq!(tree.finish().unwrap(), empty.finish().unwrap());
    assert_eq!(device.registers_at(BAR), None, "the bridge knows them");
    assert_eq!(device.describe()["slot"], 1);
}
