//! ELF kernels. They are loaded at their physical addresses, except a RISC-V vmlinux, which has no
//! real ones.
//!
//! Tool Interface Standard ELF 1.2 and the RISC-V psABI. The linker script of vmlinux
//! (`arch/riscv/kernel/vmlinux.lds.S`) counts physical addresses from 0, and the entry point is a
//! virtual address.

use elf::ParseError;
use elf::abi::{EI_NIDENT, EM_RISCV, PT_LOAD};
use elf::endian::AnyEndian;
use elf::file::{Class, FileHeader, parse_ident};
use elf::segment::{ProgramHeader, SegmentTable};

use super::{HEAD_SIZE, Kernel, KernelError, Segment};

/// Where a kernel whose physical addresses count from 0 goes, as an offset from the start of RAM.
/// An Image goes there too.
const UNPLACED_OFFSET: u64 = 2 << 20;

/// No RISC-V machine has RAM beyond this: a guest-physical address of Sv57x4 has 59 bits.
const END_MAX: u64 = 1 << 59;

/// A vmlinux runs at virtual addresses above this. Other kernels whose physical addresses count
/// from 0 do not.
const UPPER_HALF: u64 = 1 << 63;

/// Whether a file that starts with `head` is an ELF file.
pub(super) fn is(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF")
}

/// Parses a file of `size` bytes that starts with `head`, for RAM at guest-physical address `base`.
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
    let first = first.ok_or_else(|| KernelError::Elf("it has no segment to load".into()))?;
    // Physical addresses that count from 0 are offsets: no machine has RAM at address 0.
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

/// The program headers. In every kernel they follow the ELF header, so `head` has them.
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
            "a segment has {:#x} bytes in the file, but only {:#x} in memory",
            load.p_filesz, load.p_memsz
        );
        return Err(KernelError::Elf(line));
    }
    let end = at.and_then(|at| at.checked_add(load.p_memsz));
    let (Some(at), Some(0..END_MAX)) = (at, end) else {
        let line = format!(
            "it must be loaded at {:#x}, where this machine has no RAM",
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

/// The entry point as an offset from the start of RAM. If a segment contains it as a virtual
/// address it is one; in most kernels virtual and physical addresses are the same.
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
            let line = format!("its entry point {entry:#x} is outside all of its segments");
            return Err(KernelError::Elf(line));
        }
    };
    place(address)
        .ok_or_else(|| KernelError::Elf(format!("its entry point {entry:#x} is outside RAM")))
}

/// The name of an ELF `e_machine`.
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
