//! Tests with instructions that GNU as has assembled.

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

/// What needs no run, and what must not be run with interrupts off.
#[test]
fn some_instructions_do_not_run() {
    let plan = |instruction| {
        let hart = Hart {
            is_supervisor: true,
            ..hart()
        };
        plan(&hart, &ram(&[instruction]))
    };
    assert_eq!(plan(0x1050_0073), Plan::At(HERE + 4), "wfi");
    assert_eq!(plan(0xa001), Plan::At(HERE), "c.j .");
    assert_eq!(plan(0x0000_006f), Plan::At(HERE), "j .");
    assert_eq!(plan(0x9002), Plan::Trap, "c.ebreak");
    assert_eq!(plan(0x0010_0073), Plan::Trap, "ebreak");
    let masks = |instruction| match plan(instruction) {
        Plan::Run { masks, .. } => masks,
        other => panic!("{other:?}"),
    };
    assert!(masks(0x0000_0013), "nop");
    assert!(masks(0x1001_2073), "csrs sstatus, sp");
    assert!(!masks(0x1045_1073), "csrw sie, a0");
    assert!(!masks(0x1040_2573), "csrr a0, sie");
    assert!(!masks(0xdb00_2573), "csrr a0, stopi");
    // An SBI call that waits for an interrupt, and another one.
    for (extension, expected) in [(0x48534d, false), (0x10, true)] {
        let mut hart = Hart {
            is_supervisor: true,
            ..hart()
        };
        hart.x[A7] = extension;
        let Plan::Run { masks, .. } = super::plan(&hart, &ram(&[0x73])) else {
            panic!("it runs");
        };
        assert_eq!(masks, expected, "{extension:x}");
    }
}

/// A breakpoint there would replace the instruction itself.
#[test]
fn the_first_instruction_of_the_trap_handler_can_step() {
    let hart = Hart {
        stvec: HERE,
        ..hart()
    };
    let Plan::Run { places, .. } = plan(&hart, &ram(&[0x13])) else {
        panic!("it runs");
    };
    let addresses: Vec<u64> = places.iter().map(|place| place.address).collect();
    assert_eq!(addresses, [HERE + 4]);
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
    let found: Vec<_> = found
        .iter()
        .map(|place| (place.address, place.satp))
        .collect();
    let both = [0, 0xa00].map(|satp| [(VECTOR, satp), (HERE + 4, satp)]);
    let mut expected = both.concat();
    expected.sort_unstable();
    let mut found = found;
    found.sort_unstable();
    assert_eq!(found, expected);
}
