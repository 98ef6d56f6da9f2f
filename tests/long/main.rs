//! Long cases: `scripts/test --all` runs this binary once in each L1.

#[path = "../common/mod.rs"]
mod common;

mod disk;
mod gdb;
mod kexec;
mod net;
mod pause;
mod report;
mod snapshot;
