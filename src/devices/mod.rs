//! Devices that are not virtio.

pub mod console;
pub mod uart16550;
