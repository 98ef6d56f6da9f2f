//! One hart as it stands: the registers that a report shows.

use super::cause::Cause;
use super::paging::{Walk, walk};
use super::trap::BASE;
use crate::hypervisor::{HartState, RegId, Result, Vcpu, regs};
use crate::memory::GuestMemory;

/// The number of general registers, x0 included.
pub const REGISTERS: usize = 32;

/// The ABI names of x0 to x31.
pub const NAMES: [&str; REGISTERS] = [
    "zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1", "a0", "a1", "a2", "a3", "a4",
    "a5", "a6", "a7", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "t3", "t4",
    "t5", "t6",
];

/// The number of `ra`, the return address.
pub const RA: usize = 1;
/// The number of `sp`, the stack pointer.
pub const SP: usize = 2;
/// The number of `a7`, in which an SBI call has its extension.
pub const A7: usize = 17;
/// The number of `s0`, the frame pointer.
pub const FP: usize = 8;

/// The registers of a hart that does not run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hart {
    /// Its number.
    pub number: u32,
    /// Whether it is stopped: it runs nothing until another hart starts it.
    pub is_stopped: bool,
    /// The program counter.
    pub pc: u64,
    /// x0 to x31.
    pub x: [u64; REGISTERS],
    /// Whether it runs in supervisor mode, and not in user mode.
    pub is_supervisor: bool,
    /// `sstatus`.
    pub sstatus: u64,
    /// `stvec`.
    pub stvec: u64,
    /// `sepc`: where the last trap happened.
    pub sepc: u64,
    /// `scause`: the cause of the last trap.
    pub scause: u64,
    /// `stval`: more about the last trap, such as the address that faulted.
    pub stval: u64,
    /// `satp`: the root of the page tables, and their mode.
    pub satp: u64,
    /// `sie`.
    pub sie: u64,
    /// `sip`.
    pub sip: u64,
}

impl Hart {
    /// Reads the registers of hart `number` from its parked `vcpu`.
    ///
    /// # Errors
    /// Fails if KVM refuses to read a register.
    pub fn read(number: u32, vcpu: &dyn Vcpu) -> Result<Self> {
        let read = |id: RegId| -> Result<u64> { Ok(vcpu.reg(id)?.unwrap_or_default()) };
        let mut x = [0; REGISTERS];
        for (index, register) in (1..).zip(x.iter_mut().skip(1)) {
            *register = read(RegId::core(index))?;
        }
        Ok(Self {
            number,
            is_stopped: vcpu.hart_state()? == HartState::Stopped,
            pc: read(regs::PC)?,
            x,
            is_supervisor: read(regs::MODE)? != 0,
            sstatus: read(regs::SSTATUS)?,
            stvec: read(regs::STVEC)?,
            sepc: read(regs::SEPC)?,
            scause: read(regs::SCAUSE)?,
            stval: read(regs::STVAL)?,
            satp: read(regs::SATP)?,
            sie: read(regs::SIE)?,
            sip: read(regs::SIP)?,
        })
    }

    /// The address at which its handler of exceptions begins.
    pub fn vector(&self) -> u64 {
        self.stvec & BASE
    }

    /// Whether there was a trap: a fault at address 0 for address 0 looks like none.
    pub fn has_trapped(&self) -> bool {
        (self.scause, self.sepc, self.stval) != (0, 0, 0)
    }

    /// The cause of the last trap.
    pub fn cause(&self) -> Cause {
        Cause(self.scause)
    }

    /// The guest-physical address of the virtual address `address`. `None` if it is not mapped.
    pub fn physical(&self, ram: &GuestMemory, address: u64) -> Option<u64> {
        match walk(ram, self.satp, address) {
            Walk::At(physical) => Some(physical),
            Walk::NoEntry | Walk::Unmapped => None,
        }
    }

    /// The 8 bytes at the virtual address `address`, which must be a multiple of 8. `None` if they
    /// are not in RAM.
    pub fn word(&self, ram: &GuestMemory, address: u64) -> Option<u64> {
        let bytes = self.bytes::<8>(ram, address)?;
        Some(u64::from_le_bytes(bytes))
    }

    /// The instruction at the virtual address `address`, and its length: 2 or 4 bytes. `None` if it
    /// is not in RAM.
    pub fn instruction(&self, ram: &GuestMemory, address: u64) -> Option<(u32, usize)> {
        /// The two lowest bits of an instruction of four bytes.
        const LONG: u16 = 0b11;
        let low = u16::from_le_bytes(self.bytes::<2>(ram, address)?);
        if low & LONG != LONG {
            return Some((low.into(), 2));
        }
        // The second half may be in another page.
        let high = u16::from_le_bytes(self.bytes::<2>(ram, address.wrapping_add(2))?);
        Some(((u32::from(high) << 16) | u32::from(low), 4))
    }

    /// Bytes that do not cross a page.
    fn bytes<const N: usize>(&self, ram: &GuestMemory, address: u64) -> Option<[u8; N]> {
        use vm_memory::{Bytes, GuestAddress};
        let at = self.physical(ram, address)?;
        let mut bytes = [0; N];
        ram.read_slice(&mut bytes, GuestAddress(at)).ok()?;
        Some(bytes)
    }
}
