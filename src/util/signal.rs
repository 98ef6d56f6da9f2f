//! What a signal does to this process.
#![allow(unsafe_code)]

use std::mem::zeroed;
use std::ptr::null;

/// Whether this process ignores the signal: by itself, or because it was started so, as by nohup.
pub fn is_ignored(signal: i32) -> bool {
    // SAFETY: all fields are integers, and zeros are a value of each.
    let mut action: libc::sigaction = unsafe { zeroed() };
    // SAFETY: changes nothing, because there is no new action. `action` takes the present one.
    let found = unsafe { libc::sigaction(signal, null(), &raw mut action) };
    found == 0 && action.sa_sigaction == libc::SIG_IGN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_ignored_signal() {
        // Rust's runtime ignores it.
        assert!(is_ignored(libc::SIGPIPE));
        assert!(!is_ignored(libc::SIGURG));
        assert!(!is_ignored(-1));
    }
}
