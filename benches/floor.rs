//! The floor: a VMM that does as little as possible on KVM, to measure what rvmm could still save.
//!
//! ```text
//! floor [--aia] [--hugepages] --kernel IMAGE [--initrd FILE --dtb FILE] --mem MIB
//! ```
//!
//! One thread, one vCPU, RAM with the kernel at 2 MiB, initrd and device tree where rvmm puts them,
//! and a loop on KVM_RUN. Every load reads 0x60 (a UART that is ready), a byte stored to the UART
//! goes to standard output, and every SBI call succeeds. The first system event or store to
//! sifive_test ends it. No interrupt is raised. With `--aia` it has the in-kernel AIA, set up as in
//! rvmm.
#![allow(unsafe_code)]

#[cfg(target_arch = "riscv64")]
mod aia;
#[cfg(target_arch = "riscv64")]
mod guest;

#[cfg(not(target_arch = "riscv64"))]
fn main() {
    eprintln!("floor: runs on riscv64 only");
}

#[cfg(target_arch = "riscv64")]
fn main() -> anyhow::Result<()> {
    floor::run(std::env::args().skip(1))
}

#[cfg(target_arch = "riscv64")]
mod floor {
    use std::fs::File;
    use std::io::{Read, Write};

    use anyhow::{Context, Result, bail, ensure};
    use kvm_bindings::*;
    use kvm_ioctls::{Kvm, VcpuFd, VmFd};
    use rvmm::boot::files::BootFile;
    use rvmm::boot::placement::{Placement, fdt_room};
    use rvmm::config::KernelFormat;
    use rvmm::hypervisor::regs;
    use rvmm::machine::layout::{RAM_BASE, SIFIVE_TEST, UART};
    use rvmm::util::ByteSize;

    use super::aia;
    use super::guest::{self, Cpu};

    /// The value of every load: the UART's line status with an empty transmitter.
    const READY: u64 = 0x60;
    const HUGE_PAGE: usize = 2 << 20;

    #[derive(Default)]
    struct Options {
        aia: bool,
        hugepages: bool,
        kernel: String,
        initrd: Option<String>,
        dtb: Option<String>,
        mem: u64,
    }

    fn parse(mut words: impl Iterator<Item = String>) -> Result<Options> {
        let mut options = Options::default();
        while let Some(word) = words.next() {
            let mut value = || {
                words
                    .next()
                    .with_context(|| format!("{word} needs a value"))
            };
            match word.as_str() {
                "--aia" => options.aia = true,
                "--hugepages" => options.hugepages = true,
                "--kernel" => options.kernel = value()?,
                "--initrd" => options.initrd = Some(value()?),
                "--dtb" => options.dtb = Some(value()?),
                "--mem" => options.mem = value()?.parse()?,
                _ => bail!("what is {word:?}?"),
            }
        }
        Ok(options)
    }

    pub(super) fn run(words: impl Iterator<Item = String>) -> Result<()> {
        let options = parse(words)?;
        let size = ByteSize::mib(options.mem);
        let vm = Kvm::new()?.create_vm()?;
        let ram = map_ram(&vm, usize::try_from(size.bytes())?, options.hugepages)?;
        let aia = options.aia.then(|| aia::create(&vm)).transpose()?;
        let vcpu = vm.create_vcpu(0)?;
        if let Some(aia) = aia {
            aia::start(&aia)?;
        }
        let entry = load(ram, size, &options)?;
        for (register, value) in [
            (regs::SBI_DBCN, 1),
            (regs::PC, entry.0),
            (regs::A0, 0),
            (regs::A1, entry.1),
            (regs::SCOUNTEREN, 7),
        ] {
            vcpu.set_one_reg(register.0, &u64::to_le_bytes(value))?;
        }
        exits(vcpu)
    }

    fn map_ram(vm: &VmFd, size: usize, hugepages: bool) -> Result<&'static mut [u8]> {
        let huge = if hugepages {
            libc::MAP_HUGETLB | libc::MAP_HUGE_2MB
        } else {
            0
        };
        ensure!(
            !hugepages || size % HUGE_PAGE == 0,
            "--mem in whole huge pages"
        );
        let at = guest::map_ram(vm, size, -1, libc::MAP_ANONYMOUS | huge)?;
        // SAFETY: the mapping is never unmapped, and the guest does not run before the last use.
        Ok(unsafe { std::slice::from_raw_parts_mut(at, size) })
    }

    /// Reads the files to the addresses that rvmm would choose. Returns those of the kernel and of
    /// the device tree.
    fn load(ram: &mut [u8], size: ByteSize, options: &Options) -> Result<(u64, u64)> {
        let image = BootFile::open("kernel", options.kernel.as_ref())?.kernel(
            KernelFormat::Image,
            RAM_BASE,
            size,
        )?;
        let initrd = options.initrd.as_ref().map(std::fs::metadata).transpose()?;
        let initrd_size = initrd.map(|metadata| metadata.len());
        let at = Placement::plan(RAM_BASE, size, &image, initrd_size, fdt_room(1, 0))?;
        let mut read = |path: &str, gpa: u64| -> Result<()> {
            let mut file = File::open(path).with_context(|| path.to_owned())?;
            let (start, length) = (usize::try_from(gpa - RAM_BASE)?, file.metadata()?.len());
            file.read_exact(&mut ram[start..start + usize::try_from(length)?])?;
            Ok(())
        };
        read(&options.kernel, at.kernel.start)?;
        if let (Some(path), Some(range)) = (&options.initrd, &at.initrd) {
            read(path, range.start)?;
        }
        if let Some(path) = &options.dtb {
            read(path, at.fdt.start)?;
        }
        Ok((at.kernel.start, at.fdt.start))
    }

    /// The loop. Work that belongs to no exit is outside.
    fn exits(vcpu: VcpuFd) -> Result<()> {
        let mut cpu = Cpu::new(vcpu);
        let mut stdout = std::io::stdout();
        loop {
            let run = cpu.run()?;
            let exit = &mut run.__bindgen_anon_1;
            match run.exit_reason {
                KVM_EXIT_MMIO => {
                    // SAFETY: the member that belongs to the exit reason.
                    let mmio = unsafe { &mut exit.mmio };
                    if mmio.is_write == 0 {
                        mmio.data = READY.to_le_bytes();
                    } else if mmio.phys_addr == UART.start {
                        stdout.write_all(&mmio.data[..1])?;
                        stdout.flush()?;
                    } else if mmio.phys_addr == SIFIVE_TEST.start {
                        // Linux tries this first when it powers off, and waits a second before it
                        // tries SBI.
                        return Ok(());
                    }
                }
                KVM_EXIT_RISCV_SBI => exit.riscv_sbi.ret = [0, 0],
                KVM_EXIT_SYSTEM_EVENT => {
                    // SAFETY: the member that belongs to the exit reason.
                    let kind = unsafe { exit.system_event.type_ };
                    ensure!(kind == KVM_SYSTEM_EVENT_SHUTDOWN, "system event {kind}");
                    return Ok(());
                }
                reason => bail!("exit {reason}"),
            }
        }
    }
}
