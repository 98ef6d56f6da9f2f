//! The likely mistake behind a crash: the ones that people who write kernels make.

use crate::memory::GuestMemory;
use crate::vcpu::cause::Cause;
use crate::vcpu::hart::{Hart, SP};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend};

/// A common mistake. Its `Display` form is one sentence that says what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// The trap vector is no code.
    NoTrapVector,
    /// The trap handler traps itself.
    HandlerTraps,
    /// A fetch from a virtual address without page tables.
    NoPageTables,
    /// The stack pointer is outside RAM.
    StackOutsideRam,
    /// An instruction for the CSR of a higher privilege mode.
    MachineCsr(u16),
    /// An atomic or vector instruction on a device's registers.
    AtomicOnDevice,
}

impl std::fmt::Display for Hint {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Hint::NoTrapVector => {
                f.write_str("stvec does not point to code: set it before the first trap can happen")
            }
            Hint::HandlerTraps => f.write_str(
                "the trap handler causes the same trap again: its code, its stack and its data \
                 must be mapped",
            ),
            Hint::NoPageTables => f.write_str(
                "satp is 0, so this virtual address is used as a physical one: set satp before \
                 the jump, or jump to the physical address",
            ),
            Hint::StackOutsideRam => {
                f.write_str("sp is outside RAM: the stack grew too far, or sp was never set")
            }
            Hint::MachineCsr(number) => write!(
                f,
                "CSR {number:#x} belongs to machine mode or the hypervisor: a kernel that KVM runs \
                 is in supervisor mode",
            ),
            Hint::AtomicOnDevice => f.write_str(
                "atomic and vector instructions work on RAM only: use plain loads and stores for \
                 a device's registers",
            ),
        }
    }
}

/// Returns the likely mistake, if the hart's state shows one.
pub fn hint(hart: &Hart, ram: &GuestMemory) -> Option<Hint> {
    let has_trapped = hart.scause != 0 || hart.sepc != 0;
    let vector = hart.vector();
    let vector_is_code = hart.instruction(ram, vector).is_some();
    let in_handler = hart.pc.wrapping_sub(vector) < HANDLER || hart.sepc.wrapping_sub(vector) < 4;
    if let Some(hint) = instruction_hint(hart, ram) {
        return Some(hint);
    }
    let is_in_code = hart.instruction(ram, hart.pc).is_some();
    if stack_is_outside(hart, ram) && (has_trapped || !is_in_code) {
        return Some(Hint::StackOutsideRam);
    }
    if hart.satp >> 60 == 0 && hart.cause().is_fetch() && has_trapped {
        let is_virtual = hart.stval > ram.last_addr().raw_value();
        if is_virtual {
            return Some(Hint::NoPageTables);
        }
    }
    if !vector_is_code && (has_trapped || !is_in_code) {
        return Some(Hint::NoTrapVector);
    }
    (has_trapped && in_handler && hart.sepc.wrapping_sub(vector) < HANDLER)
        .then_some(Hint::HandlerTraps)
}

/// Bytes of a trap handler's entry code: a trap there is one in the handler.
const HANDLER: u64 = 256;

/// A mistake that the instruction at `pc` shows, or the one that trapped last.
fn instruction_hint(hart: &Hart, ram: &GuestMemory) -> Option<Hint> {
    // Where KVM gives up, there is no trap: the instruction is at `pc`.
    let here = hart.instruction(ram, hart.pc);
    if here.is_some_and(|(instruction, _)| is_for_ram_only(instruction)) {
        let (instruction, _) = here?;
        let base = usize::try_from((instruction >> 15) & 0x1f).ok()?;
        let to = hart.physical(ram, *hart.x.get(base)?);
        if to.is_some_and(|to| !is_ram(ram, to)) {
            return Some(Hint::AtomicOnDevice);
        }
    }
    let cause = hart.cause();
    let (instruction, _) = hart.instruction(ram, hart.sepc)?;
    match cause {
        Cause::ILLEGAL_INSTRUCTION => higher_csr(instruction).map(Hint::MachineCsr),
        Cause::LOAD_ACCESS | Cause::STORE_ACCESS => {
            let outside = !is_ram(ram, hart.physical(ram, hart.stval)?);
            (outside && is_for_ram_only(instruction)).then_some(Hint::AtomicOnDevice)
        }
        _ => None,
    }
}

/// The CSR that `instruction` accesses, if it is one of a mode above supervisor mode.
fn higher_csr(instruction: u32) -> Option<u16> {
    const SYSTEM: u32 = 0x73;
    let function = (instruction >> 12) & 0b111;
    if instruction & 0x7f != SYSTEM || function & 0b11 == 0 {
        return None;
    }
    let number = u16::try_from(instruction >> 20).ok()?;
    // Bits 9 and 8 are the lowest mode that may access it: 2 is the hypervisor, 3 is machine mode.
    ((number >> 8) & 0b11 >= 2).then_some(number)
}

/// Whether `instruction` is an atomic one, or a vector load or store.
fn is_for_ram_only(instruction: u32) -> bool {
    const AMO: u32 = 0x2f;
    const LOAD_FP: u32 = 0x07;
    const STORE_FP: u32 = 0x27;
    let is_vector = matches!((instruction >> 12) & 0b111, 0 | 5 | 6 | 7);
    match instruction & 0x7f {
        AMO => true,
        LOAD_FP | STORE_FP => is_vector,
        _ => false,
    }
}

fn stack_is_outside(hart: &Hart, ram: &GuestMemory) -> bool {
    let sp = hart.x[SP];
    // The word below sp is the next one that is used.
    let below = hart.physical(ram, sp.wrapping_sub(8) & !0b111);
    !below.is_some_and(|physical| is_ram(ram, physical))
}

fn is_ram(ram: &GuestMemory, physical: u64) -> bool {
    ram.address_in_range(GuestAddress(physical))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemConfig;
    use crate::memory::{self, Backing};
    use crate::util::ByteSize;
    use std::sync::Arc;
    use vm_memory::Bytes;

    const RAM: u64 = 0x8000_0000;
    const HANDLER_AT: u64 = RAM + 0x1000;
    const HERE: u64 = RAM + 0x200;
    const UART: u64 = 0x1000_0000;
    const NOP: u32 = 0x0000_0013;

    fn ram(instruction: u32) -> Arc<GuestMemory> {
        let config = MemConfig::new(ByteSize::mib(1));
        let ram = memory::create(GuestAddress(RAM), config, Backing::Private).unwrap();
        ram.write_obj(instruction.to_le(), GuestAddress(HERE))
            .unwrap();
        ram
    }

    /// A hart in its handler, after a trap at `HERE`. All is well but what a test changes.
    fn hart(cause: Cause, stval: u64) -> Hart {
        let mut hart = Hart {
            pc: HANDLER_AT + 0x40,
            stvec: HANDLER_AT,
            sepc: HERE,
            scause: cause.0,
            stval,
            ..Hart::default()
        };
        hart.x[SP] = RAM + 0x8000;
        hart
    }

    #[test]
    fn a_trap_without_a_mistake_has_no_hint() {
        let new = Hart {
            pc: HERE,
            ..Hart::default()
        };
        assert_eq!(hint(&new, &ram(NOP)), None, "before the first trap");
        assert_eq!(hint(&hart(Cause(8), 0), &ram(NOP)), None);
        assert_eq!(hint(&hart(Cause::LOAD_PAGE, 0x1234), &ram(NOP)), None);
    }

    #[test]
    fn each_mistake_has_its_hint() {
        let no_vector = Hart {
            stvec: 0,
            pc: 0,
            ..hart(Cause::INSTRUCTION_ACCESS, 0x1234)
        };
        let never_trapped = Hart {
            pc: 0x1234,
            x: no_vector.x,
            ..Hart::default()
        };
        assert_eq!(hint(&never_trapped, &ram(NOP)), Some(Hint::NoTrapVector));
        assert_eq!(hint(&no_vector, &ram(NOP)), Some(Hint::NoTrapVector));
        let high = hart(Cause::INSTRUCTION_ACCESS, 0xffff_ffff_8000_0000);
        assert_eq!(hint(&high, &ram(NOP)), Some(Hint::NoPageTables));
        let mut stack = hart(Cause::STORE_ACCESS, RAM - 8);
        stack.x[SP] = RAM;
        assert_eq!(hint(&stack, &ram(NOP)), Some(Hint::StackOutsideRam));
        let again = Hart {
            sepc: HANDLER_AT + 8,
            ..hart(Cause::STORE_PAGE, 0)
        };
        assert_eq!(hint(&again, &ram(NOP)), Some(Hint::HandlerTraps));
    }

    #[test]
    fn the_instruction_that_trapped_is_looked_at() {
        // csrr a0, mstatus; csrr a0, hgatp; csrr a0, sstatus.
        for (instruction, expected) in [
            (0x3000_2573, Some(Hint::MachineCsr(0x300))),
            (0x6800_2573, Some(Hint::MachineCsr(0x680))),
            (0x1000_2573, None),
        ] {
            let trapped = hart(Cause::ILLEGAL_INSTRUCTION, u64::from(instruction));
            assert_eq!(
                hint(&trapped, &ram(instruction)),
                expected,
                "{instruction:#x}"
            );
        }
        // amoadd.w, vle8.v; lw, fld.
        for (instruction, is_wrong) in [
            (0x00b5_252f, true),
            (0x0205_0007, true),
            (0x0005_2503, false),
            (0x0005_3507, false),
        ] {
            let trapped = hart(Cause::LOAD_ACCESS, UART);
            let expected = is_wrong.then_some(Hint::AtomicOnDevice);
            assert_eq!(
                hint(&trapped, &ram(instruction)),
                expected,
                "{instruction:#x}"
            );
            let trapped = hart(Cause::LOAD_ACCESS, RAM);
            assert_eq!(hint(&trapped, &ram(instruction)), None, "in RAM");
            // Not trapped: KVM gave up.
            let mut here = Hart {
                pc: HERE,
                ..Hart::default()
            };
            here.x[10] = UART;
            assert_eq!(hint(&here, &ram(instruction)), expected, "{instruction:#x}");
        }
    }
}
