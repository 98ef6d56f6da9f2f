//! Files and sizes that rvmm refuses, with one line that names the object and the reason, before
//! any guest runs.
#![cfg(target_arch = "riscv64")]

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use crate::common::files::{self, TempDir};
use crate::common::{HOST_FAILED, POWERED_OFF, Rvmm};

// Fields of a kernel image's header (Linux, Documentation/arch/riscv/boot-image-header.rst).
const TEXT_OFFSET: usize = 8;
const IMAGE_SIZE: usize = 16;
const FLAGS: usize = 24;
const MAGIC2: usize = 56;

/// rvmm refuses `kernel` with one line that contains the file's name and each of `words`.
#[track_caller]
fn refuse_kernel(kernel: &Path, words: &[&str]) {
    refuse(
        &["--kernel".as_ref(), kernel.as_os_str()],
        &with(words, kernel),
    );
}

/// The same for an initrd, with a kernel that is fine.
#[track_caller]
fn refuse_initrd(initrd: &Path, words: &[&str]) {
    let kernel = files::guest("shutdown");
    refuse(
        &[
            "--kernel".as_ref(),
            kernel.as_os_str(),
            "--initrd".as_ref(),
            initrd.as_os_str(),
        ],
        &with(words, initrd),
    );
}

/// The same for a size of the memory.
#[track_caller]
fn refuse_mem(size: &str, words: &[&str]) {
    let kernel = files::guest("shutdown");
    let args = [
        "--kernel".as_ref(),
        kernel.as_os_str(),
        "--mem".as_ref(),
        size.as_ref(),
    ];
    refuse(&args, &[&["--mem"], words].concat());
}

#[track_caller]
fn refuse(args: &[&OsStr], words: &[&str]) {
    Rvmm::new()
        .args(args)
        .stdin_null()
        .run()
        .assert_one_line(HOST_FAILED, words);
}

fn with<'a>(words: &[&'a str], file: &'a Path) -> Vec<&'a str> {
    [&[file.to_str().expect("a path in UTF-8")], words].concat()
}

/// The guest `shutdown`, with `bytes` written at offset `at` of its header.
fn patched(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = fs::read(files::guest("shutdown")).expect("read the guest");
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

#[track_caller]
fn refuse_patched(at: usize, bytes: &[u8], words: &[&str]) {
    let dir = TempDir::new();
    refuse_kernel(&dir.file("lying.img", patched(at, bytes)), words);
}

/// The start of an ELF file for `machine`: 64 bits, little-endian.
fn elf(machine: u16) -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend(2u16.to_le_bytes()); // ET_EXEC
    elf.extend(machine.to_le_bytes());
    elf.resize(4096, 0);
    elf
}

/// The image that the other cases patch is good, and so is a patch that changes nothing.
#[test]
fn the_image_the_lies_are_made_from_runs() {
    let dir = TempDir::new();
    let kernel = dir.file("honest.img", patched(FLAGS, &0u64.to_le_bytes()));
    let end = Rvmm::new().arg("--kernel").arg(kernel).run();
    assert_eq!(
        end.log, "",
        "without -v, a run without an error says nothing"
    );
    end.assert_console(POWERED_OFF, &[]);
}

#[test]
fn kernel_missing() {
    let dir = TempDir::new();
    refuse_kernel(&dir.path().join("nope"), &["No such file or directory"]);
    refuse_kernel(
        &dir.path().join("nope/nope"),
        &["No such file or directory"],
    );
}

#[test]
fn kernel_is_a_directory() {
    let dir = TempDir::new();
    refuse_kernel(dir.path(), &["directory"]);
}

#[test]
fn kernel_is_a_device() {
    refuse_kernel(Path::new("/dev/zero"), &["a device"]);
    refuse_kernel(Path::new("/dev/null"), &["empty"]);
}

#[test]
fn kernel_is_empty() {
    let dir = TempDir::new();
    refuse_kernel(&dir.file("empty", ""), &["empty"]);
}

#[test]
fn kernel_is_text() {
    let dir = TempDir::new();
    let text = "root:x:0:0:root:/root:/bin/sh\n".repeat(100);
    refuse_kernel(&dir.file("passwd", &text), &["not a RISC-V"]);
    refuse_kernel(&dir.file("line", &text[..30]), &["not a RISC-V"]);
}

#[test]
fn kernel_is_compressed() {
    let dir = TempDir::new();
    let mut gzip = vec![0x1f, 0x8b, 8, 0];
    gzip.resize(4096, 0x55);
    refuse_kernel(&dir.file("Image.gz", gzip), &["gzip"]);
}

#[test]
fn kernel_is_an_elf_file() {
    let dir = TempDir::new();
    refuse_kernel(&dir.file("vmlinux-x86", elf(62)), &["ELF", "x86"]);
    refuse_kernel(&dir.file("vmlinux-arm", elf(183)), &["ELF"]);
    refuse_kernel(&dir.file("vmlinux", elf(243)), &["ELF", "cannot load"]);
}

#[test]
fn kernel_is_truncated() {
    let image = fs::read(files::kernel()).expect("read the kernel");
    let dir = TempDir::new();
    refuse_kernel(&dir.file("63-bytes", &image[..63]), &["truncated"]);
    refuse_kernel(&dir.file("header", &image[..64]), &["truncated"]);
    refuse_kernel(&dir.file("half", &image[..image.len() / 2]), &["truncated"]);
}

#[test]
fn kernel_lies_about_its_size() {
    let file = fs::metadata(files::guest("shutdown"))
        .expect("the guest")
        .len();
    for size in [0, 1, 64, file - 1] {
        refuse_patched(IMAGE_SIZE, &size.to_le_bytes(), &["image_size"]);
    }
    for size in [1 << 40, u64::MAX - 0xfff, u64::MAX] {
        refuse_patched(IMAGE_SIZE, &size.to_le_bytes(), &[]);
    }
}

#[test]
fn kernel_lies_about_its_place() {
    for offset in [1, 0x1000, 0x20_0004] {
        refuse_patched(TEXT_OFFSET, &u64::to_le_bytes(offset), &["text_offset"]);
    }
    for offset in [1 << 40, 1 << 63, !0x1f_ffff, u64::MAX] {
        refuse_patched(TEXT_OFFSET, &u64::to_le_bytes(offset), &[]);
    }
}

#[test]
fn kernel_is_big_endian() {
    refuse_patched(FLAGS, &1u64.to_le_bytes(), &["big", "endian"]);
}

#[test]
fn kernel_has_another_magic() {
    refuse_patched(MAGIC2, b"ARM\x64", &["not a RISC-V"]);
    refuse_patched(MAGIC2, &[0; 4], &["not a RISC-V"]);
}

#[test]
fn initrd_missing() {
    let dir = TempDir::new();
    refuse_initrd(&dir.path().join("nope"), &["No such file or directory"]);
}

#[test]
fn initrd_is_empty() {
    refuse_initrd(Path::new("/dev/null"), &["empty"]);
    let dir = TempDir::new();
    refuse_initrd(&dir.file("empty", ""), &["empty"]);
}

#[test]
fn initrd_is_a_directory() {
    let dir = TempDir::new();
    refuse_initrd(dir.path(), &["directory"]);
}

/// For an initrd that is larger than RAM, the message names a size that is enough.
#[test]
fn initrd_is_too_large() {
    let dir = TempDir::new();
    let initrd = dir.path().join("initrd");
    fs::File::create(&initrd)
        .and_then(|file| file.set_len(1 << 30))
        .expect("make a sparse file");
    let kernel = files::guest("shutdown");
    let args = [
        "--kernel".as_ref(),
        kernel.as_os_str(),
        "--initrd".as_ref(),
        initrd.as_os_str(),
    ];
    refuse(&args, &["too small", "1 GiB", "is enough"]);
}

#[test]
fn memory_too_small() {
    for size in ["1K", "1M", "2M"] {
        refuse_mem(size, &["too small", "is enough"]);
    }
}

#[test]
fn memory_more_than_the_host_has() {
    let meminfo = fs::read_to_string("/proc/meminfo").expect("read /proc/meminfo");
    let total = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .expect("MemTotal");
    let kib: u64 = total
        .trim()
        .trim_end_matches(" kB")
        .trim()
        .parse()
        .expect("a number of KiB");
    refuse_mem(&format!("{}G", (kib >> 20) + 1), &["host"]);
    refuse_mem(&format!("{}G", (kib >> 20) * 4 + 64), &["host"]);
}

#[test]
fn memory_that_is_not_whole_pages() {
    refuse_mem("134217729", &["pages"]);
}

/// KVM's limit for one memory slot: 2^31 - 1 pages, one page less than 8 TiB.
#[test]
fn memory_more_than_a_memslot() {
    refuse_mem("99T", &["slot"]);
}

/// Guest-physical addresses have at most 59 bits (Sv57x4).
#[test]
fn memory_more_than_the_address_width() {
    refuse_mem("600000T", &["address"]);
}
