//! Prepares the guest's boot: a kernel, an initrd and a device tree in RAM, and the boot hart's
//! registers.
//!
//! `plan` opens the files and chooses their places in RAM. `load` loads them. The other modules are
//! used by these two.

pub mod fdt;
pub mod files;
pub(crate) mod isa;
pub mod kernel;
pub(crate) mod load;
pub mod placement;
pub(crate) mod plan;
pub(crate) mod saved;
