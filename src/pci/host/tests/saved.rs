//! Tests that a bus goes on in another process.

use super::*;
use crate::snapshot::testing::{Part, survives_from};

const MSIX_MASK: u32 = 1 << 30;

/// A bus with two devices, the second one with messages, as a guest has set it up.
fn set_up() -> Machine {
    let machine = machine(&[0, 3]);
    machine.place(1, WINDOW);
    machine.place(2, WINDOW + 0x8000);
    machine.set_config(0, 4, BUS_MASTER);
    machine.set_config(1, 4, MEMORY | INTX_DISABLE);
    machine.set_config(2, 4, MEMORY | BUS_MASTER);
    machine.set_config(2, 0x3c, 35);
    let at = machine.msix(2).unwrap();
    machine.set_config(2, at, MSIX_ENABLE);
    for vector in 0..2u64 {
        let entry = WINDOW + 0xc000 + 16 * vector;
        machine.bus.write(entry, &0x2800_0000u64.to_le_bytes());
        machine.bus.write(entry + 8, &(7 + vector).to_le_bytes());
    }
    machine.interrupts[1].message(2);
    machine
}

/// A new bus with the same devices. Unlike that of [`machine`], it ends when it is dropped.
fn new() -> Box<HostBridge> {
    let (vm, levels) = (Arc::default(), Arc::default());
    let mut bridge = bridge(&vm, &levels);
    plug(&mut bridge, 0).unwrap();
    plug(&mut bridge, 3).unwrap();
    Box::new(bridge)
}

/// While the function's messages are masked, any of them can be pending.
#[test]
fn all_that_a_guest_can_change_survives() {
    let machine = set_up();
    let at = machine.msix(2).unwrap();
    machine.set_config(2, at, MSIX_ENABLE | MSIX_MASK);
    let first = Part::save(machine.bridge.as_ref()).unwrap();
    survives_from(&first, new, &["/functions", "/messages"]);
}

#[test]
fn everything_is_where_it_was() {
    let before = set_up();
    let saved = Part::save(before.bridge.as_ref()).unwrap();
    let after = machine(&[0, 3]);
    let mut parts = Parts::new(saved.clone());
    Part::load(after.bridge.as_ref(), &mut parts).unwrap();
    parts.finish().unwrap();
    assert_eq!(Part::save(after.bridge.as_ref()).unwrap(), saved);
    let [first, second] = [0, 1].map(|device: usize| &after.devices[device]);
    assert_eq!(first.take_moves(), [Some(WINDOW)]);
    assert_eq!(second.take_moves(), [Some(WINDOW + 0x8000)]);
    assert!(lock(&first.mastered).is_empty());
    assert_eq!(*lock(&second.mastered), [true]);
    assert_eq!(*lock(&after.vm.irqfds), *lock(&before.vm.irqfds));
    assert_eq!(lock(&after.vm.tables).len(), 1, "one table for all of them");
    assert_eq!(lock(&after.vm.tables)[0], lock(&before.vm.tables)[1]);
    assert_eq!(after.bus.read(WINDOW + 0xd000, 8), 0b100);
    assert!(after.interrupts[1].uses_messages());
    for device in 0..3 {
        for offset in (0..256).step_by(4) {
            let (now, then) = (after.config(device, offset), before.config(device, offset));
            assert_eq!(now, then, "device {device}, {offset:#x}");
        }
    }
    // INTx disable holds the pin back.
    after.interrupts[0].set_pin(true);
    assert_eq!(*lock(&after.levels.0), []);
    after.set_config(1, 4, MEMORY);
    assert_eq!(*lock(&after.levels.0), [(33, true)]);
}

#[test]
fn hostile_counts_are_refused() {
    let saved = Part::save(set_up().bridge.as_ref()).unwrap();
    for (vectors, why) in [
        (&[0][..], "it has 2 devices in the snapshot, and 1 now"),
        (&[0, 3, 0], "it has 2 devices in the snapshot, and 3 now"),
        (
            &[0, 2],
            "PCI device 2: it has 3 messages in the snapshot, and 2 now",
        ),
        (
            &[0, 0],
            "PCI device 2: it has messages in the snapshot, and only a pin now",
        ),
        (
            &[1, 3],
            "PCI device 1: it has 0 messages in the snapshot, and 1 now",
        ),
    ] {
        let other = machine(vectors);
        let loaded = Part::load(other.bridge.as_ref(), &mut Parts::new(saved.clone()));
        assert_eq!(loaded.unwrap_err().to_string(), why);
    }
    assert!(
        bridge(&Arc::default(), &Arc::default())
            .interrupts(257)
            .is_err()
    );
}
