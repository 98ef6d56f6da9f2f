//! The debugger's view of a guest.

pub mod arch;
pub mod link;
pub mod plants;
pub mod step;
pub mod target;
