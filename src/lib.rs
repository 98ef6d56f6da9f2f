//! rvmm, the virtual machine monitor for RISC-V: a type-2 VMM on KVM's riscv64 interface.
//!
//! A module may use only the modules that stand before it in the list below. The unit test in
//! `house` checks this. `docs/architecture.md` explains what each module does.

pub mod util;

pub mod config;

pub mod memory;

pub mod hypervisor;

pub mod snapshot;

pub mod trace;

pub mod bus;

pub mod irqchip;

pub mod devices;

pub mod pci;

pub mod virtio;

pub mod boot;

pub mod vcpu;

pub mod report;

pub mod gdb;

pub mod control;

pub mod machine;

pub mod fork;

pub mod info;

pub mod cli;

#[cfg(test)]
mod house;
