//! The kernel's command line: its limits, and their checks.
//!
//! | limit of | bytes | if the command line is longer |
//! |---|---|---|
//! | the device tree, for every guest | [`MAX`] | rvmm refuses it |
//! | a RISC-V Linux, from an Image or a vmlinux | [`LINUX_MAX`] | rvmm warns; Linux cuts it off |
//! | any other kernel | unknown | rvmm passes it on |
//!
//! rvmm refuses a NUL byte, because it ends a string of the device tree.

use super::ConfigError;

/// The default command line, which makes the UART Linux's console.
pub(super) const DEFAULT: &str = "console=ttyS0";

/// The most bytes that rvmm puts into the device tree. The kernel may keep fewer.
pub(crate) const MAX: usize = 64 << 10;

/// Bytes that a RISC-V Linux keeps, without the NUL. It cuts off the rest without a message.
/// (COMMAND_LINE_SIZE in `arch/riscv/include/uapi/asm/setup.h` is 1024, in older kernels 512.)
pub(crate) const LINUX_MAX: usize = 1023;

/// Checks the limits that hold for every guest.
pub(super) fn validate(cmdline: &str) -> Result<(), ConfigError> {
    if cmdline.contains('\0') {
        return Err(ConfigError::CmdlineNul);
    }
    match cmdline.len() {
        0..=MAX => Ok(()),
        length => Err(ConfigError::CmdlineLength(length)),
    }
}

/// The warning for a command line that a Linux kernel will cut off. `None` for any other kernel.
pub(crate) fn warning(cmdline: &str, is_linux: bool) -> Option<String> {
    let length = cmdline.len();
    (is_linux && length > LINUX_MAX).then(|| {
        format!(
            "--cmdline has {length} bytes, and a RISC-V Linux keeps {LINUX_MAX}: it cuts off \
             the rest"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_guest_could_have_is_refused() {
        assert_eq!(validate("a\0b"), Err(ConfigError::CmdlineNul));
        assert_eq!(validate(&"x".repeat(65536)), Ok(()));
        let error = validate(&"x".repeat(65537)).unwrap_err();
        assert_eq!(error, ConfigError::CmdlineLength(65537));
        assert_eq!(
            error.to_string(),
            "--cmdline: 65537 bytes are more than the 65536 that the device tree has room for"
        );
    }

    #[test]
    fn what_linux_cuts_off_is_warned_of() {
        assert_eq!(warning(&"x".repeat(1023), true), None);
        assert_eq!(warning(&"x".repeat(1024), false), None);
        assert_eq!(
            warning(&"x".repeat(1024), true).unwrap(),
            "--cmdline has 1024 bytes, and a RISC-V Linux keeps 1023: it cuts off the rest"
        );
    }

    #[test]
    fn the_readme_has_both_limits() {
        let readme = include_str!("../../README.md");
        let words: Vec<&str> = readme.split_whitespace().collect();
        let text = words.join(" ");
        assert!(text.contains(&format!("`--cmdline` has up to {MAX} bytes")));
        assert!(text.contains(&format!("more than the {LINUX_MAX} that Linux keeps")));
    }
}
