//! Kernels in every format that rvmm supports, and files that only look like one.
#![cfg(target_arch = "riscv64")]
#![allow(unsafe_code)]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::files::TempDir;
use crate::common::{HOST_FAILED, Outcome, POWERED_OFF, Rvmm, USAGE, files, nonce};
use flate2::Compression;
use flate2::write::GzEncoder;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("gzip");
    encoder.finish().expect("gzip")
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 1).expect("zstd")
}

/// EFI zboot, with the header of `drivers/firmware/efi/libstub/zboot-header.S`.
fn zboot(compression: &str, payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    let size = u32::try_from(payload.len()).expect("less than 4 GiB");
    for (at, bytes) in [
        (0, &b"MZ\0\0zimg"[..]),
        (8, &0x1000u32.to_le_bytes()),
        (12, &size.to_le_bytes()),
        (24, compression.as_bytes()),
        (56, &[0xcd, 0x23, 0x82, 0x81]),
    ] {
        file[at..at + bytes.len()].copy_from_slice(bytes);
    }
    file.extend(payload);
    file
}

/// Boots Linux from `kernel` to its userspace.
fn linux(kernel: &Path) {
    let nonce = nonce();
    let cmdline = format!("console=ttyS0 quiet panic=-1 rvmm.nonce={nonce}");
    let end = Rvmm::new()
        .args(["-v", "--no-reboot", "--kernel"])
        .arg(kernel)
        .arg("--initrd")
        .arg(files::initramfs())
        .args(["--cmdline", &cmdline, "--mem", "192M"])
        .run();
    assert!(
        end.console
            .contains(&format!("userspace nonce={nonce} sbi-impl=3"))
    );
    end.assert_status(POWERED_OFF);
}

#[test]
fn image_in_gzip() {
    let dir = TempDir::new();
    let image = fs::read(files::kernel()).expect("the kernel");
    linux(&dir.file("Image.gz", gzip(&image)));
}

#[test]
fn image_in_zstd() {
    let dir = TempDir::new();
    let image = fs::read(files::kernel()).expect("the kernel");
    linux(&dir.file("Image.zst", zstd(&image)));
}

#[test]
fn image_in_zboot() {
    let dir = TempDir::new();
    let image = fs::read(files::kernel()).expect("the kernel");
    linux(&dir.file("vmlinuz.efi", zboot("zstd", &zstd(&image))));
}

/// A compressed kernel is decompressed again after each reset.
#[test]
fn a_compressed_kernel_reboots() {
    let dir = TempDir::new();
    let guest = fs::read(files::guest("lives")).expect("the guest");
    for (name, file) in [
        ("lives.gz", gzip(&guest)),
        ("lives.zst", zstd(&guest)),
        ("lives.efi", zboot("gzip", &gzip(&guest))),
    ] {
        let path = dir.file(name, file);
        let mut vm = Rvmm::new().arg("-v").arg("--kernel").arg(path).spawn();
        vm.send("c\np\n");
        vm.wait_for("life: c\n");
        vm.finish().assert_status(POWERED_OFF);
    }
}

fn elf_of(name: &str) -> PathBuf {
    files::guest(name).with_extension("elf")
}

#[test]
fn elf_at_its_physical_addresses() {
    for (name, file) in [
        ("plain", None),
        (
            "gzip",
            Some(gzip(&fs::read(elf_of("firstbyte")).expect("the ELF"))),
        ),
    ] {
        let dir = TempDir::new();
        let path = file.map_or(elf_of("firstbyte"), |bytes| dir.file("kernel", bytes));
        let end = Rvmm::new().arg("--kernel").arg(path).run();
        assert_eq!(end.console, "!", "{name}");
        end.assert_status(POWERED_OFF);
    }
}

/// Patches an ELF into the form of a RISC-V vmlinux: physical addresses count from 0, and
/// everything else is virtual.
#[test]
fn elf_as_vmlinux_is() {
    const LOW: u64 = 0x8020_0000;
    const HIGH: u64 = 0xffff_ffff_8000_0000;
    let mut elf = fs::read(elf_of("console")).expect("the ELF");
    let word =
        |elf: &[u8], at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().expect("8 bytes"));
    let mut put = |at: usize, value: u64| elf[at..at + 8].copy_from_slice(&value.to_le_bytes());
    let before = fs::read(elf_of("console")).expect("the ELF");
    put(24, word(&before, 24) - LOW + HIGH);
    let count = u16::from_le_bytes([before[56], before[57]]);
    for index in 0..usize::from(count) {
        let header = usize::try_from(word(&before, 32)).expect("small") + 56 * index;
        put(header + 16, word(&before, header + 16) - LOW + HIGH);
        put(header + 24, word(&before, header + 24) - LOW);
    }
    let dir = TempDir::new();
    let path = dir.file("vmlinux", &elf);
    let end = Rvmm::new()
        .arg("--kernel")
        .arg(path)
        .args(["--mem", "128M"])
        .run();
    assert!(end.console.contains("hart=0 fdt=ok"));
    end.assert_status(POWERED_OFF);
}

/// The guest gets every byte of a command line that Linux would cut off.
#[track_caller]
fn assert_cmdline_whole(rvmm: Rvmm, cmdline: &str) -> Outcome {
    let end = rvmm.run();
    end.assert_console(POWERED_OFF, &[&format!("bootargs: {cmdline}")]);
    end
}

/// A command line of `length` bytes that ends with a nonce.
fn cmdline(length: usize) -> String {
    let nonce = nonce();
    format!("{}{nonce}", "x".repeat(length - nonce.len()))
}

#[test]
fn a_long_command_line() {
    let (image, elf) = (files::guest("bootargs"), elf_of("bootargs"));
    for (kernel, format, warned) in [
        (&image, "flat", false),
        (&elf, "elf", false),
        (&image, "image", true),
    ] {
        let cmdline = cmdline(1100);
        let rvmm = Rvmm::new().args(["--kernel-format", format, "--cmdline", &cmdline]);
        let end = assert_cmdline_whole(rvmm.arg("--kernel").arg(kernel), &cmdline);
        assert_eq!(end.log.lines().count(), usize::from(warned), "{}", end.log);
        let names_both = end.log.contains("1100 bytes") && end.log.contains("keeps 1023");
        assert_eq!(names_both, warned, "{}", end.log);
    }
    // No warning if the command line is not too long.
    let cmdline = cmdline(1023);
    let end = assert_cmdline_whole(
        Rvmm::new()
            .args(["--cmdline", &cmdline, "--kernel"])
            .arg(&image),
        &cmdline,
    );
    assert_eq!(end.log, "");
}

/// The longest command line that rvmm accepts, as a flag and in JSON.
#[test]
fn the_longest_command_line() {
    let elf = elf_of("bootargs");
    let cmdline = cmdline(65536);
    let by_flag = Rvmm::new().args(["--cmdline", &cmdline, "--kernel"]);
    let end = assert_cmdline_whole(by_flag.arg(&elf), &cmdline);
    assert_eq!(end.log, "");
    let dir = TempDir::new();
    let config = dir.file("vm.json", format!(r#"{{ "cmdline": "{cmdline}" }}"#));
    let by_file = Rvmm::new().arg("--config").arg(config).arg("--kernel");
    let end = assert_cmdline_whole(by_file.arg(&elf), &cmdline);
    assert_eq!(end.log, "");
}

#[test]
fn a_command_line_longer_than_the_tree_takes() {
    let cmdline = "x".repeat(65537);
    let words = ["--cmdline", "65537", "65536", "device tree"];
    let end = Rvmm::new()
        .args(["--cmdline", &cmdline, "--kernel"])
        .arg(files::guest("bootargs"))
        .run();
    end.assert_one_line(USAGE, &words);
    let dir = TempDir::new();
    let config = dir.file("vm.json", format!(r#"{{ "cmdline": "{cmdline}" }}"#));
    let end = Rvmm::new()
        .arg("--config")
        .arg(config)
        .arg("--kernel")
        .arg(files::guest("bootargs"))
        .run();
    end.assert_one_line(USAGE, &words);
}

/// Debian's U-Boot for S-mode, a flat binary linked for RAM + 2 MiB. It reaches its prompt and runs
/// a command.
#[test]
fn u_boot() {
    let mut vm = Rvmm::new()
        .args(["-v", "--kernel-format", "flat", "--mem", "256M", "--kernel"])
        .arg(files::guest("u-boot"))
        .spawn();
    vm.wait_for("Hit any key to stop autoboot");
    vm.send("\n");
    vm.wait_for("\r\n=> ");
    vm.send("printenv arch\n");
    vm.wait_for("arch=riscv");
    vm.send("poweroff\n");
    vm.finish().assert_status(POWERED_OFF);
}

/// RAM of the guests below, and the limit for rvmm's resident memory, both in KiB.
const RAM_KIB: i64 = 64 << 10;
const PEAK_KIB: i64 = RAM_KIB + (16 << 10);
const BOMB: u64 = 10 << 30;

/// Runs rvmm on `kernel`. Returns its exit status, its messages, and its peak RSS in KiB.
#[allow(clippy::zombie_processes, reason = "wait4 waits for it")]
fn peak(kernel: &Path) -> (i32, String, i64) {
    let mut command = Command::new(files::rvmm());
    command.arg("--kernel").arg(kernel).args(["--mem", "64M"]);
    let child = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("rvmm");
    let pid = libc::pid_t::try_from(child.id()).expect("a pid");
    let log = std::io::read_to_string(child.stderr.expect("a pipe")).expect("its messages");
    let mut status = 0;
    // SAFETY: rusage is plain integers.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to living values of the right type.
    let waited = unsafe { libc::wait4(pid, &mut status, 0, &mut usage) };
    assert_eq!(waited, pid);
    (libc::WEXITSTATUS(status), log, usage.ru_maxrss)
}

#[track_caller]
fn assert_defused(file: Vec<u8>, compression: &str) {
    let dir = TempDir::new();
    let size = file.len();
    let (status, log, peak) = peak(&dir.file("bomb", file));
    println!("{size} bytes: {log}peak {peak} KiB");
    assert_eq!(status, HOST_FAILED);
    assert_eq!(log.lines().count(), 1, "{log}");
    for word in ["bomb", compression, "guest RAM (64 MiB)", "--mem"] {
        assert!(log.contains(word), "{log}");
    }
    assert!(peak <= PEAK_KIB, "{peak} KiB");
}

/// 10 MB of gzip that decompress to 10 GiB of zeros: one deflate block of 1 MiB, again and again.
#[test]
fn a_gzip_bomb_is_defused() {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(&[0; 1 << 20]).expect("gzip");
    encoder.flush().expect("gzip");
    let header = encoder.get_ref().len();
    encoder.write_all(&[0; 1 << 20]).expect("gzip");
    encoder.flush().expect("gzip");
    let both = encoder.get_ref().clone();
    let block = &both[header..];
    let mut bomb = both[..header].to_vec();
    for _ in 1..BOMB >> 20 {
        bomb.extend_from_slice(block);
    }
    assert_defused(bomb, "gzip");
}

/// 0.3 MB of zstd that decompress to 10 GiB of zeros: RLE blocks of 128 KiB (RFC 8878, section
/// 3.1.1.2).
#[test]
fn a_zstd_bomb_is_defused() {
    const BLOCK: u64 = 128 << 10;
    // With a window of 1 MiB, and with one of 128 MiB, which rvmm must not allocate.
    for window in [0x50, 0x88] {
        let mut bomb = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, window];
        for _ in 1..BOMB / BLOCK {
            bomb.extend([0x02, 0x00, 0x10, 0x00]);
        }
        bomb.extend([0x03, 0x00, 0x10, 0x00]);
        assert_defused(bomb, "zstd");
    }
}
