use super::*;
use crate::bus::{Bus, IrqSink};
use crate::hypervisor::fake::FakeVm;
use crate::irqchip::msi::MsiRouter;
use crate::pci::BarDevice;
use crate::pci::function;

mod saved;

const ECAM: u64 = 0x3000_0000;
const WINDOW: u64 = 0x4000_0000;
const WINDOW_END: u64 = 0x8000_0000;
/// The offsets of the window's control and data in the functions of these tests: see [`plug`].
const CONTROL: u64 = 0x44;
const DATA: u64 = 0x50;

const MEMORY: u32 = 1 << 1;
const BUS_MASTER: u32 = 1 << 2;
const INTX_DISABLE: u32 = 1 << 10;
const MSIX_ENABLE: u32 = 1 << 31;

/// A device that answers a load with its offset, and records stores, moves and bus mastering.
#[derive(Default)]
struct Registers {
    written: Mutex<Vec<(u64, Vec<u8>)>>,
    moves: Mutex<Vec<Option<u64>>>,
    mastered: Mutex<Vec<bool>>,
    bridge: Mutex<Option<Arc<HostBridge>>>,
}

impl BarDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.copy_from_slice(&offset.to_le_bytes()[..data.len()]);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let bridge = lock(&self.bridge);
        let free = bridge.as_ref().is_none_or(|b| b.moving.try_lock().is_ok());
        assert!(free, "the bus's lock must be free in a store");
        lock(&self.written).push((offset, data.to_vec()));
    }
    fn moved(&self, base: Option<u64>) {
        lock(&self.moves).push(base);
    }
    fn registers_at(&self, offset: Option<u64>) -> String {
        format!("registers {offset:?}")
    }
    fn set_bus_master(&self, allowed: bool) {
        let bridge = lock(&self.bridge);
        let free = bridge.as_ref().is_none_or(|b| b.moving.try_lock().is_ok());
        assert!(free, "the bus's lock must be free in a stop");
        lock(&self.mastered).push(allowed);
    }
}

impl Registers {
    fn take_moves(&self) -> Vec<Option<u64>> {
        std::mem::take(&mut lock(&self.moves))
    }
}

/// Records each change of a wire's level.
#[derive(Default)]
struct Levels(Mutex<Vec<(u32, bool)>>);

impl IrqSink for Levels {
    fn set_level(&self, source: u32, high: bool) {
        lock(&self.0).push((source, high));
    }
    fn fdt_interrupt(&self, source: u32) -> Vec<u32> {
        vec![0x1000, source, 4]
    }
}

struct Machine {
    bus: Bus,
    vm: Arc<FakeVm>,
    levels: Arc<Levels>,
    bridge: Arc<HostBridge>,
    devices: Vec<Arc<Registers>>,
    interrupts: Vec<Arc<Interrupts>>,
}

fn bridge(vm: &Arc<FakeVm>, levels: &Arc<Levels>) -> HostBridge {
    let wires = [32, 33, 34, 35].map(|source| IrqLine::new(Arc::clone(levels) as _, source));
    let messages = Messages {
        router: MsiRouter::new(Arc::clone(vm) as _),
        phandle: 0x1001,
        vectors: 56,
    };
    let (ecam, window) = (ECAM..ECAM + ECAM_SIZE, WINDOW..WINDOW_END);
    HostBridge::new(ecam, window, wires, Some(messages))
}

/// Attaches a device with `vectors` messages, and a capability with a window into BAR 0.
fn plug(bridge: &mut HostBridge, vectors: u16) -> Result<(Arc<Registers>, Arc<Interrupts>)> {
    let interrupts = bridge.interrupts(vectors)?;
    let device = Arc::new(Registers::default());
    let mut config = ConfigSpace::new(Identity {
        vendor: 0x1af4,
        device: 0x1042,
        class: 0x01_8000,
        revision: 1,
        subsystem: 0x1100,
    });
    let at = config.add_capability(9, &[0; 18], &[0xff; 18]);
    let window = function::Window {
        control: at + 4,
        data: at + 16,
    };
    let (of, as_bar) = (Arc::clone(&interrupts), Arc::clone(&device));
    bridge.attach(Function::new(config, Some(window), of, as_bar))?;
    Ok((device, interrupts))
}

/// A bus with one device for each entry of `vectors`, which is its number of messages.
fn machine(vectors: &[u16]) -> Machine {
    let (vm, levels) = (Arc::new(FakeVm::default()), Arc::new(Levels::default()));
    let mut bridge = bridge(&vm, &levels);
    let plugged = vectors.iter().map(|count| plug(&mut bridge, *count));
    let (devices, interrupts): (Vec<_>, _) = plugged.map(Result::unwrap).unzip();
    let bridge = Arc::new(bridge);
    let mut bus = Bus::default();
    for (range, device) in bridge.on_bus() {
        bus.insert(range, device).unwrap();
    }
    for device in &devices {
        let device: &Arc<Registers> = device;
        *lock(&device.bridge) = Some(Arc::clone(&bridge));
    }
    Machine {
        bus,
        vm,
        levels,
        bridge,
        devices,
        interrupts,
    }
}

fn config_at(device: u64, offset: u64) -> u64 {
    ECAM + (device << 15) + offset
}

impl Machine {
    fn config(&self, device: u64, offset: u64) -> u64 {
        self.bus.read(config_at(device, offset), 4)
    }

    fn set_config(&self, device: u64, offset: u64, value: u32) {
        self.bus
            .write(config_at(device, offset), &value.to_le_bytes());
    }

    fn place(&self, device: u64, base: u64) {
        self.set_config(device, 0x10, u32::try_from(base).unwrap());
    }

    /// The offset of the device's MSI-X capability.
    fn msix(&self, device: u64) -> Option<u64> {
        let mut at = self.config(device, 0x34) & 0xff;
        while at != 0 {
            let header = self.config(device, at);
            if header & 0xff == 0x11 {
                return Some(at);
            }
            at = (header >> 8) & 0xff;
        }
        None
    }
}

#[test]
fn where_no_function_is_reads_all_ones() {
    let machine = machine(&[0]);
    assert_eq!(machine.config(0, 0), 0x0008_1b36);
    assert_eq!(machine.config(0, 8), 0x0600_0000);
    assert_eq!(machine.config(1, 0), 0x1042_1af4);
    for function in 1..256u64 {
        for length in [1, 2, 4, 8] {
            let there = function == 8;
            let read = machine.bus.read(ECAM + function * 4096, length);
            let ones = u64::MAX >> (64 - 8 * length);
            assert_eq!(read == ones, !there, "function {function}, {length} bytes");
        }
    }
    for gpa in [WINDOW, WINDOW + 3, WINDOW_END - 8] {
        machine.bus.write(gpa, &[0; 8]);
        assert_eq!(machine.bus.read(gpa, 8), u64::MAX);
    }
}

#[test]
fn configuration_takes_any_width() {
    let machine = machine(&[0]);
    assert_eq!(machine.bus.read(config_at(1, 0), 8), 0x10_0000_1042_1af4);
    assert_eq!(machine.bus.read(config_at(1, 1), 2), 0x421a);
    assert_eq!(machine.bus.read(config_at(1, 0xffc), 8), 0);
    // Write BAR 0 byte by byte, and then by an unaligned store of 8 bytes.
    machine.bus.write(config_at(1, 0x11), &[0xff]);
    machine.bus.write(config_at(1, 0x13), &[0x40]);
    assert_eq!(machine.config(1, 0x10), 0x4000_8000);
    machine
        .bus
        .write(config_at(1, 0x0c), &0x4002_0000_0000_0000u64.to_le_bytes());
    assert_eq!(machine.config(1, 0x10), 0x4002_0000);
}

#[test]
fn a_bar_is_sized_placed_and_moved() {
    let machine = machine(&[0]);
    let device = &machine.devices[0];
    machine.place(1, WINDOW);
    assert_eq!(device.take_moves(), [], "not decoded yet");
    assert_eq!(machine.bus.read(WINDOW + 8, 4), 0xffff_ffff);
    machine.set_config(1, 4, MEMORY);
    assert_eq!(device.take_moves(), [Some(WINDOW)]);
    assert_eq!(machine.bus.read(WINDOW + 8, 4), 8);
    // A guest may find out a BAR's size without switching memory decoding off.
    machine.set_config(1, 0x10, 0xffff_ffff);
    assert_eq!(machine.config(1, 0x10), 0xffff_8000);
    assert_eq!(machine.bus.read(WINDOW + 8, 4), 0xffff_ffff);
    machine.place(1, WINDOW + 0x8000);
    assert_eq!(device.take_moves(), [None, Some(WINDOW + 0x8000)]);
    machine.place(1, WINDOW + 0x1_0000);
    let moved = [None, Some(WINDOW + 0x1_0000)];
    assert_eq!(device.take_moves(), moved, "the old place is left first");
    machine.set_config(1, 4, 0);
    machine.set_config(1, 4, 0);
    assert_eq!(device.take_moves(), [None], "reported once");
    assert_eq!(machine.bus.read(WINDOW + 0x1_0008, 4), 0xffff_ffff);
}

#[test]
fn a_bar_outside_the_window_is_nowhere() {
    let machine = machine(&[0]);
    machine.set_config(1, 4, MEMORY);
    for base in [0, 0x3000_0000, WINDOW - 0x8000, WINDOW_END, 0xffff_8000] {
        machine.place(1, base);
    }
    assert_eq!(machine.devices[0].take_moves(), []);
    machine.place(1, WINDOW_END - 0x8000);
    assert_eq!(
        machine.bus.read(WINDOW_END - 8, 4),
        0,
        "the BAR's end reads zero"
    );
    assert_eq!(machine.bus.read(WINDOW_END - 0x8000 + 4, 4), 4);
}

#[test]
fn of_two_bars_at_one_place_the_first_device_has_it() {
    let machine = machine(&[0, 0]);
    let (first, second) = (&machine.devices[0], &machine.devices[1]);
    machine.place(2, WINDOW);
    machine.set_config(2, 4, MEMORY);
    machine.place(1, WINDOW);
    machine.set_config(1, 4, MEMORY);
    machine.bus.write(WINDOW, &[1]);
    assert_eq!(lock(&first.written).len(), 1);
    assert_eq!(lock(&second.written).len(), 0);
    // Doorbells move with the BARs, so the devices must be notified of the same.
    assert_eq!(first.take_moves(), [Some(WINDOW)]);
    assert_eq!(second.take_moves(), [Some(WINDOW), None]);
    machine.set_config(1, 4, 0);
    assert_eq!(first.take_moves(), [None]);
    assert_eq!(
        second.take_moves(),
        [Some(WINDOW)],
        "the place is free again"
    );
    machine.bus.write(WINDOW, &[2]);
    assert_eq!(lock(&second.written).len(), 1);
}

#[test]
fn messages_are_set_up_through_the_bar() {
    let machine = machine(&[0, 3]);
    assert_eq!(machine.msix(1), None);
    let at = machine.msix(2).unwrap();
    assert_eq!(machine.config(2, at) >> 16, 2, "three entries");
    assert_eq!(machine.config(2, at + 4), 0x4000);
    assert_eq!(machine.config(2, at + 8), 0x5000);
    machine.place(2, WINDOW);
    machine.set_config(2, 4, MEMORY | BUS_MASTER);
    machine.set_config(2, at, MSIX_ENABLE);
    let interrupts = &machine.interrupts[1];
    assert!(interrupts.uses_messages());
    interrupts.message(1);
    interrupts.message(0xffff);
    assert_eq!(machine.bus.read(WINDOW + 0x5000, 8), 0b10, "still masked");
    machine.bus.write(WINDOW + 0x5000, &[0xff; 8]);
    let entry = WINDOW + 0x4010;
    machine.bus.write(entry, &0x2800_0000u64.to_le_bytes());
    machine.bus.write(entry + 8, &7u64.to_le_bytes());
    assert_eq!(lock(&machine.vm.tables).len(), 1);
    assert_eq!(lock(&machine.vm.tables)[0][0].1.data, 7);
    assert_eq!(*lock(&machine.vm.irqfds), [1]);
    assert_eq!(
        machine.bus.read(WINDOW + 0x5000, 4),
        0,
        "the kernel takes the signal"
    );
    machine.set_config(2, at, 0);
    assert!(!interrupts.uses_messages());
    assert!(lock(&machine.vm.irqfds).is_empty());
}

#[test]
fn registers_have_names_where_they_are() {
    let machine = machine(&[2]);
    let bridge = &machine.bridge;
    machine.set_config(1, 0x10, u32::try_from(WINDOW).unwrap());
    machine.set_config(1, 4, MEMORY);
    let named = |gpa| bridge.registers_at(gpa);
    assert_eq!(named(ECAM).unwrap(), "PCI bridge");
    assert_eq!(named(config_at(1, 0x40)).unwrap(), "registers None");
    assert_eq!(named(config_at(2, 0)).unwrap(), "no PCI device");
    assert_eq!(named(WINDOW + 0x3004).unwrap(), "registers Some(12292)");
    let size = u64::from(function::BAR_SIZE);
    assert_eq!([named(WINDOW + size), named(WINDOW_END)], [None, None]);
}

#[test]
fn a_device_hears_of_each_change_of_bus_mastering() {
    let machine = machine(&[2, 0]);
    let heard = || std::mem::take(&mut *lock(&machine.devices[0].mastered));
    for command in [MEMORY, BUS_MASTER, BUS_MASTER | MEMORY, 0, MEMORY] {
        machine.set_config(1, 4, command);
    }
    assert_eq!(heard(), [true, false]);
    // The width of the store, and where it begins, do not matter.
    machine.bus.write(config_at(1, 4), &[4]);
    machine.bus.write(config_at(1, 0), &[0; 8]);
    machine.bus.write(config_at(1, 5), &[4]);
    assert_eq!(heard(), [true, false]);
    assert!(lock(&machine.devices[1].mastered).is_empty());
}

#[test]
fn a_pin_obeys_command_and_messages() {
    let machine = machine(&[2]);
    let (at, interrupts) = (machine.msix(1).unwrap(), &machine.interrupts[0]);
    let status = || machine.config(1, 4) & (8 << 16) != 0;
    let levels = || std::mem::take(&mut *lock(&machine.levels.0));
    assert!(!status());
    interrupts.set_pin(true);
    assert!(status());
    assert_eq!(levels(), [(33, true)]);
    machine.set_config(1, 4, INTX_DISABLE);
    assert!(status(), "INTx disable does not hide the cause");
    assert_eq!(levels(), [(33, false)]);
    machine.set_config(1, 4, 0);
    assert_eq!(levels(), [(33, true)]);
    machine.set_config(1, at, MSIX_ENABLE);
    assert_eq!(levels(), [(33, false)], "messages instead of the pin");
    assert!(!status());
    interrupts.set_pin(false);
    interrupts.set_pin(true);
    assert_eq!(levels(), []);
    machine.set_config(1, at, 0);
    assert_eq!(levels(), [(33, true)]);
}

#[test]
fn devices_share_wires_as_the_tree_says() {
    let machine = machine(&[0; SLOTS]);
    let map = machine.bridge.interrupt_map();
    assert_eq!(map.len(), 16 * 7);
    for (device, interrupts) in (1u32..).zip(&machine.interrupts) {
        interrupts.set_pin(true);
        interrupts.set_pin(false);
        let child = [(device << 11) & 0x1800, 0, 0, 1];
        let entry = map.chunks(7).find(|entry| entry[..4] == child).unwrap();
        let source = entry[5];
        let changes = std::mem::take(&mut *lock(&machine.levels.0));
        assert_eq!(changes, [(source, true), (source, false)], "{device}");
    }
    machine.interrupts[0].set_pin(true);
    machine.interrupts[4].set_pin(true);
    machine.interrupts[0].set_pin(false);
    machine.interrupts[4].set_pin(false);
    assert_eq!(*lock(&machine.levels.0), [(33, true), (33, false)]);
}

#[test]
fn a_full_bus_takes_no_more() {
    let (vm, levels) = (Arc::new(FakeVm::default()), Arc::new(Levels::default()));
    let mut bridge = bridge(&vm, &levels);
    for _ in 0..SLOTS {
        plug(&mut bridge, 0).unwrap();
    }
    let error = bridge.interrupts(0).err().unwrap().to_string();
    assert!(error.contains("31"), "{error}");
}

#[test]
fn configuration_has_a_window_into_the_bar() {
    let machine = machine(&[2]);
    let aim = |offset: u32, length: u32| {
        machine.set_config(1, CONTROL, 0);
        machine.set_config(1, CONTROL + 4, offset);
        machine.set_config(1, CONTROL + 8, length);
    };
    aim(0x14, 1);
    assert_eq!(machine.bus.read(config_at(1, DATA), 1), 0x14);
    machine.bus.write(config_at(1, DATA), &[3]);
    assert_eq!(*lock(&machine.devices[0].written), [(0x14, vec![3])]);
    aim(0x400c, 4);
    assert_eq!(machine.config(1, DATA), 1, "MSI-X entries are masked");
    // Such accesses do not reach the BAR: another length than the one set, an unaligned offset, an
    // offset outside the BAR, and another BAR.
    for (offset, length) in [
        (0x14, 2),
        (0x15, 4),
        (0x8000, 4),
        (u32::MAX, 4),
        (0, 0),
        (0, 8),
    ] {
        aim(offset, length);
        machine.set_config(1, DATA, 9);
    }
    aim(0x14, 4);
    machine.set_config(1, CONTROL, 1);
    machine.set_config(1, DATA, 9);
    assert_eq!(lock(&machine.devices[0].written).len(), 1);
}

/// Marsaglia's xorshift64.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Does random stores and loads of every width, all over both ranges, but mostly where there are
/// registers.
#[test]
fn nothing_a_guest_does_breaks_the_bus() {
    let machine = machine(&[0, 4, 1]);
    let mut seed = 0x9e37_79b9_7f4a_7c15;
    for _ in 0..100_000 {
        let random = next(&mut seed);
        let gpa = match random % 8 {
            0 => ECAM + next(&mut seed) % ECAM_SIZE,
            1 => WINDOW + next(&mut seed) % (WINDOW_END - WINDOW),
            2 => WINDOW + next(&mut seed) % 0x2_0000,
            3 => WINDOW + (next(&mut seed) % 3) * 0x8000 + 0x4000 + next(&mut seed) % 64,
            4 => config_at(next(&mut seed) % 4, 4),
            5 => config_at(next(&mut seed) % 4, 0x10),
            _ => config_at(next(&mut seed) % 5, next(&mut seed) % 0x70),
        };
        let length = 1usize << (next(&mut seed) % 4);
        let value = match next(&mut seed) % 4 {
            0 => next(&mut seed),
            1 => u64::MAX,
            2 => WINDOW + next(&mut seed) % 0x2_0000,
            _ => 1 << (next(&mut seed) % 64),
        };
        machine.bus.write(gpa, &value.to_le_bytes()[..length]);
        machine.bus.read(gpa, length);
        let device = usize::try_from(next(&mut seed) % 3).unwrap();
        machine.interrupts[device].set_pin(random & 0x100 != 0);
        machine.interrupts[device].message(0);
    }
    let last = |device: &Arc<Registers>| lock(&device.moves).last().copied().flatten();
    let mut bars: Vec<u64> = machine.devices.iter().filter_map(last).collect();
    bars.sort_unstable();
    assert!(bars.windows(2).all(|pair| pair[0] + 0x8000 <= pair[1]));
    for bar in bars {
        assert_eq!(machine.bus.read(bar + 4, 4), 4, "{bar:#x} is mapped");
    }
    // Each call of `moved` is a change, and between two places there is always a `None`.
    for device in &machine.devices {
        let moves = lock(&device.moves);
        assert!(moves.len() > 10, "moves were tried");
        let kinds: Vec<bool> = moves.iter().map(Option::is_some).collect();
        assert!(kinds[0] && kinds.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
