//! Where a hart can be after its next instruction.
//!
//! KVM on RISC-V has no single step. So a debugger plants a breakpoint at each place that the next
//! instruction can lead to, and lets the hart run to one of them. These places are:
//!
//! - the next instruction, or the target of a jump or branch, whose registers are known;
//! - the trap handler, because an instruction may fault and an interrupt may come;
//! - for `sret`, the address in `sepc`;
//! - for a sequence of LR and SC, its end and each way out of it: a trap inside the sequence would
//!   make each SC fail, and the hart would never leave it.

use crate::memory::GuestMemory;
use crate::vcpu::hart::Hart;

/// The longest sequence of LR and SC, in instructions (RISC-V A extension, "Eventual Success of
/// Store-Conditional Instructions").
const SEQUENCE: usize = 16;

/// A place where the hart may be next. Its breakpoint is at `address`, which the page tables of
/// `satp` translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The virtual address.
    pub address: u64,
    /// The value of `satp` there.
    pub satp: u64,
}

/// Returns the places where `hart` can be after the instruction at its `pc`. Each is there once.
/// Empty if there is no instruction that can be read: the hart will be in its trap handler.
pub fn places(hart: &Hart, ram: &GuestMemory) -> Vec<Place> {
    let mut places = Places::new(hart);
    for vector in vectors(hart.stvec) {
        places.add(vector);
    }
    let Some((instruction, length)) = hart.instruction(ram, hart.pc) else {
        return places.found;
    };
    match decode(instruction, length) {
        Flow::Next if is_lr(instruction) => sequence(&mut places, hart, ram),
        flow => {
            if let Some(satp) = new_satp(hart, instruction) {
                places.satp = satp;
            }
            let target = follow(flow, hart, hart.pc, length);
            places.add(target);
        }
    }
    places.found
}

struct Places {
    satp: u64,
    found: Vec<Place>,
}

impl Places {
    fn new(hart: &Hart) -> Self {
        let satp = hart.satp;
        let found = Vec::new();
        Self { satp, found }
    }

    fn add(&mut self, address: u64) {
        let satp = self.satp;
        let place = Place { address, satp };
        if !self.found.contains(&place) {
            self.found.push(place);
        }
    }
}

/// The addresses at which trap handlers begin.
fn vectors(stvec: u64) -> Vec<u64> {
    /// The mode in which interrupts have handlers of their own, by cause.
    const VECTORED: u64 = 1;
    /// Supervisor software, timer, external and counter interrupts.
    const INTERRUPTS: [u64; 4] = [1, 5, 9, 13];
    let base = stvec & !0b11;
    let mut all = vec![base];
    if stvec & 0b11 == VECTORED {
        all.extend(INTERRUPTS.map(|cause| base.wrapping_add(4 * cause)));
    }
    all
}

/// What an instruction does to `pc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    /// The next instruction follows.
    Next,
    /// Jumps this far.
    Jump(i64),
    /// Jumps to a register plus an offset.
    Register(usize, i64),
    /// Jumps this far if the condition on two registers is true.
    Branch(Condition, usize, usize, i64),
    /// Returns from a trap.
    Sret,
}

/// The condition of a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Equal,
    NotEqual,
    Less,
    NotLess,
    Below,
    NotBelow,
}

fn signed(value: u64) -> i64 {
    i64::from_ne_bytes(value.to_ne_bytes())
}

impl Condition {
    fn is_true(self, a: u64, b: u64) -> bool {
        match self {
            Condition::Equal => a == b,
            Condition::NotEqual => a != b,
            Condition::Less => signed(a) < signed(b),
            Condition::NotLess => signed(a) >= signed(b),
            Condition::Below => a < b,
            Condition::NotBelow => a >= b,
        }
    }
}

/// The address of the instruction after the one at `pc`.
fn follow(flow: Flow, hart: &Hart, pc: u64, length: usize) -> u64 {
    let next = pc.wrapping_add(length as u64);
    match flow {
        Flow::Next => next,
        Flow::Jump(offset) => pc.wrapping_add_signed(offset),
        Flow::Register(base, offset) => hart.x[base].wrapping_add_signed(offset) & !1,
        Flow::Branch(condition, a, b, offset) => match condition.is_true(hart.x[a], hart.x[b]) {
            true => pc.wrapping_add_signed(offset),
            false => next,
        },
        Flow::Sret => hart.sepc,
    }
}

/// Adds the ways out of a sequence that begins with the LR at `pc`: the instruction behind the SC,
/// and the targets of branches that leave the sequence.
fn sequence(places: &mut Places, hart: &Hart, ram: &GuestMemory) {
    let mut at = hart.pc;
    let mut targets = Vec::new();
    for _ in 0..SEQUENCE {
        let Some((instruction, length)) = hart.instruction(ram, at) else {
            break;
        };
        let flow = decode(instruction, length);
        match flow {
            Flow::Branch(_, _, _, offset) | Flow::Jump(offset) => {
                targets.push(at.wrapping_add_signed(offset));
            }
            Flow::Next => {}
            Flow::Register(..) | Flow::Sret => break,
        }
        at = at.wrapping_add(length as u64);
        if is_sc(instruction) {
            break;
        }
        if matches!(flow, Flow::Jump(_)) {
            break;
        }
    }
    places.add(at);
    let outside = targets
        .into_iter()
        .filter(|target| !(hart.pc..at).contains(target));
    outside.for_each(|target| places.add(target));
}

/// The value that `instruction` writes to `satp`, if it does.
fn new_satp(hart: &Hart, instruction: u32) -> Option<u64> {
    const SYSTEM: u32 = 0x73;
    const SATP: u32 = 0x180;
    if instruction & 0x7f != SYSTEM || instruction >> 20 != SATP {
        return None;
    }
    let field = register(instruction, 15);
    let immediate = field as u64;
    match (instruction >> 12) & 0b111 {
        0b001 => Some(hart.x[field]),
        0b010 => Some(hart.satp | hart.x[field]),
        0b011 => Some(hart.satp & !hart.x[field]),
        0b101 => Some(immediate),
        0b110 => Some(hart.satp | immediate),
        0b111 => Some(hart.satp & !immediate),
        _ => None,
    }
}

fn is_lr(instruction: u32) -> bool {
    instruction & 0x7f == 0x2f && instruction >> 27 == 0b00010
}

fn is_sc(instruction: u32) -> bool {
    instruction & 0x7f == 0x2f && instruction >> 27 == 0b00011
}

fn decode(instruction: u32, length: usize) -> Flow {
    match length {
        2 => decode_short(instruction),
        _ => decode_long(instruction),
    }
}

fn decode_long(instruction: u32) -> Flow {
    const JAL: u32 = 0x6f;
    const JALR: u32 = 0x67;
    const BRANCH: u32 = 0x63;
    const SRET: u32 = 0x1020_0073;
    match instruction & 0x7f {
        _ if instruction == SRET => Flow::Sret,
        JAL => Flow::Jump(scattered(
            instruction,
            &[(31, 20, 1), (12, 12, 8), (20, 11, 1), (21, 1, 10)],
        )),
        JALR => Flow::Register(
            register(instruction, 15),
            scattered(instruction, &[(31, 11, 1), (20, 0, 11)]),
        ),
        BRANCH => {
            let offset = scattered(
                instruction,
                &[(31, 12, 1), (7, 11, 1), (25, 5, 6), (8, 1, 4)],
            );
            let condition = match (instruction >> 12) & 0b111 {
                0b000 => Condition::Equal,
                0b001 => Condition::NotEqual,
                0b100 => Condition::Less,
                0b101 => Condition::NotLess,
                0b110 => Condition::Below,
                0b111 => Condition::NotBelow,
                _ => return Flow::Next,
            };
            let (a, b) = (register(instruction, 15), register(instruction, 20));
            Flow::Branch(condition, a, b, offset)
        }
        _ => Flow::Next,
    }
}

/// Instructions of two bytes (RISC-V C extension, "RVC Instruction Set Listings").
fn decode_short(instruction: u32) -> Flow {
    const QUADRANT_1: u32 = 0b01;
    const QUADRANT_2: u32 = 0b10;
    /// Registers in three bits are x8 to x15.
    fn short_register(instruction: u32) -> usize {
        8 + ((instruction as usize >> 7) & 0b111)
    }
    let branch = |condition| {
        let offset = scattered(
            instruction,
            &[(12, 8, 1), (5, 6, 2), (2, 5, 1), (10, 3, 2), (3, 1, 2)],
        );
        Flow::Branch(condition, short_register(instruction), 0, offset)
    };
    match (instruction & 0b11, (instruction >> 13) & 0b111) {
        (QUADRANT_1, 0b101) => Flow::Jump(scattered(
            instruction,
            &[
                (12, 11, 1),
                (8, 10, 1),
                (9, 8, 2),
                (6, 7, 1),
                (7, 6, 1),
                (2, 5, 1),
                (11, 4, 1),
                (3, 1, 3),
            ],
        )),
        (QUADRANT_1, 0b110) => branch(Condition::Equal),
        (QUADRANT_1, 0b111) => branch(Condition::NotEqual),
        // c.jr and c.jalr have no second register. c.ebreak is c.jalr of x0.
        (QUADRANT_2, 0b100) if (instruction >> 2) & 0x1f == 0 && register(instruction, 7) != 0 => {
            Flow::Register(register(instruction, 7), 0)
        }
        _ => Flow::Next,
    }
}

fn register(instruction: u32, at: u32) -> usize {
    ((instruction >> at) & 0x1f) as usize
}

/// Puts a signed number together from its parts: (lowest bit in the instruction, lowest bit in the
/// number, bits). The first part is the number's highest.
fn scattered(instruction: u32, parts: &[(u32, u32, u32)]) -> i64 {
    let mut value = 0i64;
    for (from, to, bits) in parts {
        let part = (instruction >> from) & ((1 << bits) - 1);
        value |= i64::from(part) << to;
    }
    let sign = parts.first().map_or(63, |(_, to, bits)| to + bits - 1);
    let unused = 63 - sign;
    value << unused >> unused
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
    const HERE: u64 = RAM + 0x1000;
    const VECTOR: u64 = RAM + 0x8000;

    fn ram(code: &[u32]) -> Arc<GuestMemory> {
        let config = MemConfig::new(ByteSize::mib(1));
        let ram = memory::create(GuestAddress(RAM), config, Backing::Private).unwrap();
        let bytes: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
        ram.write_slice(&bytes, GuestAddress(HERE)).unwrap();
        ram
    }

    fn hart() -> Hart {
        let mut hart = Hart {
            pc: HERE,
            stvec: VECTOR,
            sepc: RAM + 0x40,
            ..Hart::default()
        };
        for (number, register) in hart.x.iter_mut().enumerate() {
            *register = 0x100 * number as u64;
        }
        hart
    }

    /// The one place besides the trap handler, relative to `pc`.
    fn next(hart: &Hart, code: &[u32]) -> i64 {
        let places = places(hart, &ram(code));
        assert_eq!(places[0].address, VECTOR);
        assert_eq!(places.len(), 2, "{places:x?}");
        signed(places[1].address.wrapping_sub(hart.pc))
    }

    #[test]
    fn jumps_and_branches_of_four_bytes() {
        for (instruction, offset) in [
            (0x0000_0013, 4),          // nop
            (0x0100_006f, 16),         // j .+16
            (0xff1f_f0ef, -16),        // jal ra, .-16
            (0x8000_006f, -0x10_0000), // j .-1M
            (0x7fff_f06f, 0xf_fffe),   // j .+1M-2
            (0x00a5_0463, 8),          // beq a0, a0, .+8
            (0x00b5_0463, 4),          // beq a0, a1, .+8
            (0xfeb5_1ee3, -4),         // bne a0, a1, .-4
            (0x00b5_4463, 8),          // blt a0, a1, .+8
            (0x00b5_5463, 4),          // bge a0, a1, .+8
            (0x00b5_6463, 8),          // bltu a0, a1, .+8
            (0x00b5_7463, 4),          // bgeu a0, a1, .+8
            (0x8000_0063, -4096),      // beq x0, x0, .-4096
        ] {
            assert_eq!(next(&hart(), &[instruction]), offset, "{instruction:#x}");
        }
        // jalr ra, 5(a0); the lowest bit is dropped.
        let to = 0x0055_00e7;
        assert_eq!(next(&hart(), &[to]), 0xa04 - signed(HERE));
        // A signed and an unsigned comparison of -1 and 1.
        let mut hart = hart();
        (hart.x[10], hart.x[11]) = (u64::MAX, 1);
        assert_eq!(next(&hart, &[0x00b5_4463]), 8);
        assert_eq!(next(&hart, &[0x00b5_6463]), 4);
    }

    #[test]
    fn jumps_and_branches_of_two_bytes() {
        let mut hart = hart();
        hart.x[8] = 0;
        for (instruction, offset) in [
            (0x0001, 2),     // c.nop
            (0xa001, 0),     // c.j .
            (0xa809, 18),    // c.j .+18
            (0xbffd, -2),    // c.j .-2
            (0xb001, -2048), // c.j .-2048
            (0xc011, 4),     // c.beqz s0, .+4
            (0xe011, 2),     // c.bnez s0, .+4
        ] {
            assert_eq!(next(&hart, &[instruction]), offset, "{instruction:#x}");
        }
        // c.jr a0, c.jalr a0, c.mv a0, a1, c.ebreak.
        let to_a0 = 0xa00 - signed(HERE);
        assert_eq!(next(&hart, &[0x8502]), to_a0);
        assert_eq!(next(&hart, &[0x9502]), to_a0);
        assert_eq!(next(&hart, &[0x852e]), 2);
        assert_eq!(next(&hart, &[0x9002]), 2);
    }

    #[test]
    fn a_trap_and_the_way_back() {
        // sret
        assert_eq!(next(&hart(), &[0x1020_0073]), 0x40 - 0x1000);
        // Handlers by cause.
        let vectored = Hart {
            stvec: VECTOR | 1,
            ..hart()
        };
        let found = places(&vectored, &ram(&[0x13]));
        let addresses: Vec<u64> = found.iter().map(|place| place.address).collect();
        let interrupts = [4, 20, 36, 52].map(|offset| VECTOR + offset);
        assert_eq!(addresses[..5], [&[VECTOR][..], &interrupts].concat());
        // Nothing can be read at pc.
        let nowhere = Hart { pc: 0, ..hart() };
        assert_eq!(places(&nowhere, &ram(&[])).len(), 1);
    }

    #[test]
    fn a_sequence_of_lr_and_sc_is_one_step() {
        let code = [
            0x1005_27af, // lr.w a5, (a0)
            0x00b7_9863, // bne a5, a1, .+16: out
            0x18c5_272f, // sc.w a4, a2, (a0)
            0xfe07_1ae3, // bnez a4, .-12: not reached by a step
        ];
        let found = places(&hart(), &ram(&code));
        let offsets: Vec<u64> = found.iter().map(|place| place.address - HERE).collect();
        assert_eq!(offsets, [VECTOR - HERE, 12, 20]);
    }

    #[test]
    fn the_page_tables_of_the_next_instruction_count() {
        let found = places(&hart(), &ram(&[0x1805_1073])); // csrw satp, a0
        assert_eq!((found[0].satp, found[1].satp), (0, 0xa00));
        assert_eq!(found[1].address, HERE + 4);
    }
}
