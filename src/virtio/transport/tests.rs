//! Tests both transports through their registers, by a guest's loads and stores.

mod bus_master;
mod pause;
mod saved;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::mmio::{self, MmioTransport};
use super::pci::PciTransport;
use super::starter::Starter;
use crate::bus::{Bus, Device, FdtWriter, IrqLine, IrqSink};
use crate::config::MemConfig;
use crate::hypervisor::fake::FakeVm;
use crate::hypervisor::{Doorbell, Vm};
use crate::irqchip::Messages;
use crate::irqchip::msi::MsiRouter;
use crate::memory::{self, GuestMemory};
use crate::pci::HostBridge;
use crate::pci::host::ECAM_SIZE;
use crate::util::ByteSize;
use crate::util::sync::lock;
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::*;

const MMIO: u64 = 0x1000_1000;
const ECAM: u64 = 0x3000_0000;
const BAR: u64 = 0x4001_0000;
/// Configuration space of the first device on the bus.
const CONFIG: u64 = ECAM + (1 << 15);
/// Bits of its command register.
const MEMORY: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;

/// A register: its offset and width.
type Register = (u64, usize);

/// Addresses of the registers that both transports have.
struct Map {
    device_select: Register,
    device_features: Register,
    driver_select: Register,
    driver_features: Register,
    status: Register,
    queue_select: Register,
    queue_size: Register,
    queue_enable: Register,
    rings: [u64; 3],
    interrupt_status: Register,
    config: u64,
    notify: [Register; 2],
}

/// See VIRTIO 1.2, section 4.2.2.
const MMIO_MAP: Map = Map {
    device_select: (0x14, 4),
    device_features: (0x10, 4),
    driver_select: (0x24, 4),
    driver_features: (0x20, 4),
    status: (0x70, 4),
    queue_select: (0x30, 4),
    queue_size: (0x38, 4),
    queue_enable: (0x44, 4),
    rings: [0x80, 0x90, 0xa0],
    interrupt_status: (0x60, 4),
    config: 0x100,
    notify: [(0x50, 4), (0x50, 4)],
};

/// See section 4.1.4.3. The parts are where rvmm's capabilities place them.
const PCI_MAP: Map = Map {
    device_select: (0x00, 4),
    device_features: (0x04, 4),
    driver_select: (0x08, 4),
    driver_features: (0x0c, 4),
    status: (0x14, 1),
    queue_select: (0x16, 2),
    queue_size: (0x18, 2),
    queue_enable: (0x1c, 2),
    rings: [0x20, 0x28, 0x30],
    interrupt_status: (0x1000, 1),
    config: 0x2000,
    notify: [(0x3000, 2), (0x3004, 2)],
};

/// The level of the interrupt wire.
#[derive(Default)]
struct Wire(Mutex<bool>);

impl IrqSink for Wire {
    fn set_level(&self, _: u32, high: bool) {
        let before = std::mem::replace(&mut *lock(&self.0), high);
        assert_ne!(before, high, "the level must change");
    }
    fn fdt_interrupt(&self, source: u32) -> Vec<u32> {
        vec![0x1000, source, 4]
    }
}

/// A guest with an [`Echo`] device behind a transport, whose registers are at `base`.
struct Guest {
    bus: Bus,
    vm: Arc<FakeVm>,
    wire: Arc<Wire>,
    ram: Arc<GuestMemory>,
    base: u64,
    map: &'static Map,
    /// The number of MSI-X vectors.
    vectors: u16,
    starter: Arc<Starter>,
    /// The transport as the machine sees it.
    device: Option<Arc<dyn Device>>,
    bridge: Option<Arc<HostBridge>>,
}

impl Guest {
    fn new(base: u64, map: &'static Map) -> Self {
        let config = MemConfig::new(ByteSize::mib(4));
        let ram = memory::create(GuestAddress(RAM), config, memory::Backing::Private);
        Self {
            bus: Bus::default(),
            vm: Arc::default(),
            wire: Arc::default(),
            ram: ram.unwrap(),
            base,
            map,
            vectors: 0,
            starter: Starter::new().unwrap(),
            device: None,
            bridge: None,
        }
    }

    /// A guest on another host, without a device. It has the same RAM.
    fn moved(&self) -> Self {
        Self {
            bus: Bus::default(),
            vm: Arc::default(),
            wire: Arc::default(),
            ram: Arc::clone(&self.ram),
            starter: Arc::clone(&self.starter),
            device: None,
            bridge: None,
            ..*self
        }
    }

    fn mmio() -> Self {
        Self::new(MMIO, &MMIO_MAP).with(echo())
    }

    /// Returns a guest with [`Echo`] on PCI, with `vectors` MSI-X vectors and its BAR placed.
    fn pci(vectors: u16) -> Self {
        Self::pci_of(echo(), vectors)
    }

    fn pci_of(device: Box<dyn VirtioDevice>, vectors: u16) -> Self {
        let mut guest = Self::new(BAR, &PCI_MAP);
        guest.vectors = vectors;
        let guest = guest.with(device);
        guest.place(BAR);
        guest
    }

    /// Attaches `device`.
    fn with(self, device: Box<dyn VirtioDevice>) -> Self {
        match self.base {
            MMIO => self.with_mmio(device),
            _ => self.with_pci(device),
        }
    }

    fn with_mmio(mut self, device: Box<dyn VirtioDevice>) -> Self {
        let line = IrqLine::new(Arc::clone(&self.wire) as _, 8);
        let vm: Arc<dyn Vm> = Arc::clone(&self.vm) as _;
        let transport = MmioTransport::new(device, &self.ram, &vm, MMIO, line, &self.starter);
        let transport = transport.unwrap();
        self.device = Some(Arc::clone(&transport) as _);
        let registers = MMIO..MMIO + mmio::SIZE;
        self.bus.insert(registers, transport).unwrap();
        self
    }

    fn with_pci(mut self, device: Box<dyn VirtioDevice>) -> Self {
        let wires = [32, 33, 34, 35].map(|n| IrqLine::new(Arc::clone(&self.wire) as _, n));
        let messages = Messages {
            router: MsiRouter::new(Arc::clone(&self.vm) as _),
            phandle: 1,
            vectors: 8,
        };
        let window = 0x4000_0000..0x5000_0000;
        let mut bridge = HostBridge::new(ECAM..ECAM + ECAM_SIZE, window, wires, Some(messages));
        let vm: Arc<dyn Vm> = Arc::clone(&self.vm) as _;
        let (ram, vectors, starter) = (&self.ram, self.vectors, &self.starter);
        let transport = PciTransport::attach(device, ram, &vm, &mut bridge, vectors, starter);
        self.device = Some(transport.unwrap());
        let bridge = Arc::new(bridge);
        for (range, device) in bridge.on_bus() {
            self.bus.insert(range, device).unwrap();
        }
        self.bridge = Some(bridge);
        self
    }

    /// Returns a guest for each transport; the one on PCI uses its pin.
    fn both() -> [Self; 2] {
        [Self::mmio(), Self::pci(0)]
    }

    fn place(&self, base: u64) {
        let base = u32::try_from(base).unwrap();
        self.bus.write(CONFIG + 0x10, &base.to_le_bytes());
        self.set_command(MEMORY | BUS_MASTER);
    }

    fn set_command(&self, command: u16) {
        self.bus.write(CONFIG + 4, &command.to_le_bytes());
    }

    fn get(&self, (offset, width): Register) -> u64 {
        self.bus.read(self.base + offset, width)
    }

    fn set(&self, (offset, width): Register, value: u64) {
        let bytes = value.to_le_bytes();
        self.bus.write(self.base + offset, &bytes[..width]);
    }

    fn status(&self) -> u64 {
        self.get(self.map.status)
    }

    fn set_status(&self, status: u8) {
        self.set(self.map.status, status.into());
    }

    /// Accepts all features, sets both queues up as in [`rings`], and sets DRIVER_OK.
    fn make_ready(&self) {
        self.make_ready_with(u64::MAX, 2);
    }

    /// As [`Guest::make_ready`], but accepts only those of `features` that are offered, and sets up
    /// this number of `queues`.
    fn make_ready_with(&self, features: u64, queues: usize) {
        let map = self.map;
        self.set_status(3);
        for half in [0, 1] {
            self.set(map.device_select, half);
            self.set(map.driver_select, half);
            let features = (features >> (32 * half)) & 0xffff_ffff;
            self.set(
                map.driver_features,
                self.get(map.device_features) & features,
            );
        }
        self.set_status(NEGOTIATED);
        for queue in 0..queues {
            self.set_up(queue);
        }
        self.set_status(READY);
        assert_eq!(self.status(), u64::from(READY));
    }

    fn set_up(&self, queue: usize) {
        let map = self.map;
        self.set(map.queue_select, queue as u64);
        self.set(map.queue_size, SIZE.into());
        for (register, address) in map.rings.into_iter().zip(rings(queue)) {
            self.set((register, 4), address & 0xffff_ffff);
            self.set((register + 4, 4), address >> 32);
            self.ram
                .write_slice(&[0; 512], GuestAddress(address))
                .unwrap();
        }
        self.set(map.queue_enable, 1);
        assert_eq!(self.get(map.queue_enable), 1);
    }

    /// Offers a request for 8 bytes, the first one on `queue`.
    fn offer(&self, queue: usize) {
        let [table, avail, _] = rings(queue);
        let mut desc = [0; 16];
        desc[..8].copy_from_slice(&BUFFERS.to_le_bytes());
        desc[8] = 8;
        desc[12..14].copy_from_slice(&WRITE.to_le_bytes());
        self.ram.write_slice(&desc, GuestAddress(table)).unwrap();
        self.ram.write_obj(1u16, GuestAddress(avail + 2)).unwrap();
        self.set(self.map.notify[queue], queue as u64);
    }

    fn used(&self, queue: usize) -> u16 {
        self.ram
            .read_obj(GuestAddress(rings(queue)[2] + 2))
            .unwrap()
    }

    fn is_high(&self) -> bool {
        *lock(&self.wire.0)
    }

    #[track_caller]
    fn wait_until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done(self) {
            assert!(Instant::now() < deadline, "timed out waiting for {what}");
            std::thread::yield_now();
        }
    }

    #[track_caller]
    fn works(&self) {
        self.make_ready();
        for queue in [0, 1] {
            self.offer(queue);
            self.wait_until("a used buffer", |g| g.used(queue) == 1);
        }
    }

    /// Writes `vector`'s entry in the MSI-X table, unmasked.
    fn set_message(&self, vector: u64) {
        let entry = 0x4000 + 16 * vector;
        self.set((entry, 4), 0x2800_0000);
        self.set((entry + 8, 4), 1 + vector);
        self.set((entry + 12, 4), 0);
    }

    /// Sets the mask bit of `vector`'s entry.
    fn mask(&self, vector: u64) {
        self.set((0x4000 + 16 * vector + 12, 4), 1);
    }

    /// Enables MSI-X, with the function mask set or cleared.
    fn use_messages(&self, masked: bool) {
        let mut at = self.bus.read(CONFIG + 0x34, 1);
        while self.bus.read(CONFIG + at, 1) != 0x11 {
            at = self.bus.read(CONFIG + at + 1, 1);
        }
        let control = if masked { 0xc0 } else { 0x80 };
        self.bus.write(CONFIG + at + 3, &[control]);
    }

    /// Reads the MSI-X pending bits.
    fn pending(&self) -> u64 {
        self.get((0x5000, 8))
    }
}

#[test]
fn a_request_raises_the_wire_until_it_is_acknowledged() {
    for guest in Guest::both() {
        guest.make_ready();
        assert!(!guest.is_high());
        guest.offer(1);
        guest.wait_until("the wire", Guest::is_high);
        assert_eq!((guest.used(0), guest.used(1)), (0, 1));
        let bytes: [u8; 8] = guest.ram.read_obj(GuestAddress(BUFFERS)).unwrap();
        assert_eq!(bytes, [0xee; 8]);
        assert_eq!(guest.get(guest.map.interrupt_status), 1);
        // Over PCI the read of the ISR status itself acknowledges.
        if guest.base == MMIO {
            assert!(guest.is_high());
            guest.set((0x64, 4), 1);
        }
        assert!(!guest.is_high());
        assert_eq!(guest.get(guest.map.interrupt_status), 0);
    }
}

#[test]
fn a_broken_queue_is_told_as_a_change_of_configuration() {
    for guest in Guest::both() {
        guest.make_ready();
        let avail = GuestAddress(rings(0)[1] + 2);
        guest.ram.write_obj(SIZE + 1, avail).unwrap();
        guest.set(guest.map.notify[0], 0);
        guest.wait_until("DEVICE_NEEDS_RESET", |g| {
            g.status() & u64::from(BROKEN) != 0
        });
        guest.wait_until("the wire", Guest::is_high);
        assert_eq!(guest.get(guest.map.interrupt_status), 2);
    }
}

#[test]
fn a_reset_takes_everything_back() {
    for guest in Guest::both() {
        guest.works();
        guest.wait_until("the wire", Guest::is_high);
        guest.set_status(0);
        assert_eq!(guest.status(), 0);
        assert!(!guest.is_high());
        assert_eq!(guest.get(guest.map.interrupt_status), 0);
        assert_eq!(guest.get(guest.map.queue_enable), 0);
        guest.works();
    }
}

#[test]
fn configuration_takes_any_width() {
    for guest in Guest::both() {
        let config = guest.map.config;
        assert_eq!(guest.get((config, 8)), u64::from_le_bytes(*b"abcdefgh"));
        assert_eq!(guest.get((config + 5, 1)), u64::from(b'f'));
        assert_eq!(guest.get((config + 7, 2)), u64::from(b'h'));
        assert_eq!(guest.get((config + 64, 4)), 0);
        guest.set((config, 4), u64::MAX);
        assert_eq!(
            guest.get((config, 1)),
            u64::from(b'a'),
            "space is read-only"
        );
    }
}

#[test]
fn what_is_no_register_reads_zero_and_writes_nothing() {
    for guest in Guest::both() {
        guest.set_status(3);
        let (offset, width) = guest.map.status;
        for width in [1, 2, 4, 8].into_iter().filter(|other| *other != width) {
            assert_eq!(guest.get((offset, width)), 0, "{width} bytes");
            guest.set((offset, width), 0);
        }
        assert_eq!(guest.status(), 3);
        guest.set(guest.map.queue_select, 2);
        assert_eq!(guest.get(guest.map.queue_size), 0);
        guest.set(guest.map.queue_enable, 1);
        assert_eq!(guest.get(guest.map.queue_enable), 0);
    }
}

#[test]
fn hostile_accesses_at_random() {
    for guest in Guest::both() {
        guest.make_ready();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..20_000 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let width = 1 << ((state >> 60) & 3);
            let mut offset = (state >> 32) & 0xfff;
            if guest.base == BAR {
                offset |= (state >> 16) & 0x7000;
            }
            offset &= !(width as u64 - 1);
            guest.get((offset, width));
            guest.set((offset, width), state & 0xff0f);
        }
        guest.set_status(0);
        guest.works();
    }
}

#[test]
fn notifications_over_mmio_are_the_kernels() {
    let guest = Guest::mmio();
    let doorbell = |queue| Doorbell {
        gpa: MMIO + 0x50,
        value: Some(queue),
    };
    assert_eq!(*lock(&guest.vm.doorbells), [doorbell(0), doorbell(1)]);
    let vm = Arc::clone(&guest.vm);
    drop(guest);
    assert_eq!(*lock(&vm.doorbells), []);
}

#[test]
fn notifications_over_pci_follow_the_bar() {
    let guest = Guest::pci(0);
    let doorbells = |base| {
        [0x3000, 0x3004].map(|at| Doorbell {
            gpa: base + at,
            value: None,
        })
    };
    assert_eq!(*lock(&guest.vm.doorbells), doorbells(BAR));
    guest.place(BAR + 0x8000);
    assert_eq!(*lock(&guest.vm.doorbells), doorbells(BAR + 0x8000));
    guest.set_command(0);
    assert_eq!(*lock(&guest.vm.doorbells), []);
}

#[test]
fn each_queue_sends_its_message() {
    let guest = Guest::pci(3);
    let vector = (0x1a, 2);
    guest.use_messages(true);
    (0..3).for_each(|vector| guest.set_message(vector));
    guest.make_ready();
    for queue in [0, 1] {
        guest.set(guest.map.queue_select, queue);
        assert_eq!(guest.get(vector), 0xffff, "no vector at first");
        guest.set(vector, 3);
        assert_eq!(guest.get(vector), 0xffff, "an invalid vector reads as none");
        guest.set(vector, queue + 1);
        assert_eq!(guest.get(vector), queue + 1);
    }
    guest.offer(1);
    guest.wait_until("vector 2", |g| g.pending() != 0);
    assert_eq!(guest.pending(), 1 << 2);
    guest.offer(0);
    guest.wait_until("vector 1", |g| g.pending() == (1 << 1) | (1 << 2));
    assert!(!guest.is_high());
    assert_eq!(guest.get(guest.map.interrupt_status), 0);
    // Once unmasked, the messages are sent by the kernel.
    guest.use_messages(false);
    assert_eq!(lock(&guest.vm.irqfds).len(), 3);
    assert_eq!(guest.pending(), 0);
    guest.set_status(0);
    guest.set(guest.map.queue_select, 1);
    assert_eq!(guest.get(vector), 0xffff, "a reset clears the vector");
}
