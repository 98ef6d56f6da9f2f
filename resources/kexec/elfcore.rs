//! The head of /proc/vmcore, from which a crash kernel knows the crashed kernel's RAM and notes
//! (`fs/proc/vmcore.c`).

use std::fs;
use std::ops::Range;

use anyhow::{Context, Result};

/// `include/uapi/linux/elf.h`.
const ET_CORE: u16 = 4;
const EM_RISCV: u16 = 243;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const HEADER: u16 = 64;
const PROGRAM_HEADER: u16 = 56;

/// Lists the notes of each CPU and of the kernel, and the pieces of `ram` that do not belong to the
/// crash kernel.
pub(crate) fn header(ram: &[Range<u64>], own: &Range<u64>) -> Result<Vec<u8>> {
    let around = |ram: &Range<u64>| {
        let before = ram.start..ram.end.min(own.start);
        [before, ram.start.max(own.end)..ram.end]
    };
    let mut parts: Vec<_> = notes()?.into_iter().map(|part| (PT_NOTE, part)).collect();
    let loads = ram.iter().flat_map(around).filter(|part| !part.is_empty());
    parts.extend(loads.map(|part| (PT_LOAD, part)));
    let mut elf = ident();
    elf.extend(u16::try_from(parts.len())?.to_le_bytes());
    elf.resize(HEADER.into(), 0); // no sections
    for (kind, Range { start, end }) in parts {
        elf.extend([kind, 0].map(u32::to_le_bytes).as_flattened());
        // Offset, virtual and physical address; size in the file and in memory; alignment.
        let size = end - start;
        let words = [start, start, start, size, size, 0];
        elf.extend(words.map(u64::to_le_bytes).as_flattened());
    }
    Ok(elf)
}

/// The ELF header.
fn ident() -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec(); // 64 bits, little endian
    elf.resize(16, 0);
    elf.extend([ET_CORE, EM_RISCV].map(u16::to_le_bytes).as_flattened());
    elf.extend(1_u32.to_le_bytes());
    let (entry, sections) = (0, 0);
    let words = [entry, u64::from(HEADER), sections];
    elf.extend(words.map(u64::to_le_bytes).as_flattened());
    elf.extend(0_u32.to_le_bytes()); // flags
    let sizes = [HEADER, PROGRAM_HEADER];
    elf.extend(sizes.map(u16::to_le_bytes).as_flattened());
    elf
}

fn notes() -> Result<Vec<Range<u64>>> {
    let mut notes = Vec::new();
    for cpu in 0.. {
        let file = format!("/sys/devices/system/cpu/cpu{cpu}/crash_notes");
        let Ok(start) = fs::read_to_string(&file) else {
            break;
        };
        let size = fs::read_to_string(format!("{file}_size"))?;
        notes.push(range(&start, size.trim().parse()?)?);
    }
    let info = fs::read_to_string("/sys/kernel/vmcoreinfo").context("read vmcoreinfo")?;
    let (start, size) = info.trim().split_once(' ').context("two words")?;
    notes.push(range(start, u64::from_str_radix(size, 16)?)?);
    Ok(notes)
}

fn range(start: &str, size: u64) -> Result<Range<u64>> {
    let start = start.trim().trim_start_matches("0x");
    let start = u64::from_str_radix(start, 16)?;
    Ok(start..start + size)
}
