//! Chooses where kernel, initrd and device tree go in RAM.
//!
//! ```text
//! RAM   +text_offset          2 MiB boundary                            end of RAM
//!  |     | Linux, with its BSS | ... | initrd | device tree | free ...         |
//!  |     | any other kernel    | free ...            | device tree | initrd    |
//! ```
//!
//! Linux uses no RAM behind its BSS before it has reserved the initrd and the tree (`setup_bootmem`
//! in `arch/riscv/mm/init.c`). So both are placed right behind the kernel, where they are inside
//! RAM even with a small `mem=`. Other kernels may use RAM behind their BSS early. For them, and
//! for a Linux without an initrd, initrd and tree are at the end of RAM, so that the rest of RAM is
//! one piece.

use std::ops::Range;

use thiserror::Error;

use super::kernel::Kernel;
use crate::memory::PAGE_SIZE;
use crate::util::ByteSize;

/// Linux reserves the RAM of its image up to a multiple of this, and ignores an initrd that begins
/// below that address.
const LINUX_ALIGN: u64 = 2 << 20;

/// Bytes to reserve for the device tree of a machine with `harts` harts and a command line of
/// `cmdline` bytes.
pub const fn fdt_room(harts: u32, cmdline: usize) -> u64 {
    (32 << 10) + harts as u64 * 2048 + cmdline as u64
}

/// Guest-physical ranges of the boot files. They do not overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The kernel, its BSS included.
    pub kernel: Range<u64>,
    /// Address of the kernel's first instruction.
    pub entry: u64,
    /// The initrd: its exact size, not rounded up to pages.
    pub initrd: Option<Range<u64>>,
    /// Space for the device tree. It starts at a page boundary.
    pub fdt: Range<u64>,
}

/// RAM is too small for the boot files.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "guest RAM of {ram} is too small: the kernel ends {} above the start of RAM{}; --mem {} is \
     enough",
    .kernel,
    .initrd.map(|size| format!(", and the initrd takes {size}")).unwrap_or_default(),
    .enough.as_flag()
)]
pub struct TooSmall {
    ram: ByteSize,
    kernel: ByteSize,
    initrd: Option<ByteSize>,
    /// A size that is enough for the boot files and for the guest to run.
    pub(crate) enough: ByteSize,
}

impl Placement {
    /// The file that was loaded at the guest-physical address `gpa`: "kernel", "initrd" or "device
    /// tree".
    pub fn file_at(&self, gpa: u64) -> Option<&'static str> {
        let is_in = |range: &Range<u64>| range.contains(&gpa);
        match () {
            () if is_in(&self.kernel) => Some("kernel"),
            () if self.initrd.as_ref().is_some_and(is_in) => Some("initrd"),
            () if is_in(&self.fdt) => Some("device tree"),
            () => None,
        }
    }

    /// Places `kernel`, an initrd of `initrd` bytes and a device tree of `fdt` bytes in RAM of
    /// `ram` bytes at guest-physical address `base`.
    ///
    /// # Errors
    /// Fails if they do not fit in RAM.
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
        // Limit the size, so that the sum cannot overflow.
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
                // Saturate: no host can map RAM at the end of the address space, so creating RAM
                // fails later.
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

/// The offset in RAM right behind the RAM that a Linux reserves for its image. None if `kernel` is
/// no Linux, or if `behind` bytes do not fit there. The offset is aligned, and so is the start of
/// RAM.
fn low_start(kernel: &Kernel, behind: u64, ram: ByteSize) -> Option<u64> {
    let start = kernel.extent().end.next_multiple_of(LINUX_ALIGN);
    (kernel.is_linux && start + behind <= ram.bytes()).then_some(start)
}

/// A power of two that is enough RAM for a guest whose boot files take `needed` bytes.
fn enough(needed: u64) -> ByteSize {
    let wanted = with_work(needed);
    ByteSize(wanted.checked_next_power_of_two().unwrap_or(1 << 63))
}

/// Bytes of RAM to boot and run a guest whose boot files take `needed` bytes. Debian's kernel, for
/// example, ends 32 MiB above the start of RAM, and uses 70 MiB before it frees its init memory. An
/// initrd is unpacked into RAM.
fn with_work(needed: u64) -> u64 {
    needed
        .saturating_mul(2)
        .saturating_add(ByteSize::mib(16).bytes())
}

/// The size of smaller boot files says nothing about how much RAM their guest needs.
const SMALL: u64 = 8 << 20;

/// If `ram` is probably too small for a guest with these boot files, returns a size that is
/// probably enough. Such a guest may fail before it has a console to report it.
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

    /// A kernel at the same place that is no Linux.
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

    /// With much RAM, neither initrd nor tree is in the part that a Linux loses by `mem=`.
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

    /// Linux reserves its last, partly used 2 MiB completely, and ignores an initrd there.
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

    /// Initrd and tree are at the end of RAM for other kernels, for a Linux without an initrd, and
    /// if RAM is too small to place them behind the RAM that a Linux reserves.
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

    /// Debian's kernel boots in 96 MiB, but not in 64 MiB.
    #[test]
    fn little_ram_is_told() {
        let warned = |ram, initrd| {
            let ram = ByteSize::mib(ram);
            scarce(ram, &plan(ram, initrd).unwrap(), BASE)
        };
        assert_eq!(warned(96, Some(4 << 20)), None);
        assert_eq!(warned(64, None), Some(ByteSize::mib(128)));
        assert_eq!(warned(234, Some(200 << 20)), Some(ByteSize::mib(512)));
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
            "guest RAM of 1 KiB is too small: the kernel ends 32.4 MiB above the start of RAM, \
             and the initrd takes 2 MiB; --mem 128M is enough"
        );
        assert!(plan(error.enough, Some(2 << 20)).is_ok());
        assert!(plan(ByteSize::mib(1), Some(u64::MAX)).is_err());
        assert!(plan(ByteSize(u64::MAX), None).is_ok());
    }
}
