//! PCI: a host bridge with an ECAM and one memory window, and functions with one BAR each.
//!
//! The configuration space and MSI-X follow the PCI Local Bus Specification 3.0, the ECAM the PCI
//! Express Base Specification. The guest assigns and moves BARs; the doorbells move with them.

pub mod config;
pub mod function;
pub mod host;
mod interrupts;
mod msix;

pub use config::{ConfigSpace, Identity};
pub use function::{BarDevice, Function};
pub use host::{HostBridge, saved_vectors};
pub use interrupts::Interrupts;
