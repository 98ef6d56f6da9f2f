//! Who called whom, by frame pointers.
//!
//! A function that keeps a frame pointer has its caller's return address 8 bytes below the address
//! in `s0`, and its caller's `s0` 16 bytes below (RISC-V ELF psABI, section "Frame Pointer
//! Convention"). Linux keeps frame pointers. A kernel without them gets a short or wrong trace.

use crate::memory::GuestMemory;
use crate::vcpu::hart::{FP, Hart, RA, SP};

/// The most frames of a trace.
const FRAMES: usize = 32;
/// A frame of more bytes than this is no frame.
const FRAME_MAX: u64 = 1 << 20;

/// The addresses from `pc` outward: first `pc` itself, then the return address of each caller.
pub fn backtrace(hart: &Hart, ram: &GuestMemory) -> Vec<u64> {
    let mut trace = vec![hart.pc];
    let (mut frame, mut stack) = (hart.x[FP], hart.x[SP]);
    while trace.len() < FRAMES {
        let is_frame = frame % 8 == 0 && frame > stack && frame - stack <= FRAME_MAX;
        if !is_frame {
            break;
        }
        let Some(back) = hart.word(ram, frame.wrapping_sub(8)) else {
            break;
        };
        let Some(next) = hart.word(ram, frame.wrapping_sub(16)) else {
            break;
        };
        // The innermost function may not have saved `ra` yet. Then the frame is its caller's, and
        // `ra` is missing in the trace.
        if trace.len() == 1 && back != hart.x[RA] && is_leaf(hart, ram) {
            trace.push(hart.x[RA]);
        }
        if back == 0 {
            break;
        }
        trace.push(back);
        (stack, frame) = (frame, next);
    }
    if trace.len() == 1 && hart.x[RA] != 0 {
        trace.push(hart.x[RA]);
    }
    trace
}

/// Whether `ra` is in code and still the return address of the function at `pc`: it points behind
/// a call.
fn is_leaf(hart: &Hart, ram: &GuestMemory) -> bool {
    /// Opcodes of `jal` and `jalr`, and their register `ra`.
    const JAL: u32 = 0x6f;
    const JALR: u32 = 0x67;
    let Some((call, 4)) = hart.instruction(ram, hart.x[RA].wrapping_sub(4)) else {
        return false;
    };
    let (opcode, to) = (call & 0x7f, (call >> 7) & 0x1f);
    [JAL, JALR].contains(&opcode) && to == 1
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

    #[test]
    fn each_frame_leads_to_its_caller() {
        let (first, second) = (RAM + 0x8020, RAM + 0x8060);
        let ram = ram(&[
            (first - 8, RAM + 0x200),
            (first - 16, second),
            (second - 8, RAM + 0x300),
            (second - 16, 0),
        ]);
        let trace = backtrace(&hart(RAM + 0x8000, first, RAM + 0x200), &ram);
        assert_eq!(trace, [RAM + 0x100, RAM + 0x200, RAM + 0x300]);
    }

    #[test]
    fn a_broken_chain_ends_the_trace() {
        let fp = RAM + 0x8020;
        // To itself, backward, far away, odd, outside RAM.
        for next in [fp, fp - 16, fp + FRAME_MAX + 8, fp + 12, u64::MAX - 7] {
            let ram = ram(&[(fp - 8, RAM + 0x200), (fp - 16, next)]);
            let trace = backtrace(&hart(RAM + 0x8000, fp, RAM + 0x200), &ram);
            assert_eq!(trace, [RAM + 0x100, RAM + 0x200], "{next:#x}");
        }
    }

    #[test]
    fn without_frames_there_is_ra() {
        let trace = backtrace(&hart(0, 0, RAM + 0x500), &ram(&[]));
        assert_eq!(trace, [RAM + 0x100, RAM + 0x500]);
        assert_eq!(backtrace(&hart(0, 8, 0), &ram(&[])), [RAM + 0x100]);
    }

    /// A function that has not saved `ra`: it is the caller's frame that `s0` points to.
    #[test]
    fn a_leaf_has_its_caller_in_ra() {
        const CALL: u64 = 0x1000_00ef;
        let (fp, back) = (RAM + 0x8020, RAM + 0x204);
        let ram = ram(&[(fp - 8, RAM + 0x300), (fp - 16, 0), (RAM + 0x200, CALL)]);
        let trace = backtrace(&hart(RAM + 0x8000, fp, back), &ram);
        assert_eq!(trace, [RAM + 0x100, back, RAM + 0x300]);
    }
}
