//! Virtio devices: one state machine, two transports, a folder for each kind of device.
//!
//! Virtual I/O Device (VIRTIO) Version 1.2. A device implements [`device::VirtioDevice`]; its
//! registers and its life are [`core::Core`]'s, which `mmio` and `pci` only decode; the devices
//! thread ([`starter::Starter`]) starts and stops it; its queues are [`queue::Virtq`]s that a
//! [`worker::Worker`] serves.

pub mod blk;
pub mod console;
pub mod core;
pub mod device;
pub mod input;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod queue;
mod registers;
pub mod rng;
pub mod starter;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod transports;
mod used;
pub mod worker;
