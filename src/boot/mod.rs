//! What the guest finds at its first instruction: a kernel, an initrd and a device tree in RAM.
//!
//! `plan` opens the files and says where each goes; `load` puts them there. The rest serves both.

pub mod fdt;
pub mod files;
pub(crate) mod isa;
pub mod kernel;
pub(crate) mod load;
pub mod placement;
pub(crate) mod plan;
