//! Who called whom, by frame pointers.
//!
//! A function that keeps a frame pointer has its caller's return address 8 bytes below the address
//! in `s0`, and its caller's `s0` 16 bytes below (RISC-V ELF psABI, section "Frame Pointer
//! Convention"). Linux keeps frame pointers. A kernel without them gets a short or wrong trace.
//!
//! In a trap handler, the trace goes on with what the trap interrupted, if the kernel saves the
//! registers as Linux does: `struct pt_regs` of arch/riscv/include/asm/ptrace.h, right above the
//! frame of the function that the trap vector calls.

use crate::memory::GuestMemory;
use crate::vcpu::hart::{FP, Hart, RA, SP};

/// The most addresses of a trace.
const LENGTH: usize = 64;
/// A frame of more bytes than this is no frame.
const FRAME_MAX: u64 = 1 << 20;
/// The most changes of the stack in a trace. Linux handles interrupts on a stack of their own.
const SWITCHES: usize = 2;

/// An address of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The hart is here, or was when a trap interrupted it.
    At(u64),
    /// A call returns to here. The call is the instruction before, which may be the last one of its
    /// function.
    Return(u64),
}

impl Place {
    /// An address in the function that the hart is in.
    pub fn inside(self) -> u64 {
        match self {
            Place::At(address) => address,
            Place::Return(address) => address.wrapping_sub(1),
        }
    }
}

/// The places from `pc` outward: first `pc` itself, then the return address of each caller.
pub fn backtrace(hart: &Hart, ram: &GuestMemory) -> Vec<Place> {
    let mut walk = Walk {
        hart,
        ram,
        trace: Vec::new(),
        switches: 0,
    };
    let now = Registers {
        pc: hart.pc,
        ra: hart.x[RA],
        sp: hart.x[SP],
        fp: hart.x[FP],
    };
    if let Some(interrupted) = walk.follow(now) {
        walk.follow(interrupted);
    }
    walk.trace.truncate(LENGTH);
    walk.trace
}

/// The registers of a hart that a trace follows.
struct Registers {
    pc: u64,
    ra: u64,
    sp: u64,
    fp: u64,
}

struct Walk<'a> {
    hart: &'a Hart,
    ram: &'a GuestMemory,
    trace: Vec<Place>,
    switches: usize,
}

impl Walk<'_> {
    /// Adds `pc` and its callers. Returns the registers that the last trap saved, if the
    /// trace comes to them.
    fn follow(&mut self, Registers { pc, ra, sp, fp }: Registers) -> Option<Registers> {
        self.trace.push(Place::At(pc));
        let first = self.trace.len();
        let (mut frame, mut stack) = (fp, sp);
        while self.trace.len() < LENGTH {
            let Some((back, next)) = self.frame(frame, stack) else {
                break;
            };
            // The innermost function may not have saved `ra` yet. Then the frame is its caller's,
            // and `ra` is missing in the trace. `ra` is `pc` where a call has just returned.
            let is_missing = ra != back && ra != pc && self.is_behind_call(ra);
            if self.trace.len() == first && is_missing {
                self.trace.push(Place::Return(ra));
            }
            if back == 0 {
                break;
            }
            self.trace.push(Place::Return(back));
            if let Some(interrupted) = self.interrupted(frame) {
                return Some(interrupted);
            }
            (stack, frame) = (frame, next);
        }
        if self.trace.len() == first && ra != 0 {
            self.trace.push(Place::Return(ra));
        }
        None
    }

    /// The return address and the caller's frame of the frame at `frame`. `stack` is the end of the
    /// frame before it.
    fn frame(&mut self, frame: u64, stack: u64) -> Option<(u64, u64)> {
        if frame % 8 != 0 {
            return None;
        }
        let back = self.word(frame.wrapping_sub(8))?;
        let next = self.word(frame.wrapping_sub(16))?;
        let is_above = frame > stack && frame - stack <= FRAME_MAX;
        if !is_above {
            if self.switches == SWITCHES || !self.is_behind_call(back) {
                return None;
            }
            self.switches += 1;
        }
        Some((back, next))
    }

    /// The registers that the last trap saved right above the frame at `frame`, if it did.
    fn interrupted(&self, frame: u64) -> Option<Registers> {
        /// Where `struct pt_regs` has them, in bytes.
        const EPC: u64 = 0;
        const RA: u64 = 8;
        const SP: u64 = 16;
        const FP: u64 = 64;
        const BADADDR: u64 = 264;
        const CAUSE: u64 = 272;
        let saved = |offset| self.word(frame.wrapping_add(offset));
        let hart = self.hart;
        let is_last = hart.has_trapped()
            && saved(EPC)? == hart.sepc
            && saved(BADADDR)? == hart.stval
            && saved(CAUSE)? == hart.scause;
        if !is_last {
            return None;
        }
        Some(Registers {
            pc: hart.sepc,
            ra: saved(RA)?,
            sp: saved(SP)?,
            fp: saved(FP)?,
        })
    }

    /// Whether `address` is behind a call: an instruction that puts it into `ra`.
    fn is_behind_call(&self, address: u64) -> bool {
        /// Opcodes of `jal` and `jalr`, and their register `ra`.
        const JAL: u32 = 0x6f;
        const JALR: u32 = 0x67;
        /// `c.jalr`: its fixed bits, and their mask. The register is not x0.
        const SHORT: (u32, u32) = (0x9002, 0xf07f);
        const SHORT_REGISTER: u32 = 0xf80;
        let before = |bytes| self.hart.instruction(self.ram, address.wrapping_sub(bytes));
        let is_long = before(4).is_some_and(|(call, length)| {
            let (opcode, to) = (call & 0x7f, (call >> 7) & 0x1f);
            length == 4 && [JAL, JALR].contains(&opcode) && to == 1
        });
        let is_short = before(2).is_some_and(|(call, length)| {
            length == 2 && call & SHORT.1 == SHORT.0 && call & SHORT_REGISTER != 0
        });
        is_long || is_short
    }

    fn word(&self, address: u64) -> Option<u64> {
        self.hart.word(self.ram, address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemConfig;
    use crate::memory::{self, Backing};
    use crate::util::ByteSize;
    use std::sync::Arc;
    use vm_memory::{Bytes, GuestAddress};

    const RAM: u64 = 0x8000_0000;

    fn ram(words: &[(u64, u64)]) -> Arc<GuestMemory> {
        let config = MemConfig::new(ByteSize::mib(1));
        let ram = memory::create(GuestAddress(RAM), config, Backing::Private).unwrap();
        for (at, word) in words {
            ram.write_obj(word.to_le(), GuestAddress(*at)).unwrap();
        }
        ram
    }

    fn hart(sp: u64, fp: u64, ra: u64) -> Hart {
        let mut hart = Hart {
            pc: RAM + 0x100,
            ..Hart::default()
        };
        (hart.x[SP], hart.x[FP], hart.x[RA]) = (sp, fp, ra);
        hart
    }

    /// The addresses of a trace, all but the first of callers.
    fn callers(hart: &Hart, ram: &GuestMemory) -> Vec<u64> {
        let trace = backtrace(hart, ram);
        let address = |(index, place): (usize, &Place)| match *place {
            Place::At(address) if index == 0 => address,
            Place::Return(address) if index > 0 => address,
            place => panic!("{place:?} at {index}"),
        };
        trace.iter().enumerate().map(address).collect()
    }

    #[test]
    fn each_frame_leads_to_its_caller() {
        let (first, second) = (RAM + 0x8020, RAM + 0x8060);
        let ram = ram(&[
            (first - 8, RAM + 0x200),
            (first - 16, second),
            (second - 8, RAM + 0x300),
            (second - 16, 0),
        ]);
        let trace = callers(&hart(RAM + 0x8000, first, RAM + 0x200), &ram);
        assert_eq!(trace, [RAM + 0x100, RAM + 0x200, RAM + 0x300]);
    }

    #[test]
    fn a_broken_chain_ends_the_trace() {
        let fp = RAM + 0x8020;
        // To itself, backward, far away, odd, outside RAM.
        for next in [fp, fp - 16, fp + FRAME_MAX + 8, fp + 12, u64::MAX - 7] {
            let ram = ram(&[(fp - 8, RAM + 0x200), (fp - 16, next)]);
            let trace = callers(&hart(RAM + 0x8000, fp, RAM + 0x200), &ram);
            assert_eq!(trace, [RAM + 0x100, RAM + 0x200], "{next:#x}");
        }
    }

    #[test]
    fn without_frames_there_is_ra() {
        let trace = callers(&hart(0, 0, RAM + 0x500), &ram(&[]));
        assert_eq!(trace, [RAM + 0x100, RAM + 0x500]);
        assert_eq!(callers(&hart(0, 8, 0), &ram(&[])), [RAM + 0x100]);
    }

    /// A function that has not saved `ra`: it is the caller's frame that `s0` points to.
    #[test]
    fn a_leaf_has_its_caller_in_ra() {
        const CALL: u64 = 0x1000_00ef;
        let (fp, back) = (RAM + 0x8020, RAM + 0x204);
        let ram = ram(&[(fp - 8, RAM + 0x300), (fp - 16, 0), (RAM + 0x200, CALL)]);
        let trace = callers(&hart(RAM + 0x8000, fp, back), &ram);
        assert_eq!(trace, [RAM + 0x100, back, RAM + 0x300]);
    }

    /// An interrupt handler on a stack of its own.
    #[test]
    fn a_trap_leads_to_what_it_interrupted() {
        const CALL: u64 = 0x1000_00ef;
        const SHORT_CALL: u64 = 0x9582 << 48;
        const TIMER: u64 = (1 << 63) | 5;
        let (irq, switch, trap, below) = (RAM + 0x8020, RAM + 0x4020, RAM + 0x4100, RAM + 0x4400);
        let (handler, vector, leaf) = (RAM + 0x600, RAM + 0x700, RAM + 0x800);
        let words = [
            (RAM + 0x300 - 8, SHORT_CALL),
            (irq - 8, handler),
            (irq - 16, switch),
            (switch - 8, RAM + 0x300),
            (switch - 16, trap),
            // Linux' vector leaves `sepc` in a register, which the function it calls saves.
            (switch, RAM + 0x400),
            (trap - 8, vector),
            // The vector does not keep the frame pointer.
            (trap - 16, below - 0x20),
            // What was interrupted, with its `ra`, `sp` and `s0`.
            (trap, RAM + 0x400),
            (trap + 8, leaf),
            (leaf - 4, CALL),
            (trap + 16, below - 0x20),
            (trap + 64, below),
            (trap + 264, 0),
            (trap + 272, TIMER),
            (below - 8, RAM + 0x500),
            (below - 16, 0),
        ];
        let ram = ram(&words);
        let mut hart = hart(RAM + 0x8000, irq, handler);
        (hart.sepc, hart.scause) = (RAM + 0x400, TIMER);
        let trace = backtrace(&hart, &ram);
        let (at, back) = (Place::At, Place::Return);
        let expected = [
            at(RAM + 0x100),
            back(handler),
            back(RAM + 0x300),
            back(vector),
            at(RAM + 0x400),
            back(leaf),
            back(RAM + 0x500),
        ];
        assert_eq!(trace, expected);
    }

    #[test]
    fn frames_in_a_circle_end() {
        const CALL: u64 = 0x1000_00ef;
        let fp = RAM + 0x8020;
        let ram = ram(&[(fp - 8, RAM + 0x204), (fp - 16, fp), (RAM + 0x200, CALL)]);
        let trace = backtrace(&hart(RAM + 0x8000, fp, RAM + 0x204), &ram);
        assert_eq!(trace.len(), 2 + SWITCHES);
    }
}
