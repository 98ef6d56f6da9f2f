//! Injects instruction access faults where KVM leaves them to userspace.
//!
//! A hart that fetches from a guest-physical address without memory takes an instruction access
//! fault. Linux' kexec relies on this when it turns off address translation: the next fetch faults,
//! and execution continues at stvec. KVM before Linux 7.x does not inject the fault. Instead
//! KVM_RUN fails with EOPNOTSUPP (`arch/riscv/kvm/vcpu_exit.c`, gstage_page_fault), and the hart's
//! registers are as before the fetch. So this module injects the fault.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::Stop;
use super::cause::Cause;
use super::paging::{Walk, walk};
use super::trap::{self, BASE, read};
use crate::hypervisor::{Result, Vcpu, host, regs};
use crate::memory::GuestMemory;
use crate::util::{RateLimit, guest_debug};

/// Faults that a guest may take in five seconds. The host's kernel logs each of them (`kvm_err` in
/// `vcpu_exit.c`) without a rate limit.
const FAULTS_MAX: u32 = 100;

/// Injects instruction access faults.
pub struct FetchFaults {
    ram: Arc<GuestMemory>,
    /// Address range of the host's KVM module. On an emulated host the firmware can lose the trap
    /// of an illegal instruction, and the guest then continues at an address of this range
    /// (docs/testing.md). The guest did not jump there.
    kvm: OnceLock<Option<Range<u64>>>,
    limit: RateLimit,
    lines: RateLimit,
}

impl FetchFaults {
    /// Injects the faults of a guest with this RAM.
    pub fn new(ram: Arc<GuestMemory>) -> Self {
        Self {
            ram,
            kvm: OnceLock::new(),
            limit: RateLimit::with_burst("fetch faults", FAULTS_MAX),
            lines: RateLimit::named("fetch fault lines"),
        }
    }

    /// Handles a KVM_RUN of `vcpu` that failed with `errno` at `pc`. If the cause was a fetch from
    /// outside RAM, and the trap handler is somewhere else, injects the fault and returns none: the
    /// hart continues at its trap handler. Otherwise returns why the machine must end.
    ///
    /// # Errors
    /// Fails if KVM cannot read or write a register.
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
            "the guest fetched from {pc:#x}, outside RAM: injected an instruction access fault"
        );
        trap::enter(vcpu, Cause::INSTRUCTION_ACCESS, address)?;
        Ok(None)
    }

    /// The virtual address of the part of the instruction at `pc` that is outside RAM. None if all
    /// of it is in RAM, or if the hart would take a page fault instead.
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
        // The second half of a 4-byte instruction can be on the next page.
        let second = pc.wrapping_add(PARCEL);
        let Walk::At(gpa) = walk(&self.ram, satp, pc) else {
            return None;
        };
        let first = self.ram.read_obj::<u16>(GuestAddress(gpa)).ok()?;
        let is_long = u16::from_le(first) & 0b11 == 0b11;
        (is_long && second % PAGE == 0 && is_nowhere(second)).then_some(second)
    }
}

#[cfg(test)]
mod tests;
