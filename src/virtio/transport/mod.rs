//! The part between a device and its driver that is the same for every kind of device: registers,
//! and starting and stopping.
//!
//! [`core::Core`] is a device with its registers (`registers`). [`mmio`] and [`pci`] decode a
//! guest's accesses to them. The devices thread, [`starter::Starter`], starts and stops the device.

pub mod core;
pub mod mmio;
pub mod pci;
mod registers;
pub mod starter;
#[cfg(test)]
mod tests;
