//! What is between a device and its driver, once for every kind of device: registers, and a device's life.
//!
//! [`core::Core`] is a device behind registers (`registers`), which [`mmio`] and [`pci`] only decode. The
//! devices thread, [`starter::Starter`], starts and stops it.

pub mod core;
pub mod mmio;
pub mod pci;
mod registers;
pub mod starter;
#[cfg(test)]
mod tests;
