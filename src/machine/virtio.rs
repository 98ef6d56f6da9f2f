//! Creates and attaches the machine's virtio devices.

use std::fs::File;
use std::io;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::layout;
use crate::bus::{Bus, Device};
use crate::config::{ConsoleConfig, DiskConfig, Mac, NetConfig, Transport, VmConfig};
use crate::devices::console::{Console, terminal};
use crate::hypervisor::Vm;
use crate::irqchip::IrqChip;
use crate::memory::{self, GuestMemory};
use crate::pci::HostBridge;
use crate::trace::Slot;
use crate::virtio::blk::image::Image;
use crate::virtio::blk::{Disk, Overlay};
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

/// The name of the copy of a disk's image in a snapshot.
pub fn disk_copy(name: &str) -> String {
    format!("disk-{name}")
}

/// Creates a device in its power-on state.
pub type MakeDevice = Box<dyn Fn() -> io::Result<Box<dyn VirtioDevice>> + Send>;

/// The host's side of the devices. It survives a reset: files stay open and locked. A new kind of
/// device needs one more function like [`disks`].
pub(super) struct Backends {
    /// Functions that create the devices, in the order in which they are attached.
    make: Vec<MakeDevice>,
    pub(super) disks: Disks,
    /// The addresses of the interfaces.
    macs: Vec<Mac>,
    /// The second console.
    pub(super) console: Option<Arc<Console>>,
    /// The power key, if SIGTERM is to press it.
    pub(super) button: Option<Arc<Button>>,
    /// Devices record their work once this has a tracer.
    pub(super) tracer: Slot,
}

/// A disk's open image.
#[derive(Clone)]
struct OpenDisk {
    name: String,
    image: Arc<Image>,
    /// Whether the guest's writes go to the image itself.
    is_written: bool,
}

/// The open images of all disks.
#[derive(Clone)]
pub(super) struct Disks(Vec<OpenDisk>);

impl Disks {
    /// Makes durable what the guest has written to its disks, except where that is not wanted
    /// (`cache=unsafe`) or goes to an overlay. May wait for the host's disks.
    ///
    /// # Errors
    /// Fails if the host cannot write a disk, or could not earlier. The message names the disk.
    pub(super) fn sync(&self) -> Result<()> {
        for OpenDisk { name, image, .. } in &self.0 {
            let path = image.path();
            let synced = image.flush();
            synced.with_context(|| format!("Failed to sync {name} ({path:?})"))?;
        }
        Ok(())
    }

    /// The names of the disks whose image is not written (`snapshot=on`), with what their guest has
    /// written.
    pub(super) fn overlays(&self) -> impl Iterator<Item = (&str, &Overlay)> {
        let disks = self.0.iter();
        disks.filter_map(|disk| Some((disk.name.as_str(), disk.image.overlay()?)))
    }

    /// Copies the image of each disk that the guest writes to, to a new file that `create` returns
    /// for the disk's name. The disks must be paused. Where the file system can do that, the copy
    /// shares the image's blocks.
    ///
    /// # Errors
    /// Fails if an image cannot be read, or a file cannot be written.
    pub(super) fn copy(&self, create: impl Fn(&str) -> Result<File>) -> Result<Vec<File>> {
        let copy = |OpenDisk { name, image, .. }: &OpenDisk| -> Result<File> {
            let path = image.path();
            let failed = || format!("Failed to copy {name} ({path:?})");
            let (from, to) = (image.open_again().with_context(failed)?, create(name)?);
            memory::image::share_or_copy(&from, &to, image.len()).with_context(failed)?;
            Ok(to)
        };
        self.0
            .iter()
            .filter(|disk| disk.is_written)
            .map(copy)
            .collect()
    }
}

impl Backends {
    /// Opens all files and taps that `config` names. `other` is one more device, from the user of
    /// the library. It comes last.
    ///
    /// # Errors
    /// Fails if a file or tap cannot be opened. The message names it.
    pub(super) fn open(config: &VmConfig, other: Option<MakeDevice>) -> Result<Self> {
        let console: Option<Arc<Console>> = config.virtio_console.is_some().then(Arc::default);
        let button: Option<Arc<Button>> = config.on_sigterm.patience().map(|_| Arc::default());
        let tracer = Slot::default();
        let disks = disks(config)?;
        let macs: Vec<Mac> = config.net.iter().map(mac).collect();
        let mut make = Vec::new();
        make.extend(
            disks
                .0
                .iter()
                .map(|disk| disk_device(config, disk, &tracer)),
        );
        make.extend(interfaces(config, &macs)?);
        make.extend(console.clone().map(|console| port(config, console)));
        make.extend(config.rng.then(rng));
        make.extend(button.clone().map(power_key));
        make.extend(other);
        Ok(Self {
            make,
            disks,
            macs,
            console,
            button,
            tracer,
        })
    }

    /// Writes to `config` what the host has chosen, so that a machine with that configuration looks
    /// the same on another host: the interfaces' addresses.
    pub(super) fn pin(&self, config: &mut VmConfig) {
        for (net, mac) in config.net.iter_mut().zip(&self.macs) {
            net.mac = Some(*mac);
        }
    }

    /// Creates the devices in their power-on state.
    fn devices(&self) -> Result<Vec<Box<dyn VirtioDevice>>> {
        let made = self.make.iter().map(|make| make());
        Ok(made.collect::<io::Result<_>>()?)
    }
}

fn disks(config: &VmConfig) -> Result<Disks> {
    let open = |(index, disk): (usize, &DiskConfig)| {
        let name = disk.name(index);
        let image = Arc::new(Image::open(disk)?);
        let is_written = disk.is_written();
        Ok(OpenDisk {
            name,
            image,
            is_written,
        })
    };
    let opened = config.disk.iter().enumerate().map(open);
    Ok(Disks(opened.collect::<Result<_>>()?))
}

fn disk_device(config: &VmConfig, disk: &OpenDisk, tracer: &Slot) -> MakeDevice {
    let queues = config.cpus.min(DISK_QUEUES_MAX);
    let queues = u16::try_from(queues).unwrap_or(u16::MAX);
    let (name, image, tracer) = (disk.name.clone(), disk.image.clone(), Arc::clone(tracer));
    Box::new(move || {
        let (image, tracer) = (Arc::clone(&image), Arc::clone(&tracer));
        Ok(Box::new(Disk::traced(&name, image, queues, tracer)))
    })
}

fn mac(net: &NetConfig) -> Mac {
    net.mac.unwrap_or_else(|| default_mac(&net.tap))
}

fn interfaces(config: &VmConfig, macs: &[Mac]) -> Result<Vec<MakeDevice>> {
    let pairs = usize::try_from(config.cpus.min(NET_PAIRS_MAX))?;
    let open = |(index, (net, mac)): (usize, (&NetConfig, &Mac))| -> Result<MakeDevice> {
        let (tap, mac, vhost) = (net.tap.clone(), *mac, net.vhost);
        if vhost {
            vhost::check()?;
        }
        let queues = TapQueue::open(&tap, pairs)?;
        let queues: Vec<_> = queues.into_iter().map(Arc::new).collect();
        let name = format!("net{index}");
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
    config.net.iter().zip(macs).enumerate().map(open).collect()
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

/// A MAC address for this tap that is specific to this host and the same at every start. It is
/// locally administered, and its first bytes are those of QEMU's addresses.
fn default_mac(tap: &str) -> Mac {
    let mut sum = flate2::Crc::new();
    sum.update(&std::fs::read("/etc/machine-id").unwrap_or_default());
    sum.update(tap.as_bytes());
    let [a, b, c, d] = sum.sum().to_be_bytes();
    Mac([0x52, 0x54, a, b, c, d])
}

/// Creates the devices and attaches them to `bus`. Returns them, after the PCI host bridge if there
/// is one. `vectors` are the numbers of messages that the devices on PCI must have, in order
/// ([`saved_vectors`](crate::pci::saved_vectors)); without it, this decides.
///
/// # Errors
/// Fails if there are more devices than slots, if the host cannot deliver that many messages, or if
/// a call to KVM or to the host fails.
pub(super) fn attach(
    backends: &Backends,
    config: &VmConfig,
    place: Place,
    vectors: Option<&[usize]>,
) -> Result<Vec<Arc<dyn Device>>> {
    let devices = backends.devices()?;
    if devices.is_empty() {
        return Ok(Vec::new());
    }
    // The transports share it. Its thread ends when the last of them is dropped.
    let starter = Starter::new().context("Failed to start the devices thread")?;
    match config.transport {
        Transport::Mmio => attach_mmio(devices, place, &starter),
        Transport::Pci => attach_pci(devices, place, &starter, vectors),
    }
}

/// Where devices are attached.
pub(super) struct Place<'a> {
    pub(super) vm: &'a Arc<dyn Vm>,
    pub(super) ram: &'a Arc<GuestMemory>,
    pub(super) irqchip: &'a IrqChip,
    pub(super) bus: &'a mut Bus,
}

fn attach_pci(
    devices: Vec<Box<dyn VirtioDevice>>,
    place: Place,
    starter: &Arc<Starter>,
    vectors: Option<&[usize]>,
) -> Result<Vec<Arc<dyn Device>>> {
    let Place {
        vm,
        ram,
        irqchip,
        bus,
    } = place;
    let first = layout::pci_irq(irqchip.sources());
    let wires = [0, 1, 2, 3].map(|wire| irqchip.line(first + wire));
    let messages = irqchip.messages().cloned();
    let limit = messages.as_ref().map_or(0, |messages| messages.vectors);
    let vectors = match vectors {
        Some(saved) => same_vectors(&devices, saved, limit)?,
        None => share_vectors(&devices, limit),
    };
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

/// Distributes `limit` MSI-X vectors to the devices. A device gets one vector for each queue and
/// one more, if each device after it can still get two. Otherwise it gets two, one of them for all
/// its queues. If fewer than two are left it gets none, and uses its pin.
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

/// The numbers of MSI-X vectors that the devices had in a snapshot.
///
/// # Errors
/// Fails if that had another number of devices, or if all vectors together are more than `limit`.
fn same_vectors(
    devices: &[Box<dyn VirtioDevice>],
    saved: &[usize],
    limit: u32,
) -> Result<Vec<u16>> {
    let (here, there) = (devices.len(), saved.len());
    if here != there {
        bail!("The snapshot has {there} devices on PCI, and this machine has {here}");
    }
    let all = saved
        .iter()
        .fold(0, |all: usize, count| all.saturating_add(*count));
    if u32::try_from(all).is_ok_and(|all| all <= limit) {
        Ok(saved
            .iter()
            .map(|count| u16::try_from(*count))
            .collect::<Result<_, _>>()?)
    } else {
        bail!(
            "The snapshot's devices on PCI have {all} interrupt messages, and this host has room \
             for {limit}"
        );
    }
}

fn attach_mmio(
    devices: Vec<Box<dyn VirtioDevice>>,
    place: Place,
    starter: &Arc<Starter>,
) -> Result<Vec<Arc<dyn Device>>> {
    let Place {
        vm,
        ram,
        irqchip,
        bus,
    } = place;
    let (count, slots) = (devices.len(), layout::VIRTIO_MMIO_SLOTS);
    if count > slots as usize {
        bail!("{count} virtio devices are too many: --transport mmio takes {slots}, pci takes 31");
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

#[cfg(test)]
mod tests;
