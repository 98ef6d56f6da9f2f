//! What a virtual machine should be, apart from how it is made.

pub(crate) mod cmdline;
mod console;
mod cpu;
mod disk;
mod keyvalue;
mod mem;
mod net;
mod sigterm;

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::util::ByteSize;
pub use console::ConsoleConfig;
pub use cpu::{CpuConfig, Hex, IsaSwitch, SbiConfig, SbiSwitch};
pub use disk::{Cache, DiskConfig, DiskFormat};
pub use mem::{HugePages, MemConfig};
pub use net::{Mac, NetConfig};
pub use sigterm::{SigtermAct, SigtermConfig, Time};

/// A virtual machine: its flags, its JSON, and, in the doc comments, the text of `--help`.
#[derive(Args, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmConfig {
    /// Kernel to boot: a RISC-V Linux Image, also in gzip, zstd or EFI zboot, a vmlinux, or an
    /// S-mode ELF
    #[arg(short, long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,

    /// What the kernel's file is
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t)]
    pub kernel_format: KernelFormat,

    /// Initial RAM disk for the kernel, as an initramfs archive
    #[arg(short, long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,

    /// Kernel command line; the default gives Linux its console. A RISC-V Linux keeps 1023 bytes,
    /// the device tree takes 65536
    #[arg(short = 'p', long, value_name = "TEXT", default_value = cmdline::DEFAULT)]
    pub cmdline: String,

    /// Guest RAM, in bytes or with K, M, G or T (powers of 1024); SIZE,hugepages=2M (or 1G) takes
    /// it from the host's reserved huge pages
    #[arg(
        short,
        long,
        value_name = "SIZE",
        allow_negative_numbers = true,
        default_value = "128M"
    )]
    #[serde(deserialize_with = "keyvalue::deserialize")]
    pub mem: MemConfig,

    /// Virtual CPUs, as many harts; they may be more than the host's, and then share its CPUs
    #[arg(
        short,
        long,
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = parse_cpus,
        default_value_t = 1
    )]
    pub cpus: u32,

    /// How the harts differ from the host's: NAME=off takes an ISA extension away where KVM can,
    /// NAME=hidden only from the device tree; ids to report, as in
    /// v=off,zbb=hidden,mvendorid=0x31,marchid=1,mimpid=2
    #[arg(long, value_name = "KEY=VALUE,...")]
    #[serde(
        deserialize_with = "keyvalue::deserialize_some",
        skip_serializing_if = "Option::is_none"
    )]
    pub cpu: Option<CpuConfig>,

    /// SBI extensions to take away: NAME=off, as in pmu=off,sta=off
    #[arg(long, value_name = "NAME=off,...")]
    #[serde(
        deserialize_with = "keyvalue::deserialize_some",
        skip_serializing_if = "Option::is_none"
    )]
    pub sbi: Option<SbiConfig>,

    /// A disk: a raw image or a block device. readonly, direct (past the host's page cache), id=NAME,
    /// cache=writeback, writethrough or unsafe, snapshot (what is written ends with rvmm),
    /// snapshot-dir=DIR (where that is kept; $TMPDIR, else /var/tmp or /tmp), format=raw (for an
    /// image that looks like another format); give more --disk for more
    #[arg(short, long, value_name = "PATH[,KEY=VALUE,...]")]
    #[serde(
        deserialize_with = "keyvalue::deserialize_list",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub disk: Vec<DiskConfig>,

    /// A network interface on a tap of the host, with its MTU: tap=NAME; mac=52:54:00:12:34:56, vhost
    /// (the host's kernel moves the packets); give more --net for more
    #[arg(short, long, value_name = "tap=NAME[,KEY=VALUE,...]")]
    #[serde(
        deserialize_with = "keyvalue::deserialize_list",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub net: Vec<NetConfig>,

    /// An entropy source (virtio-rng)
    #[arg(long)]
    #[serde(skip_serializing_if = "keyvalue::is_off")]
    pub rng: bool,

    /// A second console (virtio-console, the guest's hvc0): none, pty, file=PATH, socket=PATH, or
    /// stdio with --console none
    #[arg(long, value_name = "WHERE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtio_console: Option<ConsoleConfig>,

    /// How virtio devices are attached
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    pub transport: Transport,

    /// Interrupt controller
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    pub irqchip: IrqchipKind,

    /// Where the guest's console goes: stdio, none, pty, file=PATH or socket=PATH
    #[arg(long, value_name = "WHERE", default_value_t)]
    pub console: ConsoleConfig,

    /// What SIGTERM does: kill ends the machine as a power cut does; poweroff asks the guest to power
    /// off, by a power key or else by SysRq on its UART, and ends the machine after timeout=TIME
    /// (30s) or at the next SIGTERM
    #[arg(long, value_name = "kill|poweroff[,timeout=TIME]", default_value_t)]
    #[serde(
        deserialize_with = "keyvalue::deserialize",
        skip_serializing_if = "SigtermConfig::is_default"
    )]
    pub on_sigterm: SigtermConfig,
}

fn parse_cpus(text: &str) -> Result<u32, String> {
    let number = text.parse::<u64>();
    let number = number.map_err(|_| "write a number of harts, as in --cpus 4")?;
    // What is too much for any machine is told later.
    Ok(u32::try_from(number).unwrap_or(u32::MAX))
}

/// The same as the flags' defaults.
impl Default for VmConfig {
    fn default() -> Self {
        Self {
            kernel: None,
            kernel_format: KernelFormat::default(),
            initrd: None,
            cmdline: cmdline::DEFAULT.into(),
            mem: MemConfig::new(ByteSize::mib(128)),
            cpus: 1,
            cpu: None,
            sbi: None,
            disk: Vec::new(),
            net: Vec::new(),
            rng: false,
            virtio_console: None,
            transport: Transport::default(),
            irqchip: IrqchipKind::default(),
            console: ConsoleConfig::default(),
            on_sigterm: SigtermConfig::default(),
        }
    }
}

/// What a kernel's file is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelFormat {
    /// Told by its content
    #[default]
    Auto,
    /// A Linux Image, maybe compressed
    Image,
    /// An ELF file, maybe compressed
    Elf,
    /// Any bytes: loaded 2 MiB into RAM and entered there, as U-Boot is
    Flat,
}

/// How virtio devices are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// On a PCI bus, with a message for each queue where the host can deliver it
    #[default]
    Pci,
    /// Registers at fixed addresses and a wire each, at most eight
    Mmio,
}

/// The interrupt controller that the guest gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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
    /// No kernel.
    #[error("no kernel: give --kernel FILE")]
    NoKernel,
    /// No RAM.
    #[error("--mem 0: a guest needs RAM, as in --mem 128M")]
    NoMemory,
    /// Bytes where MiB were meant.
    #[error("--mem {0}: that is {0} bytes: write {0}M for MiB")]
    MemoryUnit(u64),
    /// No vCPU.
    #[error("--cpus 0: a guest needs a hart, as in --cpus 1")]
    NoCpus,
    /// More than the device tree takes.
    #[error(
        "--cmdline: {0} bytes are more than the {max} that the device tree has room for",
        max = cmdline::MAX
    )]
    CmdlineLength(usize),
    /// No page of the size that is asked for.
    #[error("--mem {0}: RAM is no multiple of its huge pages")]
    HugePages(String),
    /// No image.
    #[error("--disk {0}: no PATH, or an empty one")]
    DiskPath(String),
    /// A name that a disk cannot carry.
    #[error("--disk id={0}: a name has 1 to 20 letters, digits, '-', '_' or '.'")]
    DiskId(String),
    /// Two disks of one name.
    #[error("--disk id={0}: two disks have this name")]
    DiskIdTwice(String),
    /// What excludes each other.
    #[error("--disk {0:?}: direct has no meaning with snapshot: leave one out")]
    DiskDirectSnapshot(PathBuf),
    /// A place for what is not there.
    #[error("--disk {0:?}: snapshot-dir has no meaning without snapshot=on: give both or none")]
    DiskSnapshotDir(PathBuf),
    /// Two consoles for one terminal.
    #[error("--virtio-console stdio: the UART's console is there already: give --console none too")]
    TwoStdio,
    /// What no interface is called.
    #[error("--net tap={0}: an interface's name has 1 to 15 bytes, and no '/', ':' or blank")]
    TapName(String),
    /// One tap for two interfaces.
    #[error("--net tap={0}: two interfaces cannot share a tap")]
    TapTwice(String),
    /// One address for two interfaces.
    #[error("--net mac={0}: two interfaces cannot share an address")]
    MacTwice(Mac),
    /// A time for nothing.
    #[error("--on-sigterm kill needs no time: timeout belongs to poweroff")]
    KillTimeout,
    /// What no command line can hold.
    #[error("--cmdline: a NUL byte would end it")]
    CmdlineNul,
}

impl VmConfig {
    /// Checks what can be checked without a host.
    ///
    /// # Errors
    /// The first value that no host could serve.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.mem.size.bytes() == 0 {
            return Err(ConfigError::NoMemory);
        }
        // No machine has so little, and people leave out the M.
        if self.mem.size < ByteSize::kib(1) {
            return Err(ConfigError::MemoryUnit(self.mem.size.bytes()));
        }
        let page = self.mem.hugepages.map_or(1, |pages| pages.size().bytes());
        if self.mem.size.bytes() % page != 0 {
            return Err(ConfigError::HugePages(self.mem.to_string()));
        }
        if self.cpus == 0 {
            return Err(ConfigError::NoCpus);
        }
        disk::validate(&self.disk)?;
        net::validate(&self.net)?;
        if [Some(&self.console), self.virtio_console.as_ref()] == [Some(&ConsoleConfig::Stdio); 2] {
            return Err(ConfigError::TwoStdio);
        }
        if self.on_sigterm.has_idle_timeout() {
            return Err(ConfigError::KillTimeout);
        }
        cmdline::validate(&self.cmdline)?;
        self.kernel().map(drop)
    }

    /// The kernel's file.
    ///
    /// # Errors
    /// None was given.
    pub fn kernel(&self) -> Result<&Path, ConfigError> {
        let kernel = self.kernel.as_deref();
        let named = kernel.filter(|path| !path.as_os_str().is_empty());
        named.ok_or(ConfigError::NoKernel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_no_host_could_serve_are_refused() {
        let with = |change: fn(&mut VmConfig)| {
            let mut config = VmConfig {
                kernel: Some("Image".into()),
                ..VmConfig::default()
            };
            change(&mut config);
            config.validate()
        };
        assert_eq!(with(|_| ()), Ok(()));
        assert_eq!(with(|c| c.kernel = None), Err(ConfigError::NoKernel));
        assert_eq!(
            with(|c| c.mem.size = ByteSize(0)),
            Err(ConfigError::NoMemory)
        );
        assert_eq!(with(|c| c.cpus = 0), Err(ConfigError::NoCpus));
        assert_eq!(
            with(|c| c.mem.size = ByteSize(256)),
            Err(ConfigError::MemoryUnit(256))
        );
        assert_eq!(
            with(|c| c.cmdline = "a\0b".into()),
            Err(ConfigError::CmdlineNul)
        );
        // JSON can say what the flag cannot.
        assert_eq!(
            with(|c| {
                let json = r#"{"act":"kill","timeout":"3s"}"#;
                c.on_sigterm = serde_json::from_str(json).unwrap();
            }),
            Err(ConfigError::KillTimeout)
        );
    }
}
