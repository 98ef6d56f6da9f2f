//! Makes a hart take an exception that KVM has left to rvmm.

use super::cause::Cause;
use crate::hypervisor::{RegId, Result, Vcpu, regs};

/// Bits of `sstatus`, and the value of KVM's `mode` register for supervisor mode.
pub(super) const SIE: u64 = 1 << 1;
pub(super) const SPIE: u64 = 1 << 5;
/// The mode before the trap: supervisor mode, and not user mode.
pub const SPP: u64 = 1 << 8;
pub(super) const MODE_SUPERVISOR: u64 = 1;

/// Mask for the base address in `stvec`. In both modes of `stvec`, exceptions go to the base
/// address.
pub const BASE: u64 = !0b11;

/// Sets the registers of `vcpu`'s hart as if the instruction at its `pc` had caused the exception
/// `cause`, with `value` in `stval`. The hart continues at its trap handler (RISC-V Privileged
/// Architecture, "Supervisor Cause Register" and "Supervisor Status Register").
///
/// # Errors
/// Fails if KVM cannot read or write a register.
pub fn enter(vcpu: &dyn Vcpu, cause: Cause, value: u64) -> Result<()> {
    let status = read(vcpu, regs::SSTATUS)?;
    let mut new = status & !(SPP | SPIE | SIE);
    if status & SIE != 0 {
        new |= SPIE;
    }
    if read(vcpu, regs::MODE)? == MODE_SUPERVISOR {
        new |= SPP;
    }
    for (register, value) in [
        (regs::SSTATUS, new),
        (regs::SEPC, read(vcpu, regs::PC)?),
        (regs::SCAUSE, cause.0),
        (regs::STVAL, value),
        (regs::PC, read(vcpu, regs::STVEC)? & BASE),
        (regs::MODE, MODE_SUPERVISOR),
    ] {
        vcpu.set_reg(register, value)?;
    }
    Ok(())
}

/// Reads a register that every KVM has.
pub(super) fn read(vcpu: &dyn Vcpu, register: RegId) -> Result<u64> {
    Ok(vcpu.reg(register)?.unwrap_or_default())
}
