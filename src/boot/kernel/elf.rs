//! ELF kernels: loaded at their physical addresses, and a RISC-V vmlinux, which has none.
//!
//! Tool Interface Standard ELF 1.2 and the RISC-V psABI. `arch/riscv/kernel/vmlinux.lds.S` counts
//! vmlinux' physical addresses from 0, and its entry is a virtual address.

use elf::ParseError;
use elf::abi::{EI_NIDENT, EM_RISCV, PT_LOAD};
use elf::endian::AnyEndian;
use elf::file::{Class, FileHeader, parse_ident};
use elf::segment::{ProgramHeader, SegmentTable};

use super::{HEAD_SIZE, Kernel, KernelError, Segment};

/// Where a kernel without physical addresses goes: where an Image goes.
const UNPLACED_OFFSET: u64 = 2 << 20;

/// No RISC-V machine has RAM beyond it (Sv57x4).
const END_MAX: u64 = 1 << 59;

/// Where a vmlinux runs, and no kernel that is linked for physical addresses from 0.
const UPPER_HALF: u64 = 1 << 63;

/// Whether a file starts so.
pub(super) fn is(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF")
}

/// What to load of a file of `size` bytes that starts with `head` into RAM at `base`.
pub(super) fn parse(head: &[u8], size: u64, base: u64) -> Result<Kernel, KernelError> {
    let broken = |error: ParseError| KernelError::Elf(error.to_string());
    let (ident, rest) = head
        .split_at_checked(EI_NIDENT)
        .ok_or(KernelError::Truncated {
            promised: EI_NIDENT as u64,
            file: size,
        })?;
    let ident = parse_ident::<AnyEndian>(ident).map_err(broken)?;
    let header = FileHeader::parse_tail(ident, rest).map_err(broken)?;
    if header.e_machine != EM_RISCV {
        return Err(KernelError::ForeignElf(machine(header.e_machine)));
    }
    if header.class != Class::ELF64 {
        return Err(KernelError::ForeignElf("32-bit RISC-V".into()));
    }
    if header.endianness == AnyEndian::Big {
        return Err(KernelError::BigEndian);
    }
    let table = program_headers(&header, head)?;
    let loads: Vec<ProgramHeader> = table
        .iter()
        .filter(|segment| segment.p_type == PT_LOAD && segment.p_memsz > 0)
        .collect();
    let first = loads.iter().min_by_key(|segment| segment.p_paddr);
    let first = first.ok_or_else(|| KernelError::Elf("it has nothing to load".into()))?;
    // Physical addresses that count from 0 are no addresses: no machine has RAM there.
    let place = |paddr: u64| match first.p_paddr {
        0 => paddr.checked_add(UNPLACED_OFFSET),
        _ => paddr.checked_sub(base),
    };
    let mut segments = Vec::with_capacity(loads.len());
    for load in &loads {
        segments.push(segment(load, place(load.p_paddr), size)?);
    }
    refuse_overlaps(&segments)?;
    Ok(Kernel {
        segments,
        entry: entry(header.e_entry, &loads, place)?,
        is_linux: first.p_paddr == 0 && first.p_vaddr >= UPPER_HALF,
        expanded: None,
    })
}

/// They follow the file's header in every kernel.
fn program_headers<'a>(
    header: &FileHeader<AnyEndian>,
    head: &'a [u8],
) -> Result<SegmentTable<'a, AnyEndian>, KernelError> {
    let length = usize::from(header.e_phnum) * usize::from(header.e_phentsize);
    let start = usize::try_from(header.e_phoff).unwrap_or(usize::MAX);
    let range = start..start.saturating_add(length);
    let bytes = head.get(range).ok_or_else(|| {
        KernelError::Elf(format!(
            "its program headers are not in its first {HEAD_SIZE} bytes"
        ))
    })?;
    Ok(SegmentTable::new(header.endianness, header.class, bytes))
}

fn segment(load: &ProgramHeader, at: Option<u64>, file: u64) -> Result<Segment, KernelError> {
    let promised = load.p_offset.saturating_add(load.p_filesz);
    if load.p_filesz > 0 && promised > file {
        return Err(KernelError::Truncated { promised, file });
    }
    if load.p_filesz > load.p_memsz {
        let line = format!(
            "a segment has {:#x} bytes in {:#x} of memory",
            load.p_filesz, load.p_memsz
        );
        return Err(KernelError::Elf(line));
    }
    let end = at.and_then(|at| at.checked_add(load.p_memsz));
    let (Some(at), Some(0..END_MAX)) = (at, end) else {
        let line = format!(
            "it wants to be at {:#x}, where this machine has no RAM",
            load.p_paddr
        );
        return Err(KernelError::Elf(line));
    };
    Ok(Segment {
        source: load.p_offset..promised,
        at,
        size: load.p_memsz,
    })
}

fn refuse_overlaps(segments: &[Segment]) -> Result<(), KernelError> {
    let mut ranges: Vec<_> = segments.iter().map(|s| s.at..s.at + s.size).collect();
    ranges.sort_by_key(|range| range.start);
    match ranges.windows(2).any(|pair| pair[0].end > pair[1].start) {
        true => Err(KernelError::Elf("its segments overlap".into())),
        false => Ok(()),
    }
}

/// The entry as an offset in RAM. It is a virtual address wherever a segment has it, and those of
/// most kernels are their physical ones.
fn entry(
    entry: u64,
    loads: &[ProgramHeader],
    place: impl Fn(u64) -> Option<u64>,
) -> Result<u64, KernelError> {
    let inside = |start: u64, size: u64| (start..start.saturating_add(size)).contains(&entry);
    let virt = loads.iter().find(|load| inside(load.p_vaddr, load.p_memsz));
    let phys = || loads.iter().find(|load| inside(load.p_paddr, load.p_memsz));
    let address = match virt {
        Some(load) => load.p_paddr.wrapping_add(entry - load.p_vaddr),
        None if phys().is_some() => entry,
        None => {
            let line = format!("its entry {entry:#x} is in no segment");
            return Err(KernelError::Elf(line));
        }
    };
    place(address).ok_or_else(|| KernelError::Elf(format!("its entry {entry:#x} is no RAM's")))
}

/// ELF's `e_machine`, where it is one people have.
fn machine(machine: u16) -> String {
    match machine {
        3 => "x86".into(),
        40 => "Arm".into(),
        62 => "x86-64".into(),
        183 => "AArch64".into(),
        258 => "LoongArch".into(),
        other => format!("machine {other}"),
    }
}
