//! Virtio devices: one state machine, two transports, a folder for each kind of device.
//!
//! Virtual I/O Device (VIRTIO) Version 1.2. A device implements [`device::VirtioDevice`]; its
//! registers, and when it starts and stops, are the [`transport`]'s; its queues are
//! [`queue::Virtq`]s that a [`worker::Worker`] serves.

mod bits;
pub mod blk;
pub mod console;
pub mod device;
pub mod input;
pub mod net;
pub mod notify;
pub mod queue;
pub mod rng;
pub mod stop;
#[cfg(test)]
mod testing;
pub mod transport;
mod used;
pub mod worker;
