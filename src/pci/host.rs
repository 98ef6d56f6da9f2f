//! The host bridge: access to the configuration space by an ECAM (PCI Express Base, section 7.2.2),
//! and the memory window in which the guest places BARs.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::config::{ConfigSpace, Identity, SavedConfig};
use super::function::{BAR_SIZE, Function, SavedFunction, VECTORS_MAX};
use super::interrupts::{Interrupts, SharedLine};
use crate::bus::{Device, FdtError, FdtWriter, IrqLine, MmioDevice};
use crate::irqchip::Messages;
use crate::snapshot::{LoadError, Parts, SaveError, Saved, State};
use crate::util::sync::lock;
use crate::util::{Half, RateLimit, guest_warn};

/// The size of a function's configuration space in an ECAM, in bytes.
const FUNCTION_SIZE: u64 = 4096;
/// The number of functions of a bus: 32 devices with 8 functions each. rvmm's devices have one
/// each.
const FUNCTIONS: u64 = 256;
/// The size of the ECAM of one bus in bytes.
pub const ECAM_SIZE: u64 = FUNCTIONS * FUNCTION_SIZE;
/// The largest number of devices, without the bridge itself.
pub const SLOTS: usize = 31;
/// The number of interrupt wires of the bus.
pub const WIRES: usize = 4;

/// The ids of QEMU's generic PCI Express host bridge, which has no special features either.
const BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    class: 0x06_0000,
    revision: 0,
    subsystem: 0x1100,
};

/// The host bridge with bus 0. There is no hotplug.
pub struct HostBridge {
    ecam: Range<u64>,
    window: Range<u64>,
    bridge: Mutex<ConfigSpace>,
    /// The functions, from device 1 on.
    functions: Vec<Arc<Function>>,
    wires: [IrqLine; WIRES],
    shared: [Arc<SharedLine>; WIRES],
    messages: Option<Messages>,
    /// The address of each function's BAR, as its device knows it. Locked while the guest writes to
    /// the configuration space, so that one move happens at a time.
    moving: Mutex<Vec<Option<u64>>>,
    /// The functions whose BAR is in the window, by address.
    placed: RwLock<Vec<(Range<u64>, Arc<Function>)>>,
    overlaps: RateLimit,
    unmapped: RateLimit,
}

impl HostBridge {
    /// A bus without devices. `ecam` and `window` are its guest-physical addresses, `wires` its
    /// interrupt wires. `messages` is how messages reach the harts, `None` if they cannot.
    pub fn new(
        ecam: Range<u64>,
        window: Range<u64>,
        wires: [IrqLine; WIRES],
        messages: Option<Messages>,
    ) -> Self {
        Self {
            ecam,
            window,
            bridge: Mutex::new(ConfigSpace::new(BRIDGE)),
            functions: Vec::new(),
            shared: wires.clone().map(SharedLine::new),
            wires,
            messages,
            moving: Mutex::default(),
            placed: RwLock::default(),
            overlaps: RateLimit::named("PCI BARs that overlap"),
            unmapped: RateLimit::named("PCI window"),
        }
    }

    /// Creates the interrupts of the next device to be attached: its pin, and `vectors` messages if
    /// the machine can deliver messages.
    ///
    /// # Errors
    /// Fails if the bus is full, if there is no room for so many messages, if the host has no free
    /// descriptors, or KVM no free interrupt numbers.
    pub fn interrupts(&self, vectors: u16) -> Result<Arc<Interrupts>> {
        let device = self.next_device()?;
        if vectors > VECTORS_MAX {
            bail!("a PCI device has room for {VECTORS_MAX} messages, not for {vectors}");
        }
        // INTA of device n is wire n modulo 4, as bridges do it (PCI-to-PCI Bridge Architecture
        // 1.2, section 9.1).
        let line = &self.shared[device % WIRES];
        let router = self.messages.as_ref().map(|m| (&m.router, vectors));
        let interrupts = Interrupts::new(line, u32::try_from(device)?, router)?;
        Ok(Arc::new(interrupts))
    }

    /// Attaches a function as the next device, and returns its device number. Its interrupts have
    /// to be the last result of [`HostBridge::interrupts`].
    ///
    /// # Errors
    /// Fails if the bus is full.
    pub fn attach(&mut self, function: Function) -> Result<usize> {
        let device = self.next_device()?;
        self.functions.push(Arc::new(function));
        lock(&self.moving).push(None);
        Ok(device)
    }

    fn next_device(&self) -> Result<usize> {
        match self.functions.len() {
            SLOTS => bail!("the PCI bus is full: give the machine at most {SLOTS} devices"),
            taken => Ok(taken + 1),
        }
    }

    /// The ranges of the ECAM and the memory window, for the machine's bus.
    pub fn on_bus(self: &Arc<Self>) -> [(Range<u64>, Arc<dyn MmioDevice>); 2] {
        [
            (self.ecam.clone(), Arc::new(Ecam(Arc::clone(self)))),
            (self.window.clone(), Arc::new(Window(Arc::clone(self)))),
        ]
    }

    /// The function that an offset in the ECAM belongs to, and the offset in its configuration
    /// space.
    fn at(&self, offset: u64) -> (Slot<'_>, u64) {
        let (number, offset) = (offset / FUNCTION_SIZE, offset % FUNCTION_SIZE);
        let device = usize::try_from(number / 8).unwrap_or(usize::MAX);
        let slot = match (number % 8, device) {
            (0, 0) => Slot::Bridge,
            (0, device) => self
                .functions
                .get(device - 1)
                .map_or(Slot::Empty, Slot::Function),
            _ => Slot::Empty,
        };
        (slot, offset)
    }

    /// Updates the addresses of the BARs. To be called after each store to the configuration space,
    /// which may have moved any BAR. `known` are the addresses that the devices know; calls
    /// [`Function::moved`] for each one that has changed.
    fn follow(&self, known: &mut [Option<u64>]) {
        let wanted = self.wanted();
        if wanted == known {
            return;
        }
        *self.placed.write().unwrap_or_else(PoisonError::into_inner) = self.place(&wanted);
        // First remove BARs from their old place, because another may move to the same place.
        for gone in [true, false] {
            for ((function, known), wanted) in self.functions.iter().zip(&mut *known).zip(&wanted) {
                if known != wanted && (known.is_some() == gone) {
                    if gone {
                        function.moved(None);
                        *known = None;
                    } else {
                        function.moved(*wanted);
                        *known = *wanted;
                    }
                }
            }
        }
    }

    /// The address of each BAR. `None` if the BAR is not decoded, not inside the window, or
    /// overlaps the BAR of an earlier device.
    fn wanted(&self) -> Vec<Option<u64>> {
        let (window, size) = (&self.window, u64::from(BAR_SIZE));
        let inside = |base: &u64| *base >= window.start && base + size <= window.end;
        let mut wanted: Vec<Option<u64>> = Vec::with_capacity(self.functions.len());
        for function in &self.functions {
            let mut bar = function.bar().filter(inside);
            if let Some(base) = bar {
                let mut earlier = wanted.iter().flatten();
                if earlier.any(|taken| taken.abs_diff(base) < size) {
                    guest_warn!(self.overlaps, "the guest placed two PCI BARs at {base:#x}");
                    bar = None;
                }
            }
            wanted.push(bar);
        }
        wanted
    }

    /// The functions that have an address in `bars`, in the order of their addresses.
    fn place(&self, bars: &[Option<u64>]) -> Vec<(Range<u64>, Arc<Function>)> {
        let bars = self.functions.iter().zip(bars);
        let placed = bars.filter_map(|(function, base)| {
            let base = (*base)?;
            Some((base..base + u64::from(BAR_SIZE), Arc::clone(function)))
        });
        let mut placed: Vec<_> = placed.collect();
        placed.sort_by_key(|(range, _)| range.start);
        placed
    }

    fn placed(&self) -> RwLockReadGuard<'_, Vec<(Range<u64>, Arc<Function>)>> {
        self.placed.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The function whose BAR contains the `length` bytes at `offset` in the window, and the offset
    /// in the BAR.
    fn find(&self, offset: u64, length: usize) -> Option<(Arc<Function>, u64)> {
        let gpa = self.window.start + offset;
        let placed = self.placed();
        let after = placed.partition_point(|(range, _)| range.start <= gpa);
        let (range, function) = placed.get(after.checked_sub(1)?)?;
        let fits = gpa + length as u64 <= range.end;
        fits.then(|| (Arc::clone(function), gpa - range.start))
    }
}

/// The saved state of the bus: bridge and functions.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedBridge {
    config: SavedConfig,
    /// From device 1 on.
    functions: Vec<SavedFunction>,
}

impl State for SavedBridge {
    const KIND: &'static str = "pci-host";
    const VERSION: u32 = 1;
}

/// The number of messages (MSI-X vectors) of each device on the bus, in `saved`, which is the state
/// that [`HostBridge`] saves. A guest has seen these numbers, so its devices need the same again.
///
/// # Errors
/// Fails if this is not the state of a bridge.
pub fn saved_vectors(saved: &mut Parts) -> Result<Vec<usize>, LoadError> {
    let saved: &SavedBridge = saved.peek()?;
    let functions = saved.functions.iter();
    Ok(functions.map(SavedFunction::vectors).collect())
}

enum Slot<'a> {
    Bridge,
    Function(&'a Arc<Function>),
    Empty,
}

struct Ecam(Arc<HostBridge>);

/// Serves accesses of any width, also across registers. A load reads all ones where there is no
/// function.
impl MmioDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.0.at(offset) {
            (Slot::Bridge, offset) => lock(&self.0.bridge).read(offset, data),
            (Slot::Function(function), offset) => function.read_config(offset, data),
            (Slot::Empty, _) => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match self.0.at(offset) {
            (Slot::Bridge, offset) => lock(&self.0.bridge).write(offset, data),
            (Slot::Function(function), offset) => {
                // A store through the window calls the device, so `moving` must not be locked.
                if function.write_window(offset, data) {
                    return;
                }
                {
                    let mut known = lock(&self.0.moving);
                    function.write_config(offset, data);
                    self.0.follow(&mut known);
                }
                // This may wait for the device, so `moving` must not be locked.
                function.follow_bus_master();
            }
            (Slot::Empty, _) => {}
        }
    }
}

struct Window(Arc<HostBridge>);

impl MmioDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.0.find(offset, data.len()) {
            Some((function, offset)) => function.read(offset, data),
            None => {
                data.fill(0xff);
                let gpa = self.0.window.start + offset;
                guest_warn!(
                    self.0.unmapped,
                    "the guest read {gpa:#x}, where there is no PCI BAR"
                );
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, offset)) = self.0.find(offset, data.len()) {
            function.write(offset, data);
        }
    }
}

/// In the device tree this is a `pci-host-ecam-generic` (binding `pci/host-generic-pci.yaml`, and
/// PCI Bus Binding to IEEE 1275).
impl Device for HostBridge {
    fn id(&self) -> &str {
        "pci"
    }

    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        let functions = self.functions.iter();
        let saved = SavedBridge {
            config: lock(&self.bridge).save(),
            functions: functions.map(|function| function.save()).collect(),
        };
        Ok(vec![Saved::of(&saved)?])
    }

    /// Must come before the devices' own loads. Places their BARs with the doorbells, sets their
    /// bus master enable, and connects their messages. No device starts by this.
    fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        let saved: SavedBridge = parts.take()?;
        let (here, there) = (self.functions.len(), saved.functions.len());
        if here != there {
            let why = format!("it has {there} devices in the snapshot, and {here} now");
            return Err(LoadError::Unfit(why));
        }
        lock(&self.bridge)
            .load(&saved.config)
            .map_err(LoadError::Unfit)?;
        for (device, (function, saved)) in (1..).zip(self.functions.iter().zip(&saved.functions)) {
            let loaded = function.load(saved);
            loaded.map_err(|why| LoadError::Unfit(format!("PCI device {device}: {why}")))?;
        }
        self.follow(&mut lock(&self.moving));
        for function in &self.functions {
            function.follow_bus_master();
        }
        Ok(())
    }

    fn describe(&self) -> Value {
        let placed = self.placed();
        let bars: Vec<Value> = placed
            .iter()
            .map(|(bar, _)| json!([bar.start, bar.end]))
            .collect();
        json!({
            "kind": "pci_host_bridge",
            "registers": self.ecam.start,
            "window": [self.window.start, self.window.end],
            "functions": self.functions.len(),
            "bars": bars,
        })
    }

    fn fdt_node(&self, fdt: &mut FdtWriter) -> Result<(), FdtError> {
        /// The first cell of an address in 32-bit memory space (ss = 10).
        const MEMORY_32: u32 = 0x0200_0000;
        let cells = |value: u64| [Half::High.of(value), Half::Low.of(value)];
        let node = fdt.begin_node(&format!("pci@{:x}", self.ecam.start))?;
        fdt.property_string("compatible", "pci-host-ecam-generic")?;
        fdt.property_string("device_type", "pci")?;
        fdt.property_array_u64("reg", &[self.ecam.start, ECAM_SIZE])?;
        fdt.property_array_u32("bus-range", &[0, 0])?;
        fdt.property_u32("#address-cells", 3)?;
        fdt.property_u32("#size-cells", 2)?;
        let mut ranges = vec![MEMORY_32];
        ranges.extend(cells(self.window.start));
        ranges.extend(cells(self.window.start));
        ranges.extend(cells(self.window.end - self.window.start));
        fdt.property_array_u32("ranges", &ranges)?;
        fdt.property_null("dma-coherent")?;
        if let Some(messages) = &self.messages {
            fdt.property_u32("msi-parent", messages.phandle)?;
        }
        fdt.property_u32("#interrupt-cells", 1)?;
        fdt.property_array_u32("interrupt-map-mask", &[0x1800, 0, 0, 7])?;
        fdt.property_array_u32("interrupt-map", &self.interrupt_map())?;
        fdt.end_node(node)
    }

    fn registers_at(&self, gpa: u64) -> Option<String> {
        if self.ecam.contains(&gpa) {
            return Some(match self.at(gpa - self.ecam.start).0 {
                Slot::Bridge => "PCI bridge".into(),
                Slot::Function(function) => function.registers_at(None),
                Slot::Empty => "no PCI device".into(),
            });
        }
        let offset = self
            .window
            .contains(&gpa)
            .then(|| gpa - self.window.start)?;
        let (function, offset) = self.find(offset, 1)?;
        Some(function.registers_at(Some(offset)))
    }
}

impl HostBridge {
    /// The property `interrupt-map`: the wire of each pin of devices 0 to 3. The mask makes these
    /// stand for all devices.
    fn interrupt_map(&self) -> Vec<u32> {
        let mut map = Vec::new();
        for device in 0..4u32 {
            for pin in 1..=4u32 {
                let wire = (device + pin - 1) as usize % WIRES;
                map.extend([device << 11, 0, 0, pin]);
                map.extend(self.wires[wire].fdt_interrupt());
            }
        }
        map
    }
}

#[cfg(test)]
mod tests;
