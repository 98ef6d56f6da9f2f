//! Tests that devices go on behind the transports of another process, with the same interrupts and
//! doorbells.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use serde_json::{Value, json};

use super::*;
use crate::config::Mac;
use crate::devices::console::Console;
use crate::pci::saved_vectors;
use crate::snapshot::testing::{Part, survives_from};
use crate::snapshot::{LoadError, Parts, SaveError, Saved};
use crate::virtio::blk::{Disk, image::Image};
use crate::virtio::console::ConsolePort;
use crate::virtio::input::PowerKey;
use crate::virtio::net::{Net, tap::TapQueue};
use crate::virtio::rng::Rng;

type Make<'a> = &'a dyn Fn() -> Box<dyn VirtioDevice>;

/// The devices in the machine's order: a bridge, and the transport.
impl Guest {
    fn devices(&self) -> impl Iterator<Item = &dyn Device> {
        let bridge = self.bridge.as_deref().map(|bridge| bridge as _);
        bridge.into_iter().chain(self.device.as_deref())
    }

    /// Pauses the device, and returns a guest that goes on with its state, paused, with `device`.
    fn restored(&self, device: Box<dyn VirtioDevice>) -> Self {
        self.device.as_ref().unwrap().pause();
        let saved = self.save().unwrap();
        let guest = self.moved().with(device);
        let mut parts = Parts::new(saved.clone());
        guest.load(&mut parts).unwrap();
        parts.finish().unwrap();
        assert_eq!(guest.save().unwrap(), saved);
        guest
    }

    fn resume(&self) {
        self.device.as_ref().unwrap().resume();
    }
}

/// All devices as one part.
impl Part for Guest {
    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        let saved = self.devices().map(Device::save);
        Ok(saved.collect::<Result<Vec<_>, _>>()?.concat())
    }

    fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        self.devices().try_for_each(|device| device.load(parts))
    }
}

/// Registers of the common configuration over PCI.
const CONFIG_VECTOR: Register = (0x10, 2);
const QUEUE_VECTOR: Register = (0x1a, 2);

/// Lists with one entry for each queue, message or device, and whether a queue is enabled: a live
/// device has positions only for those.
const FIXED: [&str; 6] = [
    "/queues",
    "/live",
    "/enabled",
    "/queue_vectors",
    "/functions",
    "/messages",
];

/// A guest with a device behind each transport, set up by its driver and paused. The device has
/// this number of `queues`, and messages on PCI, which are masked.
fn set_up(make: Make, queues: usize) -> [Guest; 2] {
    [(MMIO, &MMIO_MAP), (BAR, &PCI_MAP)].map(|(base, map)| {
        let mut guest = Guest::new(base, map);
        guest.vectors = 3;
        let guest = guest.with(make());
        if base == BAR {
            guest.place(BAR);
            guest.use_messages(true);
            (0..2).for_each(|vector| guest.set_message(vector));
        }
        guest.make_ready_with(!(1 << 29), queues);
        if base == BAR {
            guest.set(CONFIG_VECTOR, 2);
            guest.set(guest.map.queue_select, 0);
            guest.set(QUEUE_VECTOR, 1);
        }
        guest.device.as_ref().unwrap().pause();
        guest
    })
}

#[test]
fn all_registers_survive() {
    for guest in set_up(&|| echo(), 2) {
        let first = guest.save().unwrap();
        survives_from(&first, || Box::new(guest.moved().with(echo())), &FIXED);
    }
}

/// A device without its registers.
struct Alone(Box<dyn VirtioDevice>);

impl Part for Alone {
    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        self.0.save()
    }

    fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        self.0.load(parts)
    }
}

/// Checks that the state of the device that `make` makes survives, and that both transports save
/// it. `fixed` are values that its new state must not change.
fn survives_behind_both(make: Make, queues: usize, fixed: &[&str]) {
    for guest in set_up(make, queues) {
        let saved = guest.restored(make()).save().unwrap();
        // The device's own state is the last.
        let own = make().save().unwrap().len();
        let first = &saved[saved.len() - own..];
        survives_from(first, || Box::new(Alone(make())), fixed);
    }
}

#[test]
fn an_rngs_state_survives() {
    survives_behind_both(&|| Box::<Rng>::default(), 1, &[]);
}

#[test]
fn a_consoles_state_survives() {
    let console = Arc::<Console>::default();
    let make = || -> Box<dyn VirtioDevice> {
        let size = Arc::new(|| Some([80, 25]));
        Box::new(ConsolePort::new(Arc::clone(&console), size))
    };
    survives_behind_both(&make, 2, &["/known_size"]);
}

#[test]
fn a_power_keys_state_survives() {
    let make = || -> Box<dyn VirtioDevice> { Box::new(PowerKey::new(Arc::default())) };
    survives_behind_both(&make, 2, &["/selected"]);
}

#[test]
fn an_interfaces_state_survives() {
    let tap = |_| {
        let (ours, _) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        Arc::new(TapQueue::of(File::from(OwnedFd::from(ours))))
    };
    let taps: Vec<_> = (0..3).map(tap).collect();
    let mac = Mac([2, 0, 0, 0, 0, 1]);
    let make = || -> Box<dyn VirtioDevice> {
        let taps = taps.clone();
        Box::new(Net::new("net0", "tap0", taps, mac, Some(1500), false))
    };
    survives_behind_both(&make, 7, &["/pairs"]);
}

#[test]
fn a_disks_state_survives() {
    let path = std::env::temp_dir().join(format!("rvmm-saved-{}", std::process::id()));
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let image = Image::open(&path.to_str().unwrap().parse().unwrap());
    std::fs::remove_file(path).unwrap();
    let image = Arc::new(image.unwrap());
    let make = || -> Box<dyn VirtioDevice> {
        let image = Arc::clone(&image);
        Box::new(Disk::new("disk0", image, 2))
    };
    let fixed = ["/size", "/block_size", "/queues", "/read_only"];
    survives_behind_both(&make, 2, &fixed);
}

#[test]
fn a_request_goes_on_in_the_next_process() {
    for guest in Guest::both() {
        guest.make_ready();
        guest.offer(0);
        guest.wait_until("the wire", Guest::is_high);
        let next = guest.restored(echo());
        drop(guest);
        assert!(next.is_high(), "the interrupt was not acknowledged");
        next.offer(1);
        assert_eq!((next.used(0), next.used(1)), (1, 0), "it is paused");
        next.resume();
        next.wait_until("the request", |g| g.used(1) == 1);
        assert_eq!(next.get(next.map.interrupt_status), 1);
        next.set_status(0);
        assert!(!next.is_high());
        next.works();
    }
}

#[test]
fn doorbells_and_messages_are_connected_again() {
    let guest = Guest::pci(3);
    (0..3).for_each(|vector| guest.set_message(vector));
    guest.mask(2);
    guest.use_messages(false);
    guest.make_ready();
    for queue in [0, 1] {
        guest.set(guest.map.queue_select, queue);
        guest.set(QUEUE_VECTOR, queue + 1);
    }
    guest.offer(1);
    guest.wait_until("a message of queue 1", |g| g.pending() != 0);
    let next = guest.restored(echo());
    assert_eq!(*lock(&next.vm.doorbells), *lock(&guest.vm.doorbells));
    assert_eq!(*lock(&next.vm.irqfds), *lock(&guest.vm.irqfds));
    assert_eq!(lock(&next.vm.tables).last(), lock(&guest.vm.tables).last());
    assert_eq!(next.pending(), 1 << 2);
    next.resume();
    next.offer(0);
    next.wait_until("a request", |g| g.used(0) == 1);
    assert!(!next.is_high());
    next.set_message(2);
    assert_eq!(next.pending(), 0, "the kernel takes it once it may");
}

/// A device that has lost the bus is stopped. Its messages wait.
#[test]
fn without_the_bus_nothing_is_connected() {
    let guest = Guest::pci(3);
    guest.use_messages(false);
    (0..3).for_each(|vector| guest.set_message(vector));
    guest.works();
    guest.set_command(MEMORY);
    let next = guest.restored(echo());
    next.resume();
    assert_eq!(next.status(), u64::from(READY | BROKEN));
    assert!(lock(&next.vm.irqfds).is_empty());
    next.set_command(MEMORY | BUS_MASTER);
    assert_eq!(lock(&next.vm.irqfds).len(), 3);
    next.set_status(0);
    next.works();
}

/// Loads the state of a set-up guest with `vectors` messages into another one, with the value at
/// `path` of the state of this kind replaced. Returns the error's message.
fn load_with(vectors: u16, kind: &str, path: &str, value: &Value) -> Option<String> {
    let guest = Guest::pci(vectors);
    guest.make_ready();
    guest.device.as_ref().unwrap().pause();
    let mut saved = guest.save().unwrap();
    let saved_kind = saved.iter_mut().find(|saved| saved.kind == kind).unwrap();
    let mut state: Value = serde_json::from_slice(&saved_kind.json).unwrap();
    *state.pointer_mut(path).expect(path) = value.clone();
    saved_kind.json = serde_json::to_vec(&state).unwrap();
    let next = guest.moved().with(echo());
    let loaded = next.load(&mut Parts::new(saved));
    loaded.err().map(|error| error.to_string())
}

#[test]
fn hostile_state_is_refused() {
    let message = json!({"address": 0, "data": 0, "masked": true, "pending": false});
    let function = json!({"config": {"bytes": {}}, "messages": []});
    for (vectors, kind, path, value, why) in [
        (3, "virtio-pci", "/isr", json!(4), "unknown bits"),
        (3, "virtio-pci", "/config_vector", json!(3), "has 3 of them"),
        (3, "virtio-pci", "/queue_vectors/1", json!(99), "vector 99"),
        (
            0,
            "virtio-pci",
            "/queue_vectors/0",
            json!(0),
            "has 0 of them",
        ),
        (3, "virtio-pci", "/queue_vectors", json!([1]), "and 2 now"),
        (3, "pci-host", "/functions", json!([]), "0 devices in the"),
        (3, "pci-host", "/functions/0", function, "device 1"),
        (3, "pci-host", "/functions/0/messages", json!([]), "3 now"),
        (
            0,
            "pci-host",
            "/functions/0/messages",
            json!([message]),
            "only a pin",
        ),
        (
            3,
            "pci-host",
            "/functions/0/messages/0/address",
            json!(6),
            "not aligned",
        ),
        (
            3,
            "pci-host",
            "/functions/0/config/bytes",
            json!({}),
            "missing",
        ),
        (
            3,
            "pci-host",
            "/functions/0/config/bytes/5",
            json!(1),
            "cannot be",
        ),
        (
            3,
            "pci-host",
            "/config/bytes",
            json!({"4": 0, "0": 1}),
            "cannot change",
        ),
        (
            3,
            "pci-host",
            "/functions/0/config/bytes/4",
            json!(2),
            "bus master",
        ),
    ] {
        let line = load_with(vectors, kind, path, &value);
        let line = line.unwrap_or_else(|| panic!("{kind}{path} {value} was taken"));
        assert!(line.contains(why), "{kind}{path} {value}: {line}");
    }
}

/// BARs may be anywhere, as with a guest.
#[test]
fn hostile_places_of_bars() {
    for byte in [0, 0x3f, 0x50, 0xff] {
        let path = "/functions/0/config/bytes/19";
        assert_eq!(load_with(3, "pci-host", path, &json!(byte)), None);
    }
}

#[test]
fn the_number_of_messages_is_in_the_snapshot() {
    for vectors in [0, 2, 3] {
        let guest = Guest::pci(vectors);
        let bridge = Device::save(guest.bridge.as_deref().unwrap()).unwrap();
        let mut saved = Parts::new(bridge);
        assert_eq!(saved_vectors(&mut saved).unwrap(), [usize::from(vectors)]);
    }
    assert!(saved_vectors(&mut Parts::default()).is_err());
}
