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
use crate::vcpu::hart::{A7, Hart};
use crate::vcpu::trap::BASE;

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

/// How to make a hart execute the instruction at its `pc`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// It need not run: the hart is at this address afterwards. For `wfi`, which would wait for an
    /// interrupt, and for a jump to itself.
    At(u64),
    /// It is an `ebreak` of the guest's own: the hart takes a breakpoint exception.
    Trap,
    /// Run it, with breakpoints at all `places`. If `masks`, it does not depend on `sie`, so all
    /// interrupts may be off there while it runs.
    Run {
        /// Where the hart can be afterwards.
        places: Vec<Place>,
        /// Whether interrupts may be off.
        masks: bool,
    },
}

/// Plans a step of `hart`.
pub fn plan(hart: &Hart, ram: &GuestMemory) -> Plan {
    const WFI: u32 = 0x1050_0073;
    const ECALL: u32 = 0x73;
    /// CSRs whose effect depends on the enabled interrupts: `sie` and `stopi`.
    const INTERRUPTS: [u32; 2] = [0x104, 0xdb0];
    /// SBI extensions with calls that wait for an interrupt: HSM and SUSP.
    const WAITING: [u64; 2] = [0x48534d, 0x5355_5350];
    let instruction = hart.instruction(ram, hart.pc);
    if instruction.is_none() && hart.vector() == hart.pc {
        // The handler itself cannot be fetched, so the hart traps where it is.
        return Plan::At(hart.pc);
    }
    if let Some((instruction, length)) = instruction {
        match decode(instruction, length) {
            flow @ (Flow::Jump(_) | Flow::Branch(..) | Flow::Register(..)) => {
                if follow(flow, hart, hart.pc, length) == hart.pc {
                    return Plan::At(hart.pc);
                }
            }
            // In user mode it may be illegal.
            _ if instruction == WFI && hart.is_supervisor => {
                return Plan::At(hart.pc.wrapping_add(4));
            }
            _ if is_ebreak(instruction) => return Plan::Trap,
            _ => {}
        }
    }
    let mut places = places(hart, ram);
    // A breakpoint at pc would replace the instruction itself. This can be the first instruction of
    // the trap handler.
    places.retain(|place| place.address != hart.pc);
    let needs_interrupts = instruction.is_some_and(|(instruction, _)| {
        let waits = instruction == ECALL && hart.is_supervisor && WAITING.contains(&hart.x[A7]);
        waits || csr(instruction).is_some_and(|csr| INTERRUPTS.contains(&csr))
    });
    let masks = !needs_interrupts;
    Plan::Run { places, masks }
}

/// Whether `instruction` is `ebreak` or `c.ebreak`.
pub fn is_ebreak(instruction: u32) -> bool {
    matches!(instruction, 0x0010_0073 | 0x9002)
}

/// The number of the CSR that `instruction` accesses.
fn csr(instruction: u32) -> Option<u32> {
    const SYSTEM: u32 = 0x73;
    /// `ecall`, `sret` and others are not about CSRs.
    const PRIVILEGED: u32 = 0b000;
    let is_csr = instruction & 0x7f == SYSTEM && (instruction >> 12) & 0b111 != PRIVILEGED;
    is_csr.then_some(instruction >> 20)
}

/// Returns the places where `hart` can be after the instruction at its `pc`. Each is there once.
/// If there is no instruction that can be read, the hart will be in its trap handler.
fn places(hart: &Hart, ram: &GuestMemory) -> Vec<Place> {
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
            let target = follow(flow, hart, hart.pc, length);
            if let Some(satp) = new_satp(hart, instruction) {
                // The old page tables stay if the hart does not have the mode.
                places.add(target);
                places.satp = satp;
                // The fetch of the next instruction may fault.
                vectors(hart.stvec)
                    .into_iter()
                    .for_each(|vector| places.add(vector));
            }
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
    let base = stvec & BASE;
    let mut all = vec![base];
    if stvec & !BASE == VECTORED {
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
    const SATP: u32 = 0x180;
    csr(instruction).filter(|csr| *csr == SATP)?;
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
mod tests;
