//! Checks of the host. If it cannot run guests, the error says why, and what to do.

use std::fs;
use std::io;
use std::ops::Range;

use rustix::system::uname;
use thiserror::Error;

/// The reason why a host cannot run guests. Each message is one line: what is missing, and what to
/// do.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Unfit {
    /// rvmm was built for another architecture than RISC-V.
    #[error(
        "rvmm needs a 64-bit RISC-V host with the H extension, and this machine is {0}: \
         scripts/demo in rvmm's source tree runs it nested in QEMU"
    )]
    NotRiscv(&'static str),
    /// The harts have no H extension.
    #[error(
        "Failed to open /dev/kvm: this machine's harts have no H extension (/proc/cpuinfo), which \
         KVM needs: scripts/demo in rvmm's source tree runs rvmm nested in QEMU"
    )]
    NoHypervisorExtension,
    /// The harts have the H extension, but there is no /dev/kvm.
    #[error("Failed to open /dev/kvm: there is none; load KVM with `modprobe kvm` as root")]
    NoModule,
    /// The user may not open /dev/kvm.
    #[error(
        "Failed to open /dev/kvm: no permission; join its group with `usermod -aG kvm $USER` \
         as root and log in again"
    )]
    NoPermission,
    /// /dev/kvm cannot be opened for another reason.
    #[error("Failed to open /dev/kvm: {0}")]
    Other(String),
    /// The version of KVM's API is not 12, which every Linux since 2.6.22 has.
    #[error("/dev/kvm speaks KVM API version {0}, not 12: this kernel cannot run rvmm")]
    ApiVersion(i32),
}

/// Explains why /dev/kvm cannot be opened. `error` is the error of open(2), `cpuinfo` the content
/// of /proc/cpuinfo.
pub fn explain_open(error: &io::Error, cpuinfo: &str) -> Unfit {
    match error.kind() {
        io::ErrorKind::PermissionDenied => Unfit::NoPermission,
        io::ErrorKind::NotFound if !has_h_extension(cpuinfo) => Unfit::NoHypervisorExtension,
        io::ErrorKind::NotFound => Unfit::NoModule,
        // ENXIO (6), ENODEV (19): the device node exists, but the kernel has no driver for it.
        _ if matches!(error.raw_os_error(), Some(6 | 19)) => Unfit::NoModule,
        _ => Unfit::Other(error.to_string()),
    }
}

/// Whether the `isa` line of the first hart has the single letter h. True if there is no such line,
/// as with ACPI or on much older kernels: then only KVM itself can know.
fn has_h_extension(cpuinfo: &str) -> bool {
    let isa = cpuinfo.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "isa").then_some(value.trim())
    });
    let Some(letters) = isa.and_then(|isa| isa.split('_').next()) else {
        return true;
    };
    letters.trim_start_matches("rv64").contains('h')
}

/// The release of the host's kernel, as `uname -r` prints it.
pub(crate) fn kernel_release() -> String {
    uname().release().to_string_lossy().into_owned()
}

/// Whether rvmm may give a guest KVM's legacy SBI calls, on a host with this kernel release.
///
/// If KVM is built with these calls (CONFIG_RISCV_SBI_V01), kernels before 7.2 dereference a null
/// pointer when a guest sends a legacy IPI to a hart that does not exist (`vcpu_sbi_v01.c`).
pub fn legacy_sbi_is_safe(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0u32));
    let version = (numbers.next(), numbers.next());
    version >= (Some(7), Some(2))
}

/// The addresses of the module `kvm` in the host's kernel. `None` if KVM is built in, or if the
/// kernel hides addresses from this user (`kernel.kptr_restrict`).
pub fn kvm_module() -> Option<Range<u64>> {
    parse_modules(&fs::read_to_string("/proc/modules").ok()?)
}

/// The addresses of the module `kvm`, from the content of /proc/modules. The fields of a line are:
/// name, size, use count, users, state, address.
fn parse_modules(modules: &str) -> Option<Range<u64>> {
    let line = modules.lines().find(|line| line.starts_with("kvm "))?;
    let mut words = line.split_whitespace().skip(1);
    let size = words.next()?.parse::<u64>().ok()?;
    let address = words.nth(3)?.strip_prefix("0x")?;
    let start = u64::from_str_radix(address, 16).ok()?;
    (start != 0).then_some(start..start.checked_add(size)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legacy_calls_wait_for_linux_7_2() {
        for safe in ["7.2.13-riscv64", "7.10", "8.0.1"] {
            assert!(legacy_sbi_is_safe(safe), "{safe}");
        }
        for unsafe_ in ["6.12.107+deb13-riscv64", "7.1.9", "6.99", "7", "", "next"] {
            assert!(!legacy_sbi_is_safe(unsafe_), "{unsafe_}");
        }
    }

    #[test]
    fn the_module_is_found_where_its_address_is_shown() {
        let text = |address| {
            format!(
                "kvm_other 4096 0 - Live 0xffffffff01000000\nkvm 217088 0 - Live {address}\n\
                 virtio_blk 20480 0 - Live 0xffffffff02000000\n"
            )
        };
        let shown = parse_modules(&text("0xffffffff01a2b000"));
        assert_eq!(shown, Some(0xffff_ffff_01a2_b000..0xffff_ffff_01a6_0000));
        for hidden in [
            text("0x0000000000000000"),
            text("?"),
            "kvm\n".into(),
            String::new(),
        ] {
            assert_eq!(parse_modules(&hidden), None, "{hidden}");
        }
    }

    const WITH_H: &str = "processor\t: 0\nhart\t\t: 1\nisa\t\t: rv64imafdch_zicsr_ssaia\n";
    const WITHOUT: &str = "processor\t: 0\nhart\t\t: 1\nisa\t\t: rv64imafdc_zihpm_svinvalh\n";

    #[test]
    fn the_missing_piece_is_named() {
        let gone = io::Error::from_raw_os_error(2);
        let denied = io::Error::from_raw_os_error(13);
        let no_device = io::Error::from_raw_os_error(19);
        let busy = io::Error::from_raw_os_error(16);
        for (error, cpuinfo, expected) in [
            (&gone, WITHOUT, "no H extension"),
            (&gone, WITH_H, "modprobe kvm"),
            (&gone, "", "modprobe kvm"),
            (&denied, WITHOUT, "usermod -aG kvm"),
            (&no_device, WITH_H, "modprobe kvm"),
            (&busy, WITH_H, "busy"),
        ] {
            let line = explain_open(error, cpuinfo).to_string();
            assert!(line.contains(expected), "{line}");
            assert!(!line.contains('\n'));
        }
    }
}
