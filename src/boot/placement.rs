//! Where kernel, initrd and device tree go in RAM.
//!
//! ```text
//! RAM   +text_offset          2 MiB boundary                            end of RAM
//!  |     | Linux, with its BSS | ... | initrd | device tree | free ...         |
//!  |     | any other kernel    | free ...            | device tree | initrd    |
//! ```
//!
//! Linux takes no RAM behind its BSS before it has reserved the initrd and the tree (`setup_bootmem`
//! in `arch/riscv/mm/init.c`). So both lie right behind it, in what a small `mem=` leaves. What another
//! kernel takes behind its BSS nobody knows: it finds the rest of RAM in one piece, and so does a Linux
//! without an initrd.

use std::ops::Range;

use thiserror::Error;

use super::kernel::Kernel;
use crate::memory::PAGE_SIZE;
use crate::util::ByteSize;

/// Linux reserves its own RAM up to a multiple of this, and gives up an initrd that begins below it.
const LINUX_ALIGN: u64 = 2 << 20;

/// Room for a device tree: the machine, what each hart adds, and `cmdline` bytes of command line.
pub const fn fdt_room(harts: u32, cmdline: usize) -> u64 {
    (32 << 10) + harts as u64 * 2048 + cmdline as u64
}

/// Guest-physical ranges that do not overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The kernel with its BSS.
    pub kernel: Range<u64>,
    /// The kernel's first instruction.
    pub entry: u64,
    /// The initrd, exactly.
    pub initrd: Option<Range<u64>>,
    /// Room for the device tree; it starts on a page.
    pub fdt: Range<u64>,
}

/// RAM is too little for what it should hold.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{ram} of guest RAM are too little: the kernel ends {} into RAM{}; --mem {} would do",
    .kernel,
    .initrd.map(|size| format!(", and the initrd has {size}")).unwrap_or_default(),
    .enough.as_flag()
)]
pub struct TooSmall {
    ram: ByteSize,
    kernel: ByteSize,
    initrd: Option<ByteSize>,
    /// A size that would do, for the guest's work too.
    pub(crate) enough: ByteSize,
}

impl Placement {
    /// Places `kernel`, an initrd of `initrd` bytes and `fdt` bytes of device tree in RAM of
    /// `ram` bytes at `base`.
    ///
    /// # Errors
    /// They do not fit.
    pub fn plan(
        base: u64,
        ram: ByteSize,
        kernel: &Kernel,
        initrd: Option<u64>,
        fdt: u64,
    ) -> Result<Self, TooSmall> {
        let pages = |bytes: u64| bytes.next_multiple_of(PAGE_SIZE);
        let extent = kernel.extent();
        let kernel_end = pages(extent.end);
        // An initrd longer than any RAM may not overflow the sum.
        let initrd_pages = pages(initrd.unwrap_or(0).min(1 << 60));
        let behind = initrd_pages + pages(fdt);
        let needed = kernel_end + behind;
        if needed > ram.bytes() {
            return Err(TooSmall {
                ram,
                kernel: ByteSize(extent.end),
                initrd: initrd.map(ByteSize),
                enough: enough(needed),
            });
        }
        let (initrd_start, fdt_start) = match low_start(kernel, behind, ram) {
            Some(start) if initrd.is_some() => (base + start, base + start + initrd_pages),
            _ => {
                // No host has RAM at the end of the address space; it refuses such a size later.
                let end = base.saturating_add(ram.bytes()) / PAGE_SIZE * PAGE_SIZE;
                (end - initrd_pages, end - behind)
            }
        };
        Ok(Self {
            kernel: base + extent.start..base + extent.end,
            entry: base + kernel.entry,
            initrd: initrd.map(|size| initrd_start..initrd_start + size),
            fdt: fdt_start..fdt_start + fdt,
        })
    }
}

/// How far into RAM the part begins that a Linux does not count as its own, if `behind` bytes fit there.
/// The start of RAM is aligned too.
fn low_start(kernel: &Kernel, behind: u64, ram: ByteSize) -> Option<u64> {
    let start = kernel.extent().end.next_multiple_of(LINUX_ALIGN);
    (kernel.is_linux && start + behind <= ram.bytes()).then_some(start)
}

/// A round size for a guest whose boot files take `needed` bytes.
fn enough(needed: u64) -> ByteSize {
    let wanted = with_work(needed);
    ByteSize(wanted.checked_next_power_of_two().unwrap_or(1 << 63))
}

/// Bytes for a guest whose boot files take `needed`, with room for its work: Debian's kernel ends 32 MiB
/// into RAM and takes 70 MiB of it before it frees what only booting needs; an initrd is unpacked.
fn with_work(needed: u64) -> u64 {
    needed
        .saturating_mul(2)
        .saturating_add(ByteSize::mib(16).bytes())
}

/// Boot files of less than this say nothing of what their guest needs.
const SMALL: u64 = 8 << 20;

/// What a guest with these boot files is likely to need, if `ram` is less: such a guest may end before it
/// has a console to say so.
pub(crate) fn scarce(ram: ByteSize, placement: &Placement, base: u64) -> Option<ByteSize> {
    let initrd = placement.initrd.as_ref().map_or(0, |at| at.end - at.start);
    let needed = placement.kernel.end - base + initrd;
    let is_scarce = needed >= SMALL && ram.bytes() < with_work(needed);
    is_scarce.then(|| enough(needed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::kernel::Segment;

    const BASE: u64 = 0x8000_0000;
    const TEXT_OFFSET: u64 = 0x20_0000;
    const IMAGE_SIZE: u64 = 31_895_552;

    fn debian() -> Kernel {
        let segment = Segment {
            source: 0..31_165_952,
            at: TEXT_OFFSET,
            size: IMAGE_SIZE,
        };
        Kernel {
            segments: vec![segment],
            entry: TEXT_OFFSET,
            is_linux: true,
            expanded: None,
        }
    }

    /// What is at the same place and no Linux.
    fn other() -> Kernel {
        Kernel {
            is_linux: false,
            ..debian()
        }
    }

    const FDT: u64 = fdt_room(1, 20);

    fn plan(ram: ByteSize, initrd: Option<u64>) -> Result<Placement, TooSmall> {
        Placement::plan(BASE, ram, &debian(), initrd, FDT)
    }

    #[test]
    fn nothing_overlaps() {
        for (ram, initrd) in [
            (ByteSize::mib(128), Some(1_234_567)),
            (ByteSize::mib(64), None),
            (ByteSize::kib(33 << 10), Some(1)),
            (ByteSize::kib(35 << 10), Some(1)),
            (ByteSize::mib(1 << 20), Some(1 << 30)),
        ] {
            for kernel in [debian(), other()] {
                let at = Placement::plan(BASE, ram, &kernel, initrd, FDT).unwrap();
                assert_eq!(at.kernel, 0x8020_0000..0x8020_0000 + IMAGE_SIZE);
                assert_eq!(at.fdt.end - at.fdt.start, FDT);
                let mut ranges = vec![at.kernel, at.fdt];
                ranges.extend(at.initrd.clone());
                ranges.sort_by_key(|range| range.start);
                assert!(ranges.windows(2).all(|two| two[0].end <= two[1].start));
                assert!(ranges.last().unwrap().end <= BASE + ram.bytes());
                assert!(ranges[1..].iter().all(|range| range.start % PAGE_SIZE == 0));
                let size = at.initrd.map(|range| range.end - range.start);
                assert_eq!(size, initrd, "the initrd is not rounded");
            }
        }
    }

    /// What `mem=` cuts off a Linux of much RAM holds neither initrd nor tree.
    #[test]
    fn they_lie_right_behind_a_linux() {
        let initrd = 1_234_567;
        let start = (BASE + TEXT_OFFSET + IMAGE_SIZE).next_multiple_of(2 << 20);
        for ram in [64, 128, 512, 1 << 20] {
            let at = plan(ByteSize::mib(ram), Some(initrd)).unwrap();
            assert_eq!(at.initrd, Some(start..start + initrd));
            assert_eq!(at.fdt.start, (start + initrd).next_multiple_of(PAGE_SIZE));
        }
    }

    /// The last 2 MiB that a Linux has a part of are all its own: it gives up an initrd there.
    #[test]
    fn a_linux_that_ends_on_a_boundary_loses_no_ram() {
        let ending = |end: u64| {
            let mut kernel = debian();
            kernel.segments[0].size = end - TEXT_OFFSET;
            let at = Placement::plan(BASE, ByteSize::mib(128), &kernel, Some(1), FDT).unwrap();
            at.initrd.unwrap().start - BASE
        };
        assert_eq!(ending(32 << 20), 32 << 20);
        assert_eq!(ending((32 << 20) + 1), 34 << 20);
    }

    /// A kernel whose room nobody knows, a Linux without an initrd, and RAM that is too little for
    /// what a Linux counts as its own.
    #[test]
    fn others_have_the_rest_of_ram_in_one_piece() {
        let (mib_128, mib_33) = (ByteSize::mib(128), ByteSize::mib(33));
        for (ram, kernel, initrd) in [
            (mib_128, other(), Some(1_234_567)),
            (mib_128, other(), None),
            (mib_128, debian(), None),
            (mib_33, debian(), Some(17)),
        ] {
            let at = Placement::plan(BASE, ram, &kernel, initrd, FDT).unwrap();
            let end = BASE + ram.bytes();
            let initrd_pages = initrd.unwrap_or(0).next_multiple_of(PAGE_SIZE);
            let tree_pages = FDT.next_multiple_of(PAGE_SIZE);
            assert_eq!(at.fdt.start, end - initrd_pages - tree_pages);
            assert_eq!(
                at.initrd.map(|at| at.start),
                initrd.map(|_| end - initrd_pages)
            );
        }
    }

    /// Debian's kernel starts in 96 MiB, and not in 64.
    #[test]
    fn little_ram_is_told() {
        let told = |ram, initrd| {
            let ram = ByteSize::mib(ram);
            scarce(ram, &plan(ram, initrd).unwrap(), BASE)
        };
        assert_eq!(told(96, Some(4 << 20)), None);
        assert_eq!(told(64, None), Some(ByteSize::mib(128)));
        assert_eq!(told(234, Some(200 << 20)), Some(ByteSize::mib(512)));
        let small = Kernel {
            segments: vec![Segment {
                source: 0..4096,
                at: TEXT_OFFSET,
                size: 1 << 20,
            }],
            ..debian()
        };
        let ram = ByteSize::mib(4);
        let placed = Placement::plan(BASE, ram, &small, None, FDT).unwrap();
        assert_eq!(scarce(ram, &placed, BASE), None);
    }

    #[test]
    fn the_smallest_ram_is_exact() {
        let needed = (TEXT_OFFSET + IMAGE_SIZE).next_multiple_of(PAGE_SIZE)
            + PAGE_SIZE
            + FDT.next_multiple_of(PAGE_SIZE);
        assert!(plan(ByteSize(needed), Some(17)).is_ok());
        assert!(plan(ByteSize(needed - PAGE_SIZE), Some(17)).is_err());
    }

    #[test]
    fn too_small_names_what_would_do() {
        let error = plan(ByteSize::kib(1), Some(2 << 20)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "1 KiB of guest RAM are too little: the kernel ends 32.4 MiB into RAM, and the initrd has \
             2 MiB; --mem 128M would do"
        );
        assert!(plan(error.enough, Some(2 << 20)).is_ok());
        assert!(plan(ByteSize::mib(1), Some(u64::MAX)).is_err());
        assert!(plan(ByteSize(u64::MAX), None).is_ok());
    }
}
