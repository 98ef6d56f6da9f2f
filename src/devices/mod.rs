//! Devices other than virtio devices.

pub mod console;
pub mod goldfish_rtc;
pub mod sifive_test;
pub mod uart16550;
