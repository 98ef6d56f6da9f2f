//! Tests PCI's bus master enable: without it a device does not write to memory.

use super::*;

/// After a kexec, the next kernel finds devices that no longer write to its memory.
#[test]
fn a_device_that_loses_the_bus_stops() {
    for vectors in [0, 3] {
        let guest = Guest::pci(vectors);
        if vectors > 0 {
            guest.use_messages(false);
            (0..3).for_each(|vector| guest.set_message(vector));
        }
        guest.works();
        if vectors == 0 {
            guest.wait_until("the wire", Guest::is_high);
        }
        guest.set_command(MEMORY);
        assert_eq!(guest.status(), u64::from(READY | BROKEN));
        assert!(!guest.is_high());
        assert!(
            lock(&guest.vm.irqfds).is_empty(),
            "a message writes to memory too"
        );
        guest.set(guest.map.notify[0], 0);
        guest.set_command(MEMORY | BUS_MASTER);
        assert_eq!(guest.status(), u64::from(READY | BROKEN));
        assert_eq!(lock(&guest.vm.irqfds).len(), usize::from(vectors));
        guest.set_status(0);
        guest.works();
    }
}

#[test]
fn a_driver_that_is_ready_waits_for_the_bus() {
    let (device, taken) = Taker::new();
    let guest = Guest::pci_of(device, 0);
    guest.set_command(MEMORY);
    guest.set_status(3);
    guest.set(guest.map.driver_select, 1);
    guest.set(guest.map.driver_features, 1);
    guest.set_status(NEGOTIATED);
    guest.set_up(0);
    guest.set_status(READY);
    assert_eq!(guest.status(), u64::from(READY));
    assert!(
        taken.try_recv().is_err(),
        "started without bus master enable"
    );
    guest.set_command(MEMORY | BUS_MASTER);
    assert_eq!(taken.recv().unwrap().len(), 1);
    // The device starts only once.
    guest.set_command(MEMORY | BUS_MASTER);
    guest.set_status(0);
    assert!(taken.try_recv().is_err());
}

/// Bus master enable does not affect a device that was not running.
#[test]
fn a_device_at_rest_does_not_notice_the_bus() {
    let guest = Guest::pci(0);
    for status in [0, 1, 3] {
        guest.set_status(status);
        guest.set_command(MEMORY);
        assert_eq!(guest.status(), u64::from(status));
        guest.set_command(MEMORY | BUS_MASTER);
    }
    guest.set_status(0);
    guest.works();
}

#[test]
fn hostile_the_bus_is_taken_at_any_moment() {
    let guest = Guest::pci(0);
    for round in 0..200 {
        guest.make_ready();
        guest.offer(round % 2);
        guest.set_command(MEMORY);
        let used = [0, 1].map(|queue| guest.used(queue));
        guest.set(guest.map.notify[0], 0);
        guest.set_command(MEMORY | BUS_MASTER);
        assert_eq!([0, 1].map(|queue| guest.used(queue)), used);
        guest.set_status(0);
    }
    guest.works();
}
