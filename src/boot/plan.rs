//! Opens a guest's boot files and plans where each goes in RAM. This makes no call to KVM, so rvmm
//! reports a wrong file before it creates a VM.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use log::warn;

use super::files::BootFile;
use super::kernel::Kernel;
use super::placement::{Placement, fdt_room, scarce};
use crate::config::{VmConfig, cmdline};
use crate::util::{RateLimit, guest_debug};

/// The open kernel and initrd files. They stay open, because a reset loads them again.
pub(crate) struct BootFiles {
    pub(super) kernel: BootFile,
    pub(super) initrd: Option<BootFile>,
    /// The file of `--symbols`.
    symbols: Option<BootFile>,
}

/// The parsed kernel, and where kernel, initrd and device tree go in RAM.
pub(crate) struct Plan {
    pub(super) kernel: Kernel,
    pub(super) placement: Placement,
    /// Guest-physical address of the start of RAM.
    pub(super) ram_base: u64,
}

impl BootFiles {
    /// Opens the files that `config` names.
    ///
    /// # Errors
    /// Fails if `config` names no kernel, if a file cannot be opened or is not a regular file, or
    /// if the initrd is empty.
    pub(crate) fn open(config: &VmConfig) -> Result<Self> {
        let kernel = BootFile::open("kernel", config.kernel()?)?;
        let initrd = match &config.initrd {
            Some(path) => Some(BootFile::open("initrd", path)?.not_empty()?),
            None => None,
        };
        let symbols = match &config.symbols {
            Some(path) => Some(BootFile::open("symbols", path)?.not_empty()?),
            None => None,
        };
        Ok(Self {
            kernel,
            initrd,
            symbols,
        })
    }

    /// The file with the symbols of the kernel, from its start: the file of `--symbols`, or else
    /// the kernel's.
    ///
    /// # Errors
    /// Fails if the file cannot be read.
    pub(crate) fn symbols(&self) -> Result<(&Path, &File)> {
        let file = self.symbols.as_ref().unwrap_or(&self.kernel);
        Ok((file.path(), file.rewound()?))
    }

    /// Plans where kernel, initrd and device tree go in RAM that starts at `ram_base`.
    ///
    /// # Errors
    /// Fails if the kernel's file cannot be read or is not a kernel that rvmm can load, or if RAM
    /// is too small.
    pub(crate) fn plan(&self, config: &VmConfig, ram_base: u64) -> Result<Plan> {
        let size = config.mem.size;
        let kernel = self.kernel.kernel(config.kernel_format, ram_base, size)?;
        let initrd = self.initrd.as_ref().map(BootFile::size);
        let room = fdt_room(config.cpus, config.cmdline.len());
        let placement = Placement::plan(ram_base, size, &kernel, initrd, room)
            .with_context(|| format!("Failed to load kernel {:?}", self.kernel.path()))?;
        guest_debug!(RateLimit::named("placement"), "placement: {placement:x?}");
        Ok(Plan {
            kernel,
            placement,
            ram_base,
        })
    }
}

impl Plan {
    /// Where the files go.
    pub(crate) fn placement(&self) -> &Placement {
        &self.placement
    }

    /// Warns if the guest probably has too little RAM, or if Linux will cut off the command line.
    /// rvmm runs the guest in both cases.
    pub(crate) fn warn_of_limits(&self, config: &VmConfig) {
        let long_cmdline = cmdline::warning(&config.cmdline, self.kernel.is_linux);
        let warnings = [self.little_ram(config), long_cmdline];
        warnings.iter().flatten().for_each(|line| warn!("{line}"));
    }

    fn little_ram(&self, config: &VmConfig) -> Option<String> {
        let size = config.mem.size;
        let enough = scarce(size, &self.placement, self.ram_base)?;
        Some(format!(
            "--mem {} is small for this kernel and initrd: the guest may fail without any output; \
             --mem {} is probably enough",
            size.as_flag(),
            enough.as_flag()
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::kernel::Segment;
    use crate::config::MemConfig;
    use crate::util::ByteSize;

    const BASE: u64 = 0x8000_0000;

    /// A machine whose kernel is the file LICENSE of this repository, as a flat binary.
    fn flat(initrd: Option<&str>) -> VmConfig {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        VmConfig {
            kernel: Some(root.join("LICENSE")),
            kernel_format: crate::config::KernelFormat::Flat,
            initrd: initrd.map(|name| root.join(name)),
            ..VmConfig::default()
        }
    }

    #[test]
    fn files_are_placed_from_the_start_of_ram() {
        let config = flat(Some("README.md"));
        let files = BootFiles::open(&config).unwrap();
        for base in [BASE, 0x1_0000_0000] {
            let plan = files.plan(&config, base).unwrap();
            assert_eq!(plan.ram_base, base);
            assert_eq!(plan.placement.entry, base + (2 << 20));
            let initrd = plan.placement.initrd.unwrap();
            assert!(initrd.end <= base + config.mem.size.bytes());
        }
    }

    #[test]
    fn too_little_ram_names_the_kernel() {
        let config = VmConfig {
            mem: MemConfig::new(ByteSize::mib(1)),
            ..flat(None)
        };
        let plan = BootFiles::open(&config).unwrap().plan(&config, BASE);
        let line = format!("{:#}", plan.err().unwrap());
        assert!(line.starts_with("Failed to load kernel \"/"), "{line}");
        assert!(line.contains("guest RAM of 1 MiB is too small"), "{line}");
    }

    /// A kernel of 30 MiB.
    fn large() -> Plan {
        let segment = Segment {
            source: 0..30 << 20,
            at: 2 << 20,
            size: 30 << 20,
        };
        let kernel = Kernel {
            segments: vec![segment],
            entry: 2 << 20,
            is_linux: true,
            expanded: None,
        };
        let size = ByteSize::mib(128);
        Plan {
            placement: Placement::plan(BASE, size, &kernel, None, fdt_room(1, 0)).unwrap(),
            kernel,
            ram_base: BASE,
        }
    }

    #[test]
    fn little_ram_is_warned_of() {
        let with = |mib| VmConfig {
            mem: MemConfig::new(ByteSize::mib(mib)),
            ..VmConfig::default()
        };
        assert_eq!(large().little_ram(&with(128)), None);
        assert_eq!(
            large().little_ram(&with(64)).unwrap(),
            "--mem 64M is small for this kernel and initrd: the guest may fail without any output; \
             --mem 128M is probably enough"
        );
    }
}
