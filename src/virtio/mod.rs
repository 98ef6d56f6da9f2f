//! Virtio devices: one state machine, two transports, and a file or folder for each kind of device.
//!
//! Follows Virtual I/O Device (VIRTIO) Version 1.2. A device implements [`device::VirtioDevice`].
//! The [`transport`] has the device's registers, and starts and stops it. The device's queues are
//! [`queue::Virtq`]s, which a [`worker::Worker`] serves.

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
