//! The machine's virtio devices: what they are made of, and how they are attached.

use std::io;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::layout;
use crate::bus::{Bus, Device};
use crate::config::{ConsoleConfig, DiskConfig, Mac, NetConfig, Transport, VmConfig};
use crate::devices::console::{Console, terminal};
use crate::hypervisor::Vm;
use crate::irqchip::IrqChip;
use crate::memory::GuestMemory;
use crate::pci::HostBridge;
use crate::virtio::blk::Disk;
use crate::virtio::blk::image::Image;
use crate::virtio::console::ConsolePort;
use crate::virtio::device::VirtioDevice;
use crate::virtio::input::{Button, PowerKey};
use crate::virtio::net::tap::TapQueue;
use crate::virtio::net::{Net, vhost};
use crate::virtio::rng::Rng;
use crate::virtio::transport::mmio::{self, MmioTransport};
use crate::virtio::transport::pci::PciTransport;
use crate::virtio::transport::starter::Starter;

/// More queues than this do not make a disk faster.
const DISK_QUEUES_MAX: u32 = 16;

/// More pairs of queues than this do not make an interface faster.
const NET_PAIRS_MAX: u32 = 8;

/// Makes a device as after power-on.
pub type MakeDevice = Box<dyn Fn() -> io::Result<Box<dyn VirtioDevice>> + Send>;

/// The host's side of the devices, which outlives a reset: files stay open and locked. A new kind of device
/// is one more function like [`disks`].
pub(super) struct Backends {
    /// In the order in which the devices are attached.
    make: Vec<MakeDevice>,
    /// The second console.
    pub(super) console: Option<Arc<Console>>,
    /// The power key, where SIGTERM is to press it.
    pub(super) button: Option<Arc<Button>>,
}

impl Backends {
    /// Opens everything that `config` names. A device of the library's user, `other`, comes last.
    ///
    /// # Errors
    /// One line that names the file.
    pub(super) fn open(config: &VmConfig, other: Option<MakeDevice>) -> Result<Self> {
        let console: Option<Arc<Console>> = config.virtio_console.is_some().then(Arc::default);
        let button: Option<Arc<Button>> = config.on_sigterm.patience().map(|_| Arc::default());
        let mut make = disks(config)?;
        make.extend(interfaces(config)?);
        make.extend(console.clone().map(|console| port(config, console)));
        make.extend(config.rng.then(rng));
        make.extend(button.clone().map(power_key));
        make.extend(other);
        Ok(Self {
            make,
            console,
            button,
        })
    }

    /// The devices, as after power-on.
    fn devices(&self) -> Result<Vec<Box<dyn VirtioDevice>>> {
        let made = self.make.iter().map(|make| make());
        Ok(made.collect::<io::Result<_>>()?)
    }
}

fn disks(config: &VmConfig) -> Result<Vec<MakeDevice>> {
    let queues = config.cpus.min(DISK_QUEUES_MAX);
    let queues = u16::try_from(queues).unwrap_or(u16::MAX);
    let open = |(index, disk): (usize, &DiskConfig)| -> Result<MakeDevice> {
        let name = disk.id.clone().unwrap_or_else(|| format!("disk{index}"));
        let image = Arc::new(Image::open(disk)?);
        Ok(Box::new(move || {
            Ok(Box::new(Disk::new(&name, Arc::clone(&image), queues)))
        }))
    };
    config.disk.iter().enumerate().map(open).collect()
}

fn interfaces(config: &VmConfig) -> Result<Vec<MakeDevice>> {
    let pairs = usize::try_from(config.cpus.min(NET_PAIRS_MAX))?;
    let open = |(index, net): (usize, &NetConfig)| -> Result<MakeDevice> {
        let NetConfig { tap, mac, vhost } = net.clone();
        if vhost {
            vhost::check()?;
        }
        let queues = TapQueue::open(&tap, pairs)?;
        let queues: Vec<_> = queues.into_iter().map(Arc::new).collect();
        let name = format!("net{index}");
        let mac = mac.unwrap_or_else(|| default_mac(&tap));
        Ok(Box::new(move || {
            let mtu = queues.first().and_then(|queue| queue.mtu());
            Ok(Box::new(Net::new(
                &name,
                &tap,
                queues.clone(),
                mac,
                mtu,
                vhost,
            )))
        }))
    };
    config.net.iter().enumerate().map(open).collect()
}

fn port(config: &VmConfig, console: Arc<Console>) -> MakeDevice {
    let is_terminal = config.virtio_console == Some(ConsoleConfig::Stdio);
    let size = Arc::new(move || is_terminal.then(terminal::size).flatten());
    Box::new(move || {
        let (console, size) = (Arc::clone(&console), Arc::clone(&size));
        Ok(Box::new(ConsolePort::new(console, size)))
    })
}

fn rng() -> MakeDevice {
    Box::new(|| Ok(Box::<Rng>::default()))
}

fn power_key(button: Arc<Button>) -> MakeDevice {
    Box::new(move || Ok(Box::new(PowerKey::new(Arc::clone(&button)))))
}

/// An address of this host's own for this tap, the same at every start: locally administered, with the
/// first bytes that QEMU's have.
fn default_mac(tap: &str) -> Mac {
    let mut sum = flate2::Crc::new();
    sum.update(&std::fs::read("/etc/machine-id").unwrap_or_default());
    sum.update(tap.as_bytes());
    let [a, b, c, d] = sum.sum().to_be_bytes();
    Mac([0x52, 0x54, a, b, c, d])
}

/// Puts the devices on `bus`, and gives back all that has a name: a bridge to them, if there is one, and
/// each of them.
///
/// # Errors
/// There are more than places, or the host refused something.
pub(super) fn attach(
    backends: &Backends,
    config: &VmConfig,
    vm: &Arc<dyn Vm>,
    ram: &Arc<GuestMemory>,
    irqchip: &IrqChip,
    bus: &mut Bus,
) -> Result<Vec<Arc<dyn Device>>> {
    let devices = backends.devices()?;
    if devices.is_empty() {
        return Ok(Vec::new());
    }
    // The transports have it: it ends when the last of them is dropped.
    let starter = Starter::new().context("Failed to start the devices thread")?;
    match config.transport {
        Transport::Mmio => attach_mmio(devices, vm, ram, irqchip, bus, &starter),
        Transport::Pci => attach_pci(devices, vm, ram, irqchip, bus, &starter),
    }
}

fn attach_pci(
    devices: Vec<Box<dyn VirtioDevice>>,
    vm: &Arc<dyn Vm>,
    ram: &Arc<GuestMemory>,
    irqchip: &IrqChip,
    bus: &mut Bus,
    starter: &Arc<Starter>,
) -> Result<Vec<Arc<dyn Device>>> {
    let first = layout::pci_irq(irqchip.sources());
    let wires = [0, 1, 2, 3].map(|wire| irqchip.line(first + wire));
    let messages = irqchip.messages().cloned();
    let limit = messages.as_ref().map_or(0, |messages| messages.vectors);
    let vectors = share_vectors(&devices, limit);
    let (ecam, window) = (layout::PCI_ECAM, layout::PCI_WINDOW);
    let mut bridge = HostBridge::new(ecam, window, wires, messages);
    let mut transports: Vec<Arc<dyn Device>> = Vec::new();
    for (device, vectors) in devices.into_iter().zip(vectors) {
        let name = device.name().to_owned();
        let transport = PciTransport::attach(device, ram, vm, &mut bridge, vectors, starter)
            .with_context(|| format!("Failed to attach {name}"))?;
        transports.push(transport);
    }
    let bridge = Arc::new(bridge);
    for (range, device) in bridge.on_bus() {
        bus.insert(range, device)?;
    }
    transports.insert(0, bridge);
    Ok(transports)
}

/// Messages for each device, `limit` in all: one for each queue and one more where that fits, while
/// each device behind it can still have two; else two, one of them for all queues; else none, and the
/// device has its pin.
fn share_vectors(devices: &[Box<dyn VirtioDevice>], limit: u32) -> Vec<u16> {
    const SHARED: u32 = 2;
    let mut left = limit;
    let mut behind = u32::try_from(devices.len()).unwrap_or(u32::MAX);
    let mut vectors = |device: &dyn VirtioDevice| {
        behind -= 1;
        let own = u32::try_from(device.queue_sizes().len() + 1).unwrap_or(u32::MAX);
        let wanted = if own.saturating_add(SHARED * behind) <= left {
            own
        } else if SHARED <= left {
            SHARED
        } else {
            0
        };
        left -= wanted;
        u16::try_from(wanted).unwrap_or(0)
    };
    devices
        .iter()
        .map(|device| vectors(device.as_ref()))
        .collect()
}

fn attach_mmio(
    devices: Vec<Box<dyn VirtioDevice>>,
    vm: &Arc<dyn Vm>,
    ram: &Arc<GuestMemory>,
    irqchip: &IrqChip,
    bus: &mut Bus,
    starter: &Arc<Starter>,
) -> Result<Vec<Arc<dyn Device>>> {
    let (count, slots) = (devices.len(), layout::VIRTIO_MMIO_SLOTS);
    if count > slots as usize {
        bail!("{count} virtio devices: --transport mmio has room for {slots}, pci for 31");
    }
    let mut attached: Vec<Arc<dyn Device>> = Vec::new();
    for (slot, device) in (0u32..).zip(devices) {
        let base = layout::VIRTIO_MMIO.start + u64::from(slot) * mmio::SIZE;
        let line = irqchip.line(layout::VIRTIO_MMIO_IRQ + slot);
        let name = device.name().to_owned();
        let transport = MmioTransport::new(device, ram, vm, base, line, starter)
            .with_context(|| format!("Failed to attach {name}"))?;
        bus.insert(base..base + mmio::SIZE, Arc::clone(&transport) as _)?;
        attached.push(transport);
    }
    Ok(attached)
}
