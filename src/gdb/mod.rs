//! The debugger's view of a guest.

pub mod step;
