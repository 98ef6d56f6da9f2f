//! The interrupts of a device on PCI: messages (MSI-X), or the pin and the ISR status.

use std::iter::zip;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::pci::Interrupts;
use crate::snapshot::{LoadError, State};
use crate::util::sync::lock;
use crate::virtio::notify::Interrupt;

/// The vector of a queue or event that sends no message.
const NO_VECTOR: u16 = 0xffff;
/// Bits of the ISR status.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Sends MSI-X messages if the driver has enabled them. Otherwise uses the ISR status and the pin,
/// which is high while a bit of the ISR status is set.
pub(super) struct PciInterrupt {
    interrupts: Arc<Interrupts>,
    isr: Mutex<u8>,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
}

impl PciInterrupt {
    /// A device with this number of `queues`, none of which has a vector yet.
    pub(super) fn new(interrupts: Arc<Interrupts>, queues: usize) -> Self {
        Self {
            interrupts,
            isr: Mutex::new(0),
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    /// The vector for changes of the configuration; NO_VECTOR if there is none.
    pub(super) fn config_vector(&self) -> u16 {
        self.config.load(Ordering::Acquire)
    }

    /// The vector of a queue; NO_VECTOR if there is none.
    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        let vector = self.queues.get(usize::from(queue));
        vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    /// Returns `vector`, or NO_VECTOR if there is no such vector (section 4.1.5.1.2.1).
    fn known(&self, vector: u16) -> u16 {
        if vector < self.interrupts.vectors() {
            vector
        } else {
            NO_VECTOR
        }
    }

    /// Sets the vector of a queue. An unknown vector becomes NO_VECTOR.
    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(known) = self.queues.get(usize::from(queue)) {
            known.store(self.known(vector), Ordering::Release);
        }
    }

    /// Sets the vector for changes of the configuration. An unknown vector becomes NO_VECTOR.
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config.store(self.known(vector), Ordering::Release);
    }

    fn raise(&self, bit: u8) {
        let mut isr = lock(&self.isr);
        if *isr == 0 {
            self.interrupts.set_pin(true);
        }
        *isr |= bit;
    }

    /// Reads the ISR status without clearing it.
    pub(super) fn status(&self) -> u8 {
        *lock(&self.isr)
    }

    /// Reads and clears the ISR status, and lowers the pin.
    pub(super) fn take(&self) -> u8 {
        let mut isr = lock(&self.isr);
        if *isr != 0 {
            self.interrupts.set_pin(false);
        }
        std::mem::take(&mut isr)
    }
}

/// The saved state: the ISR status, and the vectors that the driver has chosen. The messages
/// themselves are the bridge's state. The pin is high while the ISR status is not 0.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedInterrupt {
    isr: u8,
    config_vector: u16,
    queue_vectors: Vec<u16>,
}

impl State for SavedInterrupt {
    const KIND: &'static str = "virtio-pci";
    const VERSION: u32 = 1;
}

impl PciInterrupt {
    pub(super) fn save(&self) -> SavedInterrupt {
        let vectors = self.queues.iter();
        SavedInterrupt {
            isr: self.status(),
            config_vector: self.config_vector(),
            queue_vectors: vectors.map(|v| v.load(Ordering::Acquire)).collect(),
        }
    }

    /// Takes over `saved`. The device must be new. Sets the pin.
    pub(super) fn load(&self, saved: &SavedInterrupt) -> Result<(), LoadError> {
        let SavedInterrupt {
            isr,
            config_vector,
            queue_vectors,
        } = saved;
        if isr & !(ISR_QUEUE | ISR_CONFIG) != 0 {
            let why = format!("its ISR status is {isr:#x}, with unknown bits");
            return Err(LoadError::Unfit(why));
        }
        let (here, there) = (self.queues.len(), queue_vectors.len());
        if here != there {
            let why = format!("{there} queues have vectors in the snapshot, and {here} now");
            return Err(LoadError::Unfit(why));
        }
        let mut vectors = queue_vectors.iter().chain([config_vector]);
        if let Some(vector) = vectors.find(|vector| self.known(**vector) != **vector) {
            let count = self.interrupts.vectors();
            let why = format!("it uses vector {vector}, but has {count} of them");
            return Err(LoadError::Unfit(why));
        }
        self.config.store(*config_vector, Ordering::Release);
        for (queue, vector) in zip(&self.queues, queue_vectors) {
            queue.store(*vector, Ordering::Release);
        }
        if *isr != 0 {
            self.raise(*isr);
        }
        Ok(())
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, index: u16) {
        if self.interrupts.uses_messages() {
            self.interrupts.message(self.queue_vector(index));
        } else {
            self.raise(ISR_QUEUE);
        }
    }

    fn config(&self) {
        if self.interrupts.uses_messages() {
            self.interrupts.message(self.config_vector());
        } else {
            self.raise(ISR_CONFIG);
        }
    }

    fn queue_fd(&self, index: u16) -> Option<EventFd> {
        if !self.interrupts.uses_messages() {
            return None;
        }
        self.interrupts.message_fd(self.queue_vector(index))
    }

    fn reset(&self) {
        self.take();
        self.config.store(NO_VECTOR, Ordering::Release);
        for queue in &self.queues {
            queue.store(NO_VECTOR, Ordering::Release);
        }
    }
}
