//! The kernel's command line: what it may be, and how much of it each kind of guest keeps.
//!
//! | who reads it | bytes | what happens to more |
//! |---|---|---|
//! | the device tree, for every guest | [`MAX`] | refused |
//! | a RISC-V Linux, from an Image or a vmlinux | [`LINUX_MAX`] | Linux cuts it off; a warning |
//! | any other kernel | nobody knows | nothing |
//!
//! A NUL byte is refused: the device tree's strings end at it.

use super::ConfigError;

/// Gives Linux its console.
pub(super) const DEFAULT: &str = "console=ttyS0";

/// Bytes that the device tree has room for. What a kernel keeps of them is its own affair.
pub(crate) const MAX: usize = 64 << 10;

/// Bytes that a RISC-V Linux keeps, without the NUL; it cuts off the rest in silence
/// (COMMAND_LINE_SIZE in `arch/riscv/include/uapi/asm/setup.h`: 1024, and 512 in older kernels).
pub(crate) const LINUX_MAX: usize = 1023;

/// Checks what holds for every guest.
pub(super) fn validate(cmdline: &str) -> Result<(), ConfigError> {
    if cmdline.contains('\0') {
        return Err(ConfigError::CmdlineNul);
    }
    match cmdline.len() {
        0..=MAX => Ok(()),
        length => Err(ConfigError::CmdlineLength(length)),
    }
}

/// A warning, where a kernel does not keep all of it. `is_linux` tells what the kernel is.
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
    fn the_readme_tells_both_limits() {
        let readme = include_str!("../../README.md");
        let words: Vec<&str> = readme.split_whitespace().collect();
        let text = words.join(" ");
        assert!(text.contains(&format!("`--cmdline` has up to {MAX} bytes")));
        assert!(text.contains(&format!("more than the {LINUX_MAX} that Linux keeps")));
    }
}
