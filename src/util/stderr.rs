//! Standard error that never blocks and never panics. If its reader has gone or does not read,
//! rvmm's messages are lost, but rvmm runs on.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::OnceLock;

use rustix::fs::{FileType, fstat};

use super::output::{Unwaiting, write_now};

/// A writer that gives standard error as many bytes as it takes without waiting, and drops the
/// rest.
#[derive(Debug)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        static OURS: OnceLock<Option<Unwaiting>> = OnceLock::new();
        if let Some(mut ours) = OURS.get_or_init(|| reopen().ok()).as_ref() {
            return ours.write(bytes);
        }
        write_now(io::stderr(), bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Opens the terminal or pipe behind standard error again, and makes the new descriptor
/// non-blocking. Standard error itself has to stay as it is: the flag belongs to the open file
/// description, which other programs share.
///
/// # Errors
/// Fails if standard error is neither a terminal nor a pipe, or cannot be opened.
fn reopen() -> io::Result<Unwaiting> {
    let stderr = io::stderr();
    let kind = FileType::from_raw_mode(fstat(&stderr)?.st_mode);
    if !stderr.is_terminal() && kind != FileType::Fifo {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let mut options = OpenOptions::new();
    options
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK);
    Unwaiting::new(options.open("/proc/self/fd/2")?)
}

/// Prints the lines of `text` to standard error. A terminal may be in raw mode for the guest, where
/// a newline alone does not return to the first column.
pub fn print_lines(text: &str) {
    let end = if io::stderr().is_terminal() { "\r" } else { "" };
    // One by one, because standard error may not take all of the text at once.
    text.lines()
        .for_each(|line| print(format_args!("{line}{end}")));
}

/// Prints `message` and a newline to standard error.
pub fn print(message: impl fmt::Display) {
    let _ = Stderr.write_all(format!("{message}\n").as_bytes());
}
