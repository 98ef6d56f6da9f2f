//! rvmm, the virtual machine monitor for RISC-V: a type-2 VMM on KVM's riscv64 interface.
//!
//! Modules depend on each other one way only, in the order of the list below; `house` checks it.
//! `docs/architecture.md` walks through them.

pub mod util;

pub mod config;

pub mod memory;

pub mod hypervisor;

pub mod bus;

pub mod irqchip;

pub mod devices;

pub mod pci;

pub mod virtio;

pub mod boot;

pub mod vcpu;

pub mod control;

pub mod machine;

pub mod info;

pub mod cli;

#[cfg(test)]
mod house;
