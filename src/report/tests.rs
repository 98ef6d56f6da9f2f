//! Reports on harts whose registers and RAM are made here.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::config::MemConfig;
use crate::memory::{self, Backing};
use crate::util::ByteSize;
use crate::vcpu::hart::{FP, RA, SP};

const RAM: u64 = 0x8000_0000;
const EBREAK: u16 = 0x9002;

fn ram() -> Arc<GuestMemory> {
    let config = MemConfig::new(ByteSize::mib(1));
    let ram = memory::create(GuestAddress(RAM), config, Backing::Private).unwrap();
    ram.write_obj(EBREAK.to_le(), GuestAddress(RAM + 0x200))
        .unwrap();
    ram
}

fn place(physical: u64) -> String {
    match physical {
        0x1000_0000..0x1000_0100 => "UART".into(),
        RAM..0x8010_0000 => "RAM".into(),
        _ => "nothing".into(),
    }
}

fn text(hart: &Hart, ram: &GuestMemory, symbols: Option<&Symbols>) -> String {
    let place = &place;
    Report {
        hart,
        ram,
        symbols,
        place,
    }
    .to_string()
}

fn has_lines(text: &str, lines: &[&str]) {
    for line in lines {
        assert!(
            text.lines().any(|there| there == *line),
            "{line:?} in:\n{text}"
        );
    }
}

#[test]
fn a_fault_is_explained_with_names() {
    let map = "80000200 T main\n80000300 T start\n";
    let symbols = Symbols::read(std::io::Cursor::new(map)).unwrap();
    let mut hart = Hart {
        number: 2,
        pc: RAM + 0x200,
        is_supervisor: true,
        stvec: RAM + 0x1000,
        sepc: RAM + 0x204,
        scause: 5,
        stval: 0x1000_0004,
        ..Hart::default()
    };
    (hart.x[SP], hart.x[FP], hart.x[RA]) = (RAM + 0x8000, 0, RAM + 0x308);
    let text = text(&hart, &ram(), Some(&symbols));
    has_lines(
        &text,
        &[
            "hart 2: at 0x80000200 (main), in supervisor mode",
            "  pc leads to RAM",
            "  instruction: 9002  ebreak",
            "  last trap: load access fault, at 0x80000204 (main+0x4)",
            "    the address 0x10000004 leads to UART",
            "    0x80000308 (start+0x8)",
        ],
    );
    assert!(text.contains("     sp 0000000080008000"), "{text}");
    assert!(!text.contains("page tables"), "{text}");
}

#[test]
fn page_tables_are_shown_level_by_level() {
    let ram = ram();
    // Sv39: one table of level 2 with a leaf for the page of RAM, and one entry to nowhere.
    let root = RAM + 0x1000;
    let leaf = (RAM >> 2) | 0xcf;
    ram.write_obj(leaf.to_le(), GuestAddress(root)).unwrap();
    ram.write_obj(1u64.to_le(), GuestAddress(root + 8)).unwrap();
    let hart = Hart {
        pc: 0x200,
        satp: (8 << 60) | (root >> 12),
        stvec: 0x1000,
        scause: 13,
        sepc: 0x200,
        stval: 0x4000_0000,
        ..Hart::default()
    };
    has_lines(
        &text(&hart, &ram, None),
        &[
            "hart 0: at 0x200, in user mode",
            "  pc leads to 0x80000200, RAM",
            "    the address 0x40000000 leads to nothing: it is not mapped",
            "  page tables (Sv39) of pc, 0x200:",
            "    level 2: 00000000200000cf at 0x80001000, DA--XWRV",
            "    leads to 0x80000200",
            "  page tables (Sv39) of stval, 0x40000000:",
            "    level 2: 0000000000000001 at 0x80001008, -------V",
            "    level 1: the table is outside RAM, at 0x0",
            "    leads nowhere",
        ],
    );
}

#[test]
fn a_hart_that_is_nowhere_has_a_report_too() {
    let hart = Hart {
        pc: u64::MAX,
        satp: u64::MAX,
        ..Hart::default()
    };
    let text = text(&hart, &ram(), None);
    has_lines(
        &text,
        &[
            "  pc leads to nothing: it is not mapped",
            "  instruction: none can be read there",
            "  no trap so far",
        ],
    );
    assert!(!text.contains("of stval"), "{text}");
}
