//! Snapshots of a machine: the state that its parts save, and the files that hold it.
//!
//! `saved` is the state of one part of the machine, `file` the file that holds the state of all
//! parts, and `directory` the directory with that file and guest RAM. docs/snapshot-format.md
//! describes the files. `machine` saves and restores a whole machine.

pub mod directory;
pub mod file;
mod header;
mod saved;

#[cfg(test)]
pub(crate) mod testing;

pub use header::{Header, MACHINE, RamState, TimeState};
pub use saved::{LoadError, Parts, SaveError, Saved, State};
