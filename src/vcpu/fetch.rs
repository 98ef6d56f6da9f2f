//! The instruction access fault, where KVM leaves it to userspace.
//!
//! A hart that fetches from a guest-physical address without memory takes an instruction access fault.
//! Linux turns translation off so, when kexec leaves a kernel: the next fetch faults, and stvec is where
//! it goes on. KVM before Linux 7.x makes KVM_RUN fail instead, with EOPNOTSUPP
//! (`arch/riscv/kvm/vcpu_exit.c`, gstage_page_fault): the hart is as it was before the fetch. So the fault
//! is given to it here.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::Stop;
use super::paging::{Walk, walk};
use crate::hypervisor::{RegId, Result, Vcpu, host, regs};
use crate::memory::GuestMemory;
use crate::util::{RateLimit, guest_debug};

/// `scause` of the fault.
const INSTRUCTION_ACCESS_FAULT: u64 = 1;

/// Bits of `sstatus`, and the modes of KVM's register `mode`.
const SIE: u64 = 1 << 1;
const SPIE: u64 = 1 << 5;
const SPP: u64 = 1 << 8;
const MODE_SUPERVISOR: u64 = 1;

/// `stvec` without its mode: exceptions go to the base in both.
const BASE: u64 = !0b11;

/// Faults in five seconds. The host's kernel logs each (`kvm_err` in `vcpu_exit.c`), without a limit.
const FAULTS_MAX: u32 = 100;

/// Gives harts their instruction access faults.
pub struct FetchFaults {
    ram: Arc<GuestMemory>,
    /// Where the host's KVM is. On an emulated host the firmware loses the trap of an illegal instruction,
    /// and the guest finds itself there (docs/testing.md): the guest did not jump there.
    kvm: OnceLock<Option<Range<u64>>>,
    limit: RateLimit,
    lines: RateLimit,
}

impl FetchFaults {
    /// Those of a guest with this RAM.
    pub fn new(ram: Arc<GuestMemory>) -> Self {
        Self {
            ram,
            kvm: OnceLock::new(),
            limit: RateLimit::with_burst("fetch faults", FAULTS_MAX),
            lines: RateLimit::named("fetch fault lines"),
        }
    }

    /// KVM_RUN of `vcpu` failed with `errno`, at `pc`. The hart goes on at its trap handler, if it was a fetch
    /// from where no RAM is and the handler can be reached. Otherwise returns why it does not go on.
    ///
    /// # Errors
    /// A register cannot be read or written.
    #[cold]
    pub fn answer(&self, vcpu: &dyn Vcpu, errno: i32, pc: u64) -> Result<Option<Stop>> {
        let unrunnable = Stop::Unrunnable { errno, pc };
        if errno != libc::EOPNOTSUPP {
            return Ok(Some(unrunnable));
        }
        let Some(address) = self.fetched_from_nowhere(read(vcpu, regs::SATP)?, pc) else {
            return Ok(Some(unrunnable));
        };
        let kvm = self.kvm.get_or_init(host::kvm_module);
        if kvm.as_ref().is_some_and(|kvm| kvm.contains(&pc)) {
            return Ok(Some(Stop::LostTrap { pc }));
        }
        let handler = read(vcpu, regs::STVEC)? & BASE;
        if pc == handler {
            return Ok(Some(Stop::NoTrapHandler { pc }));
        }
        if self.limit.admit().is_none() {
            return Ok(Some(Stop::FetchFaults { pc }));
        }
        guest_debug!(
            self.lines,
            "the guest fetched from {pc:#x}, where nothing is: an instruction access fault"
        );
        enter_handler(vcpu, pc, address, handler)?;
        Ok(None)
    }

    /// The part of the instruction at `pc` that lies outside RAM, by its virtual address. None where all of
    /// it is in RAM, or where the hart would take a page fault.
    fn fetched_from_nowhere(&self, satp: u64, pc: u64) -> Option<u64> {
        const PARCEL: u64 = 2;
        const PAGE: u64 = 4096;
        let is_nowhere = |address| match walk(&self.ram, satp, address) {
            Walk::At(gpa) => !self.ram.address_in_range(GuestAddress(gpa)),
            Walk::NoEntry => true,
            Walk::Unmapped => false,
        };
        if is_nowhere(pc) {
            return Some(pc);
        }
        // The second half of an instruction of four bytes can lie on another page.
        let second = pc.wrapping_add(PARCEL);
        let Walk::At(gpa) = walk(&self.ram, satp, pc) else {
            return None;
        };
        let first = self.ram.read_obj::<u16>(GuestAddress(gpa)).ok()?;
        let is_long = u16::from_le(first) & 0b11 == 0b11;
        (is_long && second % PAGE == 0 && is_nowhere(second)).then_some(second)
    }
}

/// What a hart does when an instruction at `pc` raises the fault for `address` (RISC-V Privileged
/// Architecture, "Supervisor Cause Register" and "Supervisor Status Register").
fn enter_handler(vcpu: &dyn Vcpu, pc: u64, address: u64, handler: u64) -> Result<()> {
    let status = read(vcpu, regs::SSTATUS)?;
    let mode = read(vcpu, regs::MODE)?;
    let mut new = status & !(SPP | SPIE | SIE);
    if status & SIE != 0 {
        new |= SPIE;
    }
    if mode == MODE_SUPERVISOR {
        new |= SPP;
    }
    for (register, value) in [
        (regs::SSTATUS, new),
        (regs::SEPC, pc),
        (regs::SCAUSE, INSTRUCTION_ACCESS_FAULT),
        (regs::STVAL, address),
        (regs::PC, handler),
        (regs::MODE, MODE_SUPERVISOR),
    ] {
        vcpu.set_reg(register, value)?;
    }
    Ok(())
}

/// Every KVM has these registers.
fn read(vcpu: &dyn Vcpu, register: RegId) -> Result<u64> {
    Ok(vcpu.reg(register)?.unwrap_or_default())
}

#[cfg(test)]
mod tests;
