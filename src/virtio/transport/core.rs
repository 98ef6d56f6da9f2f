//! A device behind its transport: registers, and when it starts and stops.
//!
//! VIRTIO 1.2, sections 2.1 (status), 2.2 (features), 2.4 (reset) and 3.1 (initialization):
//!
//! ```text
//! reset --ACKNOWLEDGE, DRIVER--> negotiating --FEATURES_OK--> queues set up --DRIVER_OK--> live
//!   ^                                                                                      |
//!   +------------------------- the driver writes status 0 --------------------------------+
//! ```
//!
//! DEVICE_NEEDS_RESET can come at any time; then only a reset helps. What a driver writes at the
//! wrong time has no effect.
//!
//! On a bus that its driver has to let the device on, see [`Core::set_bus_master`], a device is live
//! only while it may be.
//!
//! A start is handed to the devices thread (`starter`), and DRIVER_OK shows at once. A stop is waited for
//! by who wants it, without the registers' lock: others read meanwhile, and find the status as it was.
//! Their writes to the status and to queues have no effect then, but a reset, and a change of the bus,
//! which wait for their turn. A reset over PCI waits too, although the standard lets a driver poll the
//! status (section 4.1.4.3.2): EDK2's drivers write 0 before they leave, do not poll, and the memory is
//! the kernel's then.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use virtio_bindings::virtio_ids::*;

use super::registers::{Life, Registers};
use super::starter::{Seat, Starter};
use crate::memory::GuestMemory;
use crate::util::sync::lock;
use crate::util::{RateLimit, guest_info};
use crate::virtio::device::{Activation, VirtioDevice};
use crate::virtio::notify::{Fault, Interrupt, NEEDS_RESET, Shared};
use crate::virtio::queue::Virtq;
use crate::virtio::stop::StopFor;

pub use super::registers::{QueueSetup, Ring};

/// A device, and what its driver has told it so far. Any thread may call it at any time.
pub struct Core {
    device: Arc<dyn VirtioDevice>,
    ram: Arc<GuestMemory>,
    shared: Arc<Shared>,
    fault: Fault,
    registers: Mutex<Registers>,
    /// Its life is [`Life::Stopping`] no more.
    stopped: Condvar,
    seat: Arc<Seat>,
    starts: RateLimit,
    /// Last: when it ends, the seat is gone too.
    starter: Arc<Starter>,
}

impl Core {
    /// `device` before its first reset, with `interrupt` to its driver. `starter` starts and stops it.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        ram: Arc<GuestMemory>,
        interrupt: Arc<dyn Interrupt>,
        starter: &Arc<Starter>,
    ) -> io::Result<Self> {
        let device: Arc<dyn VirtioDevice> = Arc::from(device);
        let shared = Arc::new(Shared::default());
        let fault = Fault::new(device.name(), &shared, interrupt);
        let registers = Registers::new(device.as_ref(), &shared)?;
        Ok(Self {
            ram,
            shared,
            seat: Seat::new(Arc::clone(&device), fault.clone()),
            fault,
            registers: Mutex::new(registers),
            stopped: Condvar::new(),
            starts: RateLimit::named(format!("{} starts", device.name())),
            device,
            starter: Arc::clone(starter),
        })
    }

    /// The device's type.
    pub fn kind(&self) -> u32 {
        self.device.kind()
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// The registers, for a look or a write. They are locked: for a moment only, and none of the
    /// methods here meanwhile.
    pub fn registers(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }

    /// The driver writes the device status. Zero is a reset, see [`Core::reset`]; DRIVER_OK has the
    /// device started, and does not wait for that.
    pub fn set_status(&self, status: u8) {
        if status == 0 {
            return self.reset();
        }
        let mut registers = self.registers();
        if registers.add_status(status) {
            self.start(&mut registers);
        }
    }

    /// Back to the state after power-on. Waits for what the device has begun; the rest is dropped.
    pub fn reset(&self) {
        let (mut registers, _) = self.stop();
        registers.reset();
        self.fault.interrupt().reset();
    }

    /// Stops the device, if it is live, in a way that [`Core::resume`] lets it go on. When this returns,
    /// what it had begun is complete, its driver is told of all that was done, and it does nothing.
    /// Called while no vCPU runs.
    pub fn pause(&self) {
        let mut registers = self.not_stopping();
        if registers.life != Life::Live {
            return;
        }
        registers.life = Life::Stopping;
        drop(registers);
        let queues = self.seat.stop(&self.starter, StopFor::Pause);
        let mut registers = self.registers();
        registers.life = match queues {
            Some(queues) => {
                registers.kept = queues;
                Life::Paused
            }
            // It could not start: it needs a reset, before and after.
            None => Life::Live,
        };
        self.stopped.notify_all();
    }

    /// Lets the device go on, if it was live before [`Core::pause`]. Does not wait for that.
    pub fn resume(&self) {
        let mut registers = self.registers();
        if registers.life == Life::Paused {
            let queues = std::mem::take(&mut registers.kept);
            self.hand(&mut registers, queues, true);
        }
    }

    /// Whether the device may access memory; it may until this says otherwise.
    ///
    /// One that runs and may no longer stops as by a reset: when this returns, it has ended what it had
    /// begun, and its driver finds DEVICE_NEEDS_RESET. No interrupt tells of that: who takes the bus away
    /// wants silence. One whose driver is ready, and that has waited for the bus, starts.
    pub fn set_bus_master(&self, allowed: bool) {
        if allowed {
            let mut registers = self.not_stopping();
            registers.bus_master = true;
            if registers.is_ready() {
                self.start(&mut registers);
            }
            return;
        }
        let (mut registers, was_live) = self.stop();
        registers.bus_master = false;
        if was_live {
            self.shared.status.fetch_or(NEEDS_RESET, Ordering::AcqRel);
            let name = self.device.name();
            guest_info!(self.starts, "{name}: stopped: its bus master enable is off");
        }
    }

    /// What people may want to know: the part of [`Device::describe`](crate::bus::Device::describe) that all
    /// transports have. The device goes on meanwhile.
    pub fn describe(&self) -> Value {
        let registers = self.registers();
        json!({
            "kind": kind_name(self.kind()),
            "status": registers.status(),
            "features": registers.features(),
            "paused": registers.life == Life::Paused,
            "queues": registers.describe_queues(&self.ram),
        })
    }

    /// Changes whenever the configuration space does.
    pub fn config_generation(&self) -> u32 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// Reads the device's configuration space.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    /// Writes it.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// Waits until a start that is under way has ended, well or not.
    pub fn wait_settled(&self) {
        self.seat.wait_settled();
    }

    fn start(&self, registers: &mut Registers) {
        if registers.life != Life::Idle || !registers.bus_master {
            return;
        }
        let queues = match registers.live_queues(&self.ram, &self.fault) {
            Ok(queues) => queues,
            Err(why) => return self.fault.needs_reset(why),
        };
        let name = self.device.name();
        let count = queues.len();
        guest_info!(self.starts, "{name}: its driver is ready, {count} queues");
        self.hand(registers, queues, false);
    }

    /// Has the device started with `queues`.
    fn hand(&self, registers: &mut Registers, queues: Vec<Virtq>, resumes: bool) {
        registers.life = Life::Live;
        let activation = Activation {
            ram: Arc::clone(&self.ram),
            features: registers.features(),
            queues,
            fault: self.fault.clone(),
            resumes,
        };
        self.seat.start(&self.starter, activation);
    }

    /// Stops the device for good, if it is live or paused, and waits for that. Returns with the registers locked, and
    /// whether it was.
    fn stop(&self) -> (MutexGuard<'_, Registers>, bool) {
        let mut registers = self.not_stopping();
        match registers.life {
            Life::Live => {}
            Life::Paused => {
                registers.kept.clear();
                registers.life = Life::Idle;
                return (registers, true);
            }
            Life::Idle | Life::Stopping => return (registers, false),
        }
        registers.life = Life::Stopping;
        drop(registers);
        drop(self.seat.stop(&self.starter, StopFor::Reset));
        let mut registers = self.registers();
        registers.life = Life::Idle;
        self.stopped.notify_all();
        (registers, true)
    }

    /// The registers, once nobody waits for the device to stop.
    fn not_stopping(&self) -> MutexGuard<'_, Registers> {
        let is_stopping = |registers: &mut Registers| registers.life == Life::Stopping;
        let registers = self.stopped.wait_while(self.registers(), is_stopping);
        registers.unwrap_or_else(PoisonError::into_inner)
    }
}

/// What people call a type of device (VIRTIO 1.2, chapter 5).
fn kind_name(kind: u32) -> String {
    match kind {
        VIRTIO_ID_NET => "virtio-net".into(),
        VIRTIO_ID_BLOCK => "virtio-blk".into(),
        VIRTIO_ID_CONSOLE => "virtio-console".into(),
        VIRTIO_ID_RNG => "virtio-rng".into(),
        VIRTIO_ID_INPUT => "virtio-input".into(),
        other => format!("virtio-{other}"),
    }
}

/// A device's threads end with it.
impl Drop for Core {
    fn drop(&mut self) {
        drop(self.stop());
    }
}

#[cfg(test)]
mod tests;
