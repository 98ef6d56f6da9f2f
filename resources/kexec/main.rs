//! Run by the kexec cases (tests/long/kexec.rs) in a Debian guest, because Debian has no
//! kexec-tools for riscv64.
//!
//! ```text
//! guest-kexec load KERNEL INITRD CMDLINE     loads the next kernel, for "go"
//! guest-kexec crash KERNEL INITRD CMDLINE    loads the kernel that a panic starts, into the RAM of
//!                                            crashkernel=
//! guest-kexec go                             starts the next kernel at once
//! ```
//!
//! Linux enters the new kernel at its first byte, with the hart's ID and the address of the device
//! tree, which it finds among the segments by its magic number
//! (`arch/riscv/kernel/machine_kexec.c`). No other code runs in between.

mod elfcore;
mod fdt;

use std::fs;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use rustix::system::{RebootCommand, reboot};

use fdt::Chosen;

/// `include/uapi/linux/kexec.h`.
const KEXEC_ON_CRASH: libc::c_ulong = 1;
const KEXEC_ARCH_RISCV: libc::c_ulong = 243 << 16;

const PAGE: u64 = 4096;
/// Linux maps itself with pages of this size, and ignores an initrd that begins in the last one.
const HUGE_PAGE: u64 = 2 << 20;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["load", kernel, initrd, cmdline] => Next::read(kernel, initrd, cmdline)?.load(),
        ["crash", kernel, initrd, cmdline] => Next::read(kernel, initrd, cmdline)?.load_for_crash(),
        ["go"] => go(),
        _ => bail!("guest-kexec load|crash KERNEL INITRD CMDLINE | go"),
    }
}

/// The kernel to run next.
struct Next<'a> {
    kernel: Vec<u8>,
    initrd: Vec<u8>,
    cmdline: &'a str,
}

impl<'a> Next<'a> {
    /// Files, or disks that contain a file and zeros.
    fn read(kernel: &str, initrd: &str, cmdline: &'a str) -> Result<Self> {
        Ok(Self {
            kernel: read(kernel)?,
            initrd: read(initrd)?,
            cmdline,
        })
    }

    fn load(&self) -> Result<()> {
        let mut layout = self.place(&iomem("System RAM")?)?;
        self.add_tree(&mut layout, Vec::new())?;
        kexec_load(&layout, 0)
    }

    /// The crash kernel may use only its own RAM. The rest belongs to the crashed kernel, and is in
    /// /proc/vmcore.
    fn load_for_crash(&self) -> Result<()> {
        let own = iomem("Crash kernel").context("crashkernel= on the command line")?;
        let mut layout = self.place(&own)?;
        let core = layout.add(elfcore::header(&iomem("System RAM")?, &own[0])?);
        let ranges = vec![
            ("linux,usable-memory-range", own[0].clone()),
            ("linux,elfcorehdr", core),
        ];
        self.add_tree(&mut layout, ranges)?;
        kexec_load(&layout, KEXEC_ON_CRASH)
    }

    /// The kernel, near the start of the first of these ranges.
    fn place(&self, ram: &[Range<u64>]) -> Result<Layout> {
        let image = Image::parse(&self.kernel)?;
        let Range { start, end } = ram[0];
        let mut layout = Layout {
            entry: start.next_multiple_of(HUGE_PAGE) + image.text_offset,
            end,
            segments: Vec::new(),
        };
        layout.add_at(layout.entry, self.kernel.clone(), image.size);
        Ok(layout)
    }

    fn add_tree(&self, layout: &mut Layout, ranges: Vec<(&str, Range<u64>)>) -> Result<()> {
        let chosen = Chosen {
            cmdline: self.cmdline,
            initrd: layout.add(self.initrd.clone()),
            ranges,
        };
        layout.add(fdt::rewrite(&read("/sys/firmware/fdt")?, &chosen)?);
        Ok(())
    }
}

/// Fields of an Image's header (`Documentation/arch/riscv/boot-image-header.rst`).
struct Image {
    text_offset: u64,
    /// The size, with its BSS.
    size: u64,
}

impl Image {
    fn parse(kernel: &[u8]) -> Result<Self> {
        /// "RSC" and 5, at offset 56.
        const MAGIC2: u64 = 0x0543_5352;
        let words: Vec<u64> = kernel
            .chunks_exact(8)
            .take(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
            .collect();
        match words[..] {
            [_, text_offset, size, .., last] if last & 0xffff_ffff == MAGIC2 => {
                Ok(Self { text_offset, size })
            }
            _ => bail!("the kernel is no Image"),
        }
    }
}

/// The pieces of RAM to fill, in order.
struct Layout {
    /// The kernel's start.
    entry: u64,
    /// The end of the RAM.
    end: u64,
    segments: Vec<Segment>,
}

struct Segment {
    start: u64,
    size: u64,
    bytes: Vec<u8>,
}

impl Layout {
    /// Adds a piece behind all others. Returns its address.
    fn add(&mut self, bytes: Vec<u8>) -> Range<u64> {
        let start = self.used().next_multiple_of(HUGE_PAGE);
        self.add_at(start, bytes, 0)
    }

    /// Of `size` bytes, if that is more than the data.
    fn add_at(&mut self, start: u64, bytes: Vec<u8>, size: u64) -> Range<u64> {
        let length = bytes.len() as u64;
        let size = size.max(length).next_multiple_of(PAGE);
        self.segments.push(Segment { start, size, bytes });
        start..start + length
    }

    fn used(&self) -> u64 {
        let last = self.segments.last();
        last.map_or(self.entry, |last| last.start + last.size)
    }
}

fn read(path: &str) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {path}"))
}

/// The ranges with this name in /proc/iomem, at least one.
fn iomem(name: &str) -> Result<Vec<Range<u64>>> {
    let text = fs::read_to_string("/proc/iomem").context("read /proc/iomem")?;
    let of_line = |line: &str| {
        let (range, what) = line.trim().split_once(" : ")?;
        let (first, last) = range.split_once('-').filter(|_| what == name)?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some(number(first)?..number(last)? + 1)
    };
    let ranges: Vec<_> = text.lines().filter_map(of_line).collect();
    ensure!(!ranges.is_empty(), "/proc/iomem has no {name:?}");
    Ok(ranges)
}

/// `struct kexec_segment`.
#[repr(C)]
struct RawSegment {
    buf: *const u8,
    bufsz: libc::size_t,
    mem: libc::c_ulong,
    memsz: libc::size_t,
}

#[allow(unsafe_code)]
fn kexec_load(layout: &Layout, flags: libc::c_ulong) -> Result<()> {
    ensure!(layout.used() <= layout.end, "the RAM is too little");
    let mut raw = Vec::new();
    for Segment { start, size, bytes } in &layout.segments {
        println!("kexec: {} bytes at {start:#x}, {size:#x}", bytes.len());
        raw.push(RawSegment {
            buf: bytes.as_ptr(),
            bufsz: bytes.len(),
            mem: *start,
            memsz: usize::try_from(*size)?,
        });
    }
    // SAFETY: the kernel only reads `raw` and the buffers that it names, which outlive the call.
    let status = unsafe {
        libc::syscall(
            libc::SYS_kexec_load,
            layout.entry,
            raw.len(),
            raw.as_ptr(),
            KEXEC_ARCH_RISCV | flags,
        )
    };
    ensure!(
        status == 0,
        "kexec_load: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

/// Returns only if no kernel is loaded.
fn go() -> Result<()> {
    rustix::fs::sync();
    reboot(RebootCommand::Kexec).context("reboot")
}
