//! Walks a guest's page tables as its harts do: Sv39, Sv48 and Sv57 (RISC-V Privileged
//! Architecture, chapter "Supervisor-Level ISA").

use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMemory;

/// Values of `satp.MODE`: no page tables, or 3, 4 or 5 levels.
const BARE: u64 = 0;
const SV39: u64 = 8;
const SV48: u64 = 9;
const SV57: u64 = 10;

const PAGE_BITS: u32 = 12;
/// Address bits that index the table of one level.
const INDEX_BITS: u32 = 9;
const INDEX_MASK: u64 = 0x1ff;
/// Mask of the physical page number in `satp`, and in an entry that is shifted right by
/// `PPN_SHIFT`.
const PPN_MASK: u64 = (1 << 44) - 1;
const ENTRY_BYTES: u64 = 8;

/// Bits of a page table entry.
mod entry {
    pub(super) const VALID: u64 = 1 << 0;
    pub(super) const READ: u64 = 1 << 1;
    pub(super) const WRITE: u64 = 1 << 2;
    pub(super) const EXECUTE: u64 = 1 << 3;
    pub(super) const PPN_SHIFT: u32 = 10;
    /// Svnapot: the entry is one of 16 that map 64 KiB together.
    pub(super) const NAPOT: u64 = 1 << 63;
}

/// The result of a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    /// The guest-physical address. It may be outside RAM.
    At(u64),
    /// A page table entry is outside RAM.
    NoEntry,
    /// The address is not mapped: the hart takes a page fault.
    Unmapped,
}

/// One table that a walk has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The level of the table: 0 is the last, and its entries map 4 KiB.
    pub level: u32,
    /// The guest-physical address of the entry.
    pub at: u64,
    /// The entry. None if it is outside RAM.
    pub entry: Option<u64>,
}

/// Translates the virtual address `address` by the page tables of `satp`. Does not check
/// permissions or the accessed and dirty bits.
pub fn walk(ram: &GuestMemory, satp: u64, address: u64) -> Walk {
    walk_with(ram, satp, address, |_| ())
}

/// As [`walk`]. Calls `on_step` for each entry that it reads, from the root down.
pub fn walk_with(
    ram: &GuestMemory,
    satp: u64,
    address: u64,
    mut on_step: impl FnMut(Step),
) -> Walk {
    let Some(levels) = levels(satp) else {
        return Walk::Unmapped;
    };
    if levels == 0 {
        return Walk::At(address);
    }
    if !is_canonical(address, PAGE_BITS + INDEX_BITS * levels) {
        return Walk::Unmapped;
    }
    let mut table = (satp & PPN_MASK) << PAGE_BITS;
    for level in (0..levels).rev() {
        let index = (address >> (PAGE_BITS + INDEX_BITS * level)) & INDEX_MASK;
        let at = table + ENTRY_BYTES * index;
        let entry = ram.read_obj::<u64>(GuestAddress(at)).map(u64::from_le).ok();
        on_step(Step { level, at, entry });
        let Some(entry) = entry else {
            return Walk::NoEntry;
        };
        let kind = entry & (entry::READ | entry::WRITE | entry::EXECUTE);
        // Entries that are writable but not readable are reserved.
        if entry & entry::VALID == 0 || kind & !entry::EXECUTE == entry::WRITE {
            return Walk::Unmapped;
        }
        if kind != 0 {
            return leaf(entry, level, address);
        }
        table = page(entry);
    }
    Walk::Unmapped
}

/// The levels of the page tables of `satp`: 0 if there are none. `None` if its mode is reserved.
fn levels(satp: u64) -> Option<u32> {
    match satp >> 60 {
        BARE => Some(0),
        SV39 => Some(3),
        SV48 => Some(4),
        SV57 => Some(5),
        _ => None,
    }
}

/// The name of the mode of `satp`, such as `Sv39`.
pub fn mode_name(satp: u64) -> &'static str {
    match satp >> 60 {
        BARE => "Bare",
        SV39 => "Sv39",
        SV48 => "Sv48",
        SV57 => "Sv57",
        _ => "a reserved mode",
    }
}

/// The bits of a page table entry as letters, in the order D A G U X W R V. A bit that is clear is
/// a dash.
pub fn entry_bits(entry: u64) -> String {
    let letters = "DAGUXWRV".chars().zip((0..8).rev());
    letters
        .map(|(letter, bit)| if (entry >> bit) & 1 == 1 { letter } else { '-' })
        .collect()
}

/// Translates `address` by a leaf entry of this level.
fn leaf(entry: u64, level: u32, address: u64) -> Walk {
    const NAPOT_BITS: u32 = 4;
    const NAPOT_64K: u64 = 0b1000;
    let mut bits = PAGE_BITS + INDEX_BITS * level;
    let mut base = page(entry);
    if entry & entry::NAPOT != 0 {
        let size = (base >> PAGE_BITS) & ((1 << NAPOT_BITS) - 1);
        if level != 0 || size != NAPOT_64K {
            return Walk::Unmapped;
        }
        bits += NAPOT_BITS;
        base &= !((1 << bits) - 1);
    }
    let offset = (1 << bits) - 1;
    if base & offset != 0 {
        // A misaligned superpage.
        return Walk::Unmapped;
    }
    Walk::At(base | (address & offset))
}

/// The guest-physical address of the page or table that an entry points to.
fn page(entry: u64) -> u64 {
    ((entry >> entry::PPN_SHIFT) & PPN_MASK) << PAGE_BITS
}

/// Whether all bits above bit `bits - 1` are equal to that bit.
fn is_canonical(address: u64, bits: u32) -> bool {
    let above = address >> (bits - 1);
    above == 0 || above == u64::MAX >> (bits - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemConfig;
    use crate::memory;
    use crate::util::ByteSize;

    const RAM: u64 = 0x8000_0000;
    const ROOT: u64 = RAM + 0x1000;
    const READ: u64 = entry::VALID | entry::READ;

    fn ram() -> std::sync::Arc<GuestMemory> {
        memory::create(
            GuestAddress(RAM),
            MemConfig::new(ByteSize::mib(1)),
            memory::Backing::Private,
        )
        .unwrap()
    }

    fn entry_of(physical: u64, flags: u64) -> u64 {
        (physical >> 2) | flags
    }

    fn set(ram: &GuestMemory, table: u64, index: u64, entry: u64) {
        let at = GuestAddress(table + 8 * index);
        ram.write_obj(entry.to_le(), at).unwrap();
    }

    /// Maps one page at every level. The tables are in the pages after the root.
    #[test]
    fn pages_of_every_size_are_found() {
        for (mode, levels) in [(SV39, 3), (SV48, 4), (SV57, 5)] {
            let ram = ram();
            let satp = (mode << 60) | (ROOT >> 12);
            for number in 0..levels {
                let level = levels - 1 - number;
                let table = ROOT + 0x1000 * number;
                // Index 0 points to the next table. Index 5 is a leaf for a page of this level's
                // size.
                set(&ram, table, 0, entry_of(table + 0x1000, entry::VALID));
                let bits = 12 + 9 * level;
                let target = 3u64 << bits;
                set(&ram, table, 5, entry_of(target, READ | entry::EXECUTE));
                let address = (5u64 << bits) | 0xabc;
                // The address is canonical: index 5 does not have the highest bit of the highest
                // level's index.
                assert_eq!(walk(&ram, satp, address), Walk::At(target | 0xabc));
                let last = (6u64 << bits) - 1;
                let end = target + (1u64 << bits) - 1;
                assert_eq!(walk(&ram, satp, last), Walk::At(end));
                assert_eq!(walk(&ram, satp, 6u64 << bits), Walk::Unmapped);
            }
            // Entry 0 of the lowest table is not a leaf, but there is no further level.
            assert_eq!(walk(&ram, satp, 0), Walk::Unmapped);
        }
    }

    #[test]
    fn without_translation_every_address_is_physical() {
        for address in [0, RAM, u64::MAX] {
            assert_eq!(walk(&ram(), 0xfff, address), Walk::At(address));
        }
    }

    #[test]
    fn what_a_hart_cannot_use_is_unmapped() {
        let ram = ram();
        let satp = (SV39 << 60) | (ROOT >> 12);
        let top = |index: u64| index << 30;
        for (index, entry) in [
            (1, entry_of(1 << 30, entry::READ)),
            (2, entry_of(1 << 30, entry::VALID | entry::WRITE)),
            (3, entry_of((1 << 30) + (1 << 12), READ)),
            (4, entry_of(1 << 30, READ) | entry::NAPOT),
        ] {
            set(&ram, ROOT, index, entry);
            assert_eq!(walk(&ram, satp, top(index)), Walk::Unmapped, "{index}");
        }
        for address in [1 << 38, u64::MAX >> 1, u64::MAX << 39] {
            assert_eq!(walk(&ram, satp, address), Walk::Unmapped, "{address:#x}");
        }
        assert_eq!(walk(&ram, (5 << 60) | (ROOT >> 12), 0), Walk::Unmapped);
        // The upper half of the address space is mapped too.
        set(&ram, ROOT, 511, entry_of(0, READ));
        assert_eq!(walk(&ram, satp, u64::MAX), Walk::At((1 << 30) - 1));
    }

    #[test]
    fn sixteen_pages_as_one() {
        let ram = ram();
        let satp = (SV39 << 60) | (ROOT >> 12);
        set(&ram, ROOT, 0, entry_of(ROOT + 0x1000, entry::VALID));
        let last = ROOT + 0x2000;
        set(&ram, ROOT + 0x1000, 0, entry_of(last, entry::VALID));
        let napot = |low: u64| entry_of(0x4_0000 + (low << 12), READ) | entry::NAPOT;
        set(&ram, last, 7, napot(0b1000));
        set(&ram, last, 8, napot(0b0100));
        assert_eq!(walk(&ram, satp, 0x7123), Walk::At(0x4_7123));
        assert_eq!(walk(&ram, satp, 0x8123), Walk::Unmapped);
    }

    #[test]
    fn tables_outside_ram_have_no_entries() {
        let ram = ram();
        let outside = (SV39 << 60) | 0x1234;
        assert_eq!(walk(&ram, outside, 0), Walk::NoEntry);
        let satp = (SV48 << 60) | (ROOT >> 12);
        set(&ram, ROOT, 0, entry_of(RAM + (1 << 20), entry::VALID));
        assert_eq!(walk(&ram, satp, 0), Walk::NoEntry);
        // The largest physical address that an entry can have.
        set(&ram, ROOT, 1, ((u64::MAX << 10) & !entry::NAPOT) | 1);
        assert_eq!(walk(&ram, satp, 1 << 39), Walk::NoEntry);
        assert_eq!(walk(&ram, (SV57 << 60) | PPN_MASK, 0), Walk::NoEntry);
    }
}
