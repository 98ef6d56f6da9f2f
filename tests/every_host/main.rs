//! Cases that run on each kind of host: `scripts/test` runs this binary once in each L1.

#[path = "../common/mod.rs"]
mod common;

mod conformance;
mod console;
mod disk;
mod errors;
mod fdt;
mod gdb;
mod guests;
mod harts;
mod imsic;
mod info;
mod irqchip;
mod kernels;
mod linux;
mod machine;
mod memory;
mod net;
mod output;
mod pause;
mod report;
mod reset;
mod seam;
mod snapshot;
mod stats;
mod teaching;
mod trace;
mod usage;
