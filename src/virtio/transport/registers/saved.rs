//! The saved state of a device's registers and queues, for any transport.

use std::iter::zip;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::{COMMON_FEATURES, DRIVERS, FEATURES_OK, Life, QueueSetup, READY, Registers, Ring};
use crate::memory::GuestMemory;
use crate::snapshot::{LoadError, SaveError, State};
use crate::virtio::notify::{Fault, NEEDS_RESET};
use crate::virtio::queue::{Position, Virtq};

/// What a driver has set up in the registers, and how far the device has served its queues.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::virtio::transport) struct SavedRegisters {
    status: u8,
    offered: u64,
    accepted: u64,
    device_select: u32,
    driver_select: u32,
    queue_select: u16,
    generation: u32,
    queues: Vec<SavedQueue>,
    life: SavedLife,
}

/// A queue as its driver has set it up.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedQueue {
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

/// Whether the device serves its queues.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
enum SavedLife {
    /// It does not: its driver is not ready, or the device needs a reset.
    Idle,
    /// Its start has failed, so it needs a reset.
    Failed,
    /// It does when the machine runs. The positions are those of the enabled queues, in ascending
    /// order.
    Live(Vec<Position>),
}

impl State for SavedRegisters {
    const KIND: &'static str = "virtio";
    const VERSION: u32 = 1;
}

fn unfit(why: impl Into<String>) -> LoadError {
    LoadError::Unfit(why.into())
}

impl Registers {
    /// The state of the registers. The device must be paused or at rest.
    ///
    /// # Errors
    /// Fails if the device is neither, or has not returned all its queues. Both are bugs in rvmm.
    pub(in crate::virtio::transport) fn save(&self) -> Result<SavedRegisters, SaveError> {
        let life = match self.life {
            Life::Idle => SavedLife::Idle,
            // A pause would have stopped a device that has started.
            Life::Live => SavedLife::Failed,
            Life::Stopping => return Err(SaveError::Other("the device is stopping".into())),
            Life::Paused => SavedLife::Live(self.positions()?),
        };
        let queues = self.queues.iter().map(|queue| SavedQueue {
            size: queue.size,
            enabled: queue.enabled,
            descriptors: queue.rings[Ring::Descriptors as usize],
            driver: queue.rings[Ring::Driver as usize],
            device: queue.rings[Ring::Device as usize],
        });
        Ok(SavedRegisters {
            status: self.status(),
            offered: self.offered,
            accepted: self.accepted,
            device_select: self.device_select,
            driver_select: self.driver_select,
            queue_select: self.queue_select,
            generation: self.config_generation(),
            queues: queues.collect(),
            life,
        })
    }

    /// The positions of the enabled queues, which the paused device has returned.
    fn positions(&self) -> Result<Vec<Position>, SaveError> {
        let enabled = zip(0u16.., &self.queues).filter(|(_, queue)| queue.enabled);
        let position = |(index, _)| {
            let kept = self.kept.iter().find(|queue| queue.index() == index);
            kept.map(Virtq::position)
                .ok_or_else(|| SaveError::Other(format!("queue {index} is missing")))
        };
        enabled.map(position).collect()
    }

    /// Takes over `saved`. The registers must be as after power-on, except bus master enable, which
    /// must be as it was saved. A device that was live is paused then. `possible` are the features
    /// that the device can offer here.
    ///
    /// # Errors
    /// Fails if the device cannot have this state. It must be dropped then.
    pub(in crate::virtio::transport) fn load(
        &mut self,
        saved: &SavedRegisters,
        possible: u64,
        ram: &Arc<GuestMemory>,
        fault: &Fault,
    ) -> Result<(), LoadError> {
        if self.life != Life::Idle || self.status() != 0 {
            return Err(unfit("it has been started already"));
        }
        self.load_features(saved, possible | COMMON_FEATURES)?;
        let (here, there) = (self.queues.len(), saved.queues.len());
        if here != there {
            return Err(unfit(format!(
                "it has {there} queues in the snapshot, and {here} now"
            )));
        }
        for (index, (queue, saved)) in self.queues.iter_mut().zip(&saved.queues).enumerate() {
            let loaded = queue.load(saved);
            loaded.map_err(|why| unfit(format!("queue {index}: {why}")))?;
        }
        self.device_select = saved.device_select;
        self.driver_select = saved.driver_select;
        self.queue_select = saved.queue_select;
        let shared = &self.shared;
        shared.status.store(saved.status, Ordering::Release);
        shared.generation.store(saved.generation, Ordering::Release);
        match &saved.life {
            SavedLife::Idle => Ok(()),
            SavedLife::Failed if saved.status & (READY | NEEDS_RESET) == READY | NEEDS_RESET => {
                self.life = Life::Live;
                Ok(())
            }
            SavedLife::Failed => Err(unfit("its start has failed, but it needs no reset")),
            SavedLife::Live(positions) => self.load_live(positions, ram, fault),
        }
    }

    fn load_features(&mut self, saved: &SavedRegisters, possible: u64) -> Result<(), LoadError> {
        let unknown = saved.status & !(DRIVERS | NEEDS_RESET);
        if unknown != 0 {
            return Err(unfit(format!("its status has unknown bits: {unknown:#x}")));
        }
        // A driver that reads the features again, such as after a reset, finds those from before.
        self.offered = saved.offered & possible;
        self.accepted = saved.accepted;
        let missing = saved.accepted & !self.offered;
        // Before FEATURES_OK, a driver may have accepted anything.
        if saved.status & FEATURES_OK != 0 && missing != 0 {
            return Err(unfit(format!(
                "its driver uses features that it does not offer here: {}",
                bits(missing)
            )));
        }
        Ok(())
    }

    fn load_live(
        &mut self,
        positions: &[Position],
        ram: &Arc<GuestMemory>,
        fault: &Fault,
    ) -> Result<(), LoadError> {
        if self.status() & READY != READY {
            return Err(unfit("it is live, but its driver is not ready"));
        }
        if !self.bus_master {
            return Err(unfit("it is live, but its bus master enable is off"));
        }
        let mut queues = self.live_queues(ram, fault).map_err(unfit)?;
        let (enabled, served) = (queues.len(), positions.len());
        if enabled != served {
            return Err(unfit(format!(
                "{enabled} of its queues are enabled, and {served} have positions"
            )));
        }
        for (queue, position) in zip(&mut queues, positions) {
            queue.go_to(*position);
        }
        self.kept = queues;
        self.life = Life::Paused;
        Ok(())
    }
}

impl QueueSetup {
    fn load(&mut self, saved: &SavedQueue) -> Result<(), String> {
        if !self.may_have(saved.size) {
            let (size, most) = (saved.size, self.max_size);
            return Err(format!("{size} entries are no power of two up to {most}"));
        }
        self.size = saved.size;
        self.enabled = saved.enabled;
        self.rings = [saved.descriptors, saved.driver, saved.device];
        Ok(())
    }
}

/// The numbers of the bits that are set, such as `5, 29`.
fn bits(set: u64) -> String {
    let bits = (0..u64::BITS).filter(|bit| set & (1 << bit) != 0);
    let bits: Vec<_> = bits.map(|bit| bit.to_string()).collect();
    bits.join(", ")
}
