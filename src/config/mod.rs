//! The configuration of a virtual machine, from flags or JSON, and its checks.

pub(crate) mod cmdline;
mod console;
mod cpu;
mod crash;
mod disk;
mod gdb;
mod keyvalue;
mod mem;
mod net;
mod sigterm;
mod trace;

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::util::ByteSize;
pub use console::ConsoleConfig;
pub use cpu::{CpuConfig, Hex, IsaSwitch, SbiConfig, SbiSwitch};
pub use crash::{CrashAct, CrashConfig};
pub use disk::{Cache, DiskConfig, DiskFormat};
pub use gdb::{GdbAddress, GdbConfig};
pub use mem::{HugePages, MemConfig};
pub use net::{Mac, NetConfig};
pub use sigterm::{SigtermAct, SigtermConfig, Time};
pub use trace::TraceConfig;

/// The configuration of a virtual machine. The fields are the flags and the keys of the JSON. Their
/// doc comments are the text of `--help`.
#[derive(Args, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmConfig {
    /// Kernel to boot
    ///
    /// A RISC-V Linux Image, a vmlinux, or another ELF file that runs in S-mode. The file may be
    /// compressed with gzip or zstd, or be an EFI zboot image.
    #[arg(help_heading = "Boot", short, long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,

    /// Format: auto, image, elf or flat
    #[arg(
        help_heading = "Boot",
        hide_short_help = true,
        hide_default_value = true,
        hide_possible_values = true,
        long,
        long_help = choices::<KernelFormat>("The format of the kernel file."),
        value_enum,
        value_name = "FORMAT",
        default_value_t
    )]
    pub kernel_format: KernelFormat,

    /// Initial RAM disk
    ///
    /// An initramfs archive for the kernel.
    #[arg(help_heading = "Boot", short, long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,

    /// Kernel command line
    ///
    /// The default is console=ttyS0: Linux uses the UART as its console. A RISC-V Linux keeps 1023
    /// bytes, the device tree takes 65536.
    #[arg(
        help_heading = "Boot",
        hide_default_value = true,
        short = 'p',
        long,
        value_name = "TEXT",
        default_value = cmdline::DEFAULT
    )]
    pub cmdline: String,

    /// RAM, such as 512M (default 128M)
    ///
    /// SIZE is in bytes, or has the suffix K, M, G or T (powers of 1024). SIZE,hugepages=2M (or 1G)
    /// takes the RAM from the host's reserved huge pages.
    #[arg(
        help_heading = "Machine",
        hide_default_value = true,
        short,
        long,
        value_name = "SIZE",
        allow_negative_numbers = true,
        default_value = "128M"
    )]
    #[serde(deserialize_with = "keyvalue::deserialize")]
    pub mem: MemConfig,

    /// Number of harts (default 1)
    ///
    /// Each hart is a virtual CPU. More harts than host CPUs share the host CPUs.
    #[arg(help_heading = "Machine", hide_default_value = true, 
        short,
        long,
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = parse_cpus,
        default_value_t = 1
    )]
    pub cpus: u32,

    /// How the harts differ from the host's
    ///
    /// NAME=off disables an ISA extension, if KVM can do that. NAME=hidden only removes it from the
    /// device tree. mvendorid, marchid and mimpid set the ids that the guest reads. Example:
    /// v=off,zbb=hidden,mvendorid=0x31,marchid=1,mimpid=2
    #[arg(help_heading = "Machine", long, value_name = "KEY=VALUE,..")]
    #[serde(
        deserialize_with = "keyvalue::deserialize_some",
        skip_serializing_if = "Option::is_none"
    )]
    pub cpu: Option<CpuConfig>,

    /// SBI extensions to disable
    ///
    /// NAME=off disables one. Example: pmu=off,sta=off
    #[arg(help_heading = "Machine", long, value_name = "NAME=off,..")]
    #[serde(
        deserialize_with = "keyvalue::deserialize_some",
        skip_serializing_if = "Option::is_none"
    )]
    pub sbi: Option<SbiConfig>,

    /// Disk: a raw image or block device
    ///
    /// Give --disk again for each further disk. Keys: readonly, direct (without the host's page
    /// cache), id=NAME, cache=writeback, writethrough or unsafe, snapshot (the guest's writes are
    /// lost when rvmm ends), snapshot-dir=DIR (where rvmm keeps those writes; default $TMPDIR, else
    /// /var/tmp or /tmp), format=raw (for an image that looks like another format). A PATH with a
    /// comma needs quotes: '"a,b.img",readonly'.
    #[arg(help_heading = "Devices", short, long, value_name = "PATH[,..]")]
    #[serde(
        deserialize_with = "keyvalue::deserialize_list",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub disk: Vec<DiskConfig>,

    /// Network interface on a host tap
    ///
    /// The guest's interface has the MTU of the tap. Give --net again for each further interface.
    /// Keys: mac=52:54:00:12:34:56, vhost (the host's kernel moves the packets).
    #[arg(help_heading = "Devices", short, long, value_name = "tap=NAME[,..]")]
    #[serde(
        deserialize_with = "keyvalue::deserialize_list",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub net: Vec<NetConfig>,

    /// Entropy source (virtio-rng)
    #[arg(help_heading = "Devices", long)]
    #[serde(skip_serializing_if = "keyvalue::is_off")]
    pub rng: bool,

    /// Second console, hvc0 in the guest
    ///
    /// A virtio-console. WHERE is none, pty, file=PATH or socket=PATH. It can be stdio if --console
    /// is not.
    #[arg(help_heading = "Devices", long, value_name = "WHERE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtio_console: Option<ConsoleConfig>,

    /// Virtio over pci (default) or mmio
    #[arg(
        help_heading = "Machine",
        hide_default_value = true,
        hide_possible_values = true,
        long,
        long_help = choices::<Transport>("How virtio devices are attached."),
        value_enum,
        value_name = "KIND",
        default_value_t
    )]
    pub transport: Transport,

    /// Interrupts: auto, aia, aia-emul, plic
    #[arg(
        help_heading = "Machine",
        hide_default_value = true,
        hide_possible_values = true,
        long,
        long_help = choices::<IrqchipKind>("The guest's interrupt controller."),
        value_enum,
        value_name = "KIND",
        default_value_t
    )]
    pub irqchip: IrqchipKind,

    /// stdio, none, pty, file=, socket=
    ///
    /// Where the guest's console goes: stdio (the default), none, pty, file=PATH or socket=PATH.
    #[arg(
        help_heading = "Devices",
        hide_default_value = true,
        long,
        value_name = "WHERE",
        default_value_t
    )]
    pub console: ConsoleConfig,

    /// kill (default) or poweroff
    ///
    /// What SIGTERM does. kill ends the machine, as a power cut would. poweroff asks the guest to
    /// power off: by its power key, or by SysRq on its UART if it has no driver for the key. If the
    /// guest does not power off, the machine ends after 30 s or at the next SIGTERM;
    /// poweroff,timeout=TIME sets another time.
    #[arg(
        help_heading = "Control",
        hide_default_value = true,
        long,
        value_name = "ACT",
        default_value_t
    )]
    #[serde(
        deserialize_with = "keyvalue::deserialize",
        skip_serializing_if = "SigtermConfig::is_default"
    )]
    pub on_sigterm: SigtermConfig,

    /// report (default), pause or reset
    ///
    /// What rvmm does if the guest cannot go on, after it has printed a report: report ends with
    /// status 122, pause pauses the machine, and reset restarts the guest. rvmm also looks for
    /// harts that use CPU time and get nowhere: in a loop on one trap, or in their kernel's panic.
    /// With report, such a guest runs on. ACT,watch=off does not look; watch=TIME sets the longest
    /// time between two looks, which is 8s.
    #[arg(
        help_heading = "Control",
        hide_default_value = true,
        long,
        value_name = "ACT",
        default_value_t
    )]
    #[serde(
        deserialize_with = "keyvalue::deserialize",
        skip_serializing_if = "CrashConfig::is_default"
    )]
    pub on_crash: CrashConfig,

    /// Symbols of the kernel, for reports
    ///
    /// FILE is an ELF file of the kernel, its System.map, or a copy of the guest's /proc/kallsyms.
    /// Without this flag, the symbols are those of --kernel if that is an ELF file.
    #[arg(
        help_heading = "Messages and reports",
        hide_short_help = true,
        long,
        value_name = "FILE"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub symbols: Option<PathBuf>,
}

/// The text of `--help` for a flag with fixed values: `about`, and a line for each value, from its
/// docs.
fn choices<T: ValueEnum + Default + PartialEq>(about: &str) -> String {
    let line = |choice: &T| {
        let value = choice.to_possible_value()?;
        let default = if *choice == T::default() {
            " (the default)"
        } else {
            ""
        };
        Some(format!(
            "\n- {}{default}: {}",
            value.get_name(),
            value.get_help()?
        ))
    };
    let lines = T::value_variants().iter().filter_map(line);
    about.to_owned() + "\n" + &lines.collect::<String>()
}

fn parse_cpus(text: &str) -> Result<u32, String> {
    let number = text.parse::<u64>();
    let number = number.map_err(|_| "write a number of harts, as in --cpus 4")?;
    // If the number is too large, `machine/harts.rs` refuses it later, and names the limit.
    Ok(u32::try_from(number).unwrap_or(u32::MAX))
}

/// The same values as the defaults of the flags.
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
            on_crash: CrashConfig::default(),
            symbols: None,
        }
    }
}

/// The format of the kernel file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelFormat {
    /// rvmm detects the format from the content
    #[default]
    Auto,
    /// A Linux Image, which may be compressed
    Image,
    /// An ELF file, which may be compressed
    Elf,
    /// Any bytes, such as U-Boot: rvmm loads them 2 MiB above the start of RAM and enters them
    /// there
    Flat,
}

/// How virtio devices are attached to the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// On a PCI bus, with MSI-X if the guest's interrupt controller is an AIA
    #[default]
    Pci,
    /// At fixed addresses (virtio-mmio), with an interrupt wire for each device; at most eight
    /// devices
    Mmio,
}

/// The interrupt controller that the guest gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IrqchipKind {
    /// The AIA if the host has one, else the PLIC
    #[default]
    Auto,
    /// KVM's AIA, with guest interrupt files if the host has them
    Aia,
    /// KVM's AIA, without guest interrupt files: KVM emulates the IMSIC
    AiaEmul,
    /// The PLIC in userspace; works on any host
    Plic,
}

/// A configuration that no host can run. Each message names the flag.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// There is no kernel.
    #[error("no kernel: give --kernel FILE")]
    NoKernel,
    /// The guest has no RAM.
    #[error("--mem 0: a guest needs RAM, as in --mem 128M")]
    NoMemory,
    /// RAM of less than 1 KiB: the user probably left out a unit.
    #[error("--mem {0}: {0} bytes are too little: write {0}M for MiB")]
    MemoryUnit(u64),
    /// The guest has no vCPU.
    #[error("--cpus 0: a guest needs a hart, as in --cpus 1")]
    NoCpus,
    /// The command line is longer than the device tree's limit.
    #[error(
        "--cmdline: {0} bytes are more than the {max} that the device tree has room for",
        max = cmdline::MAX
    )]
    CmdlineLength(usize),
    /// The size of RAM is not a multiple of the size of its huge pages.
    #[error("--mem {0}: the size is not a multiple of the huge page size")]
    HugePages(String),
    /// A path of a disk is empty.
    #[error("--disk {0}: PATH or snapshot-dir is empty")]
    DiskPath(String),
    /// The disk's name is not allowed.
    #[error("--disk id={0}: a name has 1 to 20 letters, digits, '-', '_' or '.'")]
    DiskId(String),
    /// Two disks have the same name.
    #[error("--disk id={0}: two disks have this name")]
    DiskIdTwice(String),
    /// `direct` and `snapshot` are given together.
    #[error("--disk {0:?}: direct and snapshot exclude each other: leave one out")]
    DiskDirectSnapshot(PathBuf),
    /// `snapshot-dir` is given without `snapshot`.
    #[error("--disk {0:?}: snapshot-dir needs snapshot=on: give both or none")]
    DiskSnapshotDir(PathBuf),
    /// Both consoles are on standard input and output.
    #[error("--virtio-console stdio: the UART's console uses stdio: give --console none too")]
    TwoStdio,
    /// No network interface of the host can have this name.
    #[error("--net tap={0}: an interface's name has 1 to 15 bytes, and no '/', ':' or blank")]
    TapName(String),
    /// Two interfaces have the same tap.
    #[error("--net tap={0}: two interfaces cannot share a tap")]
    TapTwice(String),
    /// Two interfaces have the same address.
    #[error("--net mac={0}: two interfaces cannot share an address")]
    MacTwice(Mac),
    /// `timeout` is given with `kill`.
    #[error("--on-sigterm kill takes no timeout: only poweroff does")]
    KillTimeout,
    /// The command line contains a NUL byte.
    #[error("--cmdline: there is a NUL byte in it, which would end it")]
    CmdlineNul,
}

impl VmConfig {
    /// Checks everything that does not depend on the host.
    ///
    /// # Errors
    /// Fails if no host can run this configuration. The error is about the first wrong value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.mem.size.bytes() == 0 {
            return Err(ConfigError::NoMemory);
        }
        // No machine has so little RAM: the user left out the M.
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

    /// The path of the kernel.
    ///
    /// # Errors
    /// Fails if no path is given, or an empty one.
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
        // The parser of the JSON accepts this, but the parser of the flag does not.
        assert_eq!(
            with(|c| {
                let json = r#"{"act":"kill","timeout":"3s"}"#;
                c.on_sigterm = serde_json::from_str(json).unwrap();
            }),
            Err(ConfigError::KillTimeout)
        );
    }
}
