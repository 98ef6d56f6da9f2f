//! PCI: a host bridge with an ECAM and one window of memory, and functions with one BAR each.
//!
//! PCI Local Bus Specification 3.0 for the configuration space and MSI-X, PCI Express Base
//! Specification for the ECAM. The guest assigns and moves BARs; what depends on them follows.

pub mod config;
pub mod function;
pub mod host;
mod interrupts;
mod msix;

pub use config::{ConfigSpace, Identity};
pub use function::{BarDevice, Function};
pub use host::HostBridge;
pub use interrupts::Interrupts;
