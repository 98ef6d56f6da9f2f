//! What a virtual machine should be, apart from how it is made.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use thiserror::Error;

use crate::util::ByteSize;

/// Bytes of command line that a RISC-V Linux keeps, without the NUL (COMMAND_LINE_SIZE in
/// `arch/riscv/include/uapi/asm/setup.h`); it would cut off the rest in silence.
const CMDLINE_MAX: usize = 1023;

/// A virtual machine. The doc comments are the text of `--help`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// Kernel to boot: an uncompressed RISC-V Image, as Debian's /boot/vmlinux-* is
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,

    /// Initial RAM disk for the kernel, as an initramfs archive
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,

    /// Kernel command line; the default gives Linux its console
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0")]
    pub cmdline: String,

    /// Guest RAM, in bytes or with K, M, G or T (powers of 1024)
    #[arg(
        long,
        value_name = "SIZE",
        allow_negative_numbers = true,
        default_value = "128M"
    )]
    pub mem: ByteSize,

    /// Interrupt controller
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    pub irqchip: IrqchipKind,

    /// Virtual CPUs; this version runs one
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
}

/// The interrupt controller that the guest gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum IrqchipKind {
    /// The AIA where the host has it, else the PLIC
    #[default]
    Auto,
    /// The AIA in the kernel, with guest interrupt files where the host has them
    Aia,
    /// The AIA in the kernel, emulated
    AiaEmul,
    /// The PLIC in userspace, on any host
    Plic,
}

/// A configuration that no host could run. Each names its flag.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// No RAM.
    #[error("--mem 0: a guest needs RAM, as in --mem 128M")]
    NoMemory,
    /// Not one vCPU.
    #[error("--cpus {0}: this version runs one vCPU, --cpus 1")]
    Cpus(u32),
    /// Longer than Linux keeps.
    #[error("--cmdline: {0} bytes are more than the {CMDLINE_MAX} that a RISC-V Linux keeps")]
    CmdlineLength(usize),
}

impl VmConfig {
    /// Checks what can be checked without a host.
    ///
    /// # Errors
    /// The first value that no host could serve.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.mem.bytes() == 0 {
            return Err(ConfigError::NoMemory);
        }
        if self.cpus != 1 {
            return Err(ConfigError::Cpus(self.cpus));
        }
        match self.cmdline.len() {
            0..=CMDLINE_MAX => Ok(()),
            length => Err(ConfigError::CmdlineLength(length)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            kernel: "Image".into(),
            initrd: None,
            cmdline: "console=ttyS0".into(),
            mem: ByteSize::mib(128),
            irqchip: IrqchipKind::Auto,
            cpus: 1,
        }
    }

    #[test]
    fn values_no_host_could_serve_are_refused() {
        assert_eq!(config().validate(), Ok(()));
        let with = |change: fn(&mut VmConfig)| {
            let mut config = config();
            change(&mut config);
            config.validate()
        };
        assert_eq!(with(|c| c.mem = ByteSize(0)), Err(ConfigError::NoMemory));
        assert_eq!(with(|c| c.cpus = 2), Err(ConfigError::Cpus(2)));
        assert_eq!(with(|c| c.cpus = 0), Err(ConfigError::Cpus(0)));
        assert_eq!(with(|c| c.cmdline = "x".repeat(1023)), Ok(()));
        assert_eq!(
            with(|c| c.cmdline = "x".repeat(1024)),
            Err(ConfigError::CmdlineLength(1024))
        );
    }
}
