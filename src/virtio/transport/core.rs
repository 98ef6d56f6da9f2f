//! A device behind its transport: its registers, and when it starts and stops.
//!
//! VIRTIO 1.2, sections 2.1 (status), 2.2 (features), 2.4 (reset) and 3.1 (initialization):
//!
//! ```text
//! reset --ACKNOWLEDGE, DRIVER--> negotiating --FEATURES_OK--> queues set up --DRIVER_OK--> live
//!   ^                                                                                      |
//!   +------------------------- the driver writes status 0 --------------------------------+
//! ```
//!
//! DEVICE_NEEDS_RESET can be set at any time. Only a reset clears it. Writes by the driver in the
//! wrong state have no effect.
//!
//! On PCI the driver also has to set bus master enable: a device is live only while that is set.
//! See [`Core::set_bus_master`].
//!
//! The devices thread (`starter`) starts a device. The driver can read DRIVER_OK back at once,
//! before the device has started.
//!
//! The thread that asks for a stop waits until the device has stopped. It does not hold the
//! registers' lock meanwhile, so other threads can read the registers. They read the status from
//! before the stop. Their writes to the status and to queues have no effect until the device has
//! stopped. Two exceptions wait until then and take effect afterwards: another reset, and a change
//! of bus master enable.
//!
//! A reset over PCI waits too, although the standard lets a driver poll the status (section
//! 4.1.4.3.2). The reason is EDK2: its drivers write 0 to the status when the kernel takes over,
//! and do not poll. From then on the memory is the kernel's.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use virtio_bindings::virtio_ids::*;

use super::registers::{Life, Registers, SavedRegisters};
use super::starter::{Seat, Starter};
use crate::memory::GuestMemory;
use crate::snapshot::{LoadError, Parts, SaveError, Saved};
use crate::util::sync::lock;
use crate::util::{RateLimit, guest_info};
use crate::virtio::device::{Activation, VirtioDevice};
use crate::virtio::notify::{Fault, Interrupt, NEEDS_RESET, Shared};
use crate::virtio::queue::Virtq;
use crate::virtio::stop::StopFor;

pub use super::registers::{QueueSetup, Ring};

/// A device, and the state that its driver has set up. Any thread may call any method at any time.
pub struct Core {
    device: Arc<dyn VirtioDevice>,
    ram: Arc<GuestMemory>,
    shared: Arc<Shared>,
    fault: Fault,
    registers: Mutex<Registers>,
    /// Signalled when the device's life stops being [`Life::Stopping`].
    stopped: Condvar,
    seat: Arc<Seat>,
    starts: RateLimit,
    /// The last field, so that the seat is dropped before the devices thread may end.
    starter: Arc<Starter>,
}

impl Core {
    /// Returns `device` in its state after power-on. It interrupts its driver by `interrupt`.
    /// `starter` starts and stops it.
    ///
    /// # Errors
    /// Fails if the host has no file descriptors left.
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

    /// The device type, VIRTIO_ID_*.
    pub fn kind(&self) -> u32 {
        self.device.kind()
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// Locks the registers. Keep the lock for a short time only, and call no method meanwhile that
    /// locks them too.
    pub fn registers(&self) -> MutexGuard<'_, Registers> {
        lock(&self.registers)
    }

    /// Handles the driver's write of the device status. Zero resets the device, see
    /// [`Core::reset`]. DRIVER_OK starts it, without waiting for the start to finish.
    pub fn set_status(&self, status: u8) {
        if status == 0 {
            return self.reset();
        }
        let mut registers = self.registers();
        if registers.add_status(status) {
            self.start(&mut registers);
        }
    }

    /// Resets the device to its state after power-on. Waits until the device has stopped; requests
    /// that it has not begun are dropped.
    pub fn reset(&self) {
        let (mut registers, _) = self.stop();
        registers.reset();
        self.fault.interrupt().reset();
    }

    /// Stops a live device so that [`Core::resume`] can let it go on. When this returns, the device
    /// has completed the requests that it had begun, has notified its driver of them, and is idle.
    /// Must be called while no vCPU runs.
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
            // The device had failed to start, so it needs a reset, as before the pause.
            None => Life::Live,
        };
        self.stopped.notify_all();
    }

    /// Lets the device go on if [`Core::pause`] stopped it. Does not wait for the start to finish.
    pub fn resume(&self) {
        let mut registers = self.registers();
        if registers.life == Life::Paused {
            let queues = std::mem::take(&mut registers.kept);
            self.hand(&mut registers, queues, true);
        }
    }

    /// Sets whether the device may access guest memory. It may until this is called with `false`.
    ///
    /// `false` stops a live device as a reset does: when this returns, the device has stopped, and
    /// its driver finds DEVICE_NEEDS_RESET. No interrupt is sent, because whoever disables bus
    /// mastering wants no more accesses from the device. `true` starts a device whose driver became
    /// ready while bus mastering was disabled.
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

    /// The state of registers, queues and device, for a snapshot. The device must be paused.
    ///
    /// # Errors
    /// Fails if the host refuses to read a part of the device's state.
    pub fn save(&self) -> Result<Vec<Saved>, SaveError> {
        let mut saved = vec![Saved::of(&self.registers().save()?)?];
        saved.extend(self.device.save()?);
        Ok(saved)
    }

    /// Takes over the state that [`Core::save`] returned in another process, before the guest runs.
    /// The device must be new, except that bus master enable must be set as it was saved. If it was
    /// live, it is paused when this returns. Raises no interrupt.
    ///
    /// # Errors
    /// Fails if the state is not complete, or if this device cannot have it. The device must be
    /// dropped then.
    pub fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        // What the device loads may change the features that it can offer.
        self.device.load(parts)?;
        let saved: SavedRegisters = parts.take()?;
        let possible = self.device.features();
        let mut registers = self.registers();
        registers.load(&saved, possible, &self.ram, &self.fault)
    }

    /// The state of the device for users: the part of
    /// [`Device::describe`](crate::bus::Device::describe) that is the same for all transports. Does
    /// not stop the device.
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

    /// A number that changes with each change of the configuration space.
    pub fn config_generation(&self) -> u32 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// Reads the device's configuration space.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    /// Writes the device's configuration space.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// Waits until a pending start or stop has finished, successfully or not.
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

    /// Lets the devices thread start the device with `queues`.
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

    /// Stops the device as for a reset, and waits for that. Returns the locked registers, and
    /// whether the device was live or paused before.
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

    /// Waits until no thread is stopping the device, and returns the locked registers.
    fn not_stopping(&self) -> MutexGuard<'_, Registers> {
        let is_stopping = |registers: &mut Registers| registers.life == Life::Stopping;
        let registers = self.stopped.wait_while(self.registers(), is_stopping);
        registers.unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name of a device type for users (VIRTIO 1.2, chapter 5).
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

/// Ends the device's threads with the device.
impl Drop for Core {
    fn drop(&mut self) {
        drop(self.stop());
    }
}

#[cfg(test)]
mod tests;
