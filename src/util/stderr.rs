//! Standard error that never blocks and never panics: a reader that has gone or does not read
//! loses rvmm's messages, and nothing else.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::OnceLock;

use rustix::fs::{FileType, fstat};

use super::output::{Unwaiting, write_now};

/// Writes to standard error what it takes at once; the rest is dropped.
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

/// The terminal or pipe that standard error is, non-blocking for rvmm alone: the flag belongs to an
/// open file description, and other programs share that of standard error.
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

/// Tells the user one line.
pub fn tell(message: impl fmt::Display) {
    let _ = Stderr.write_all(format!("{message}\n").as_bytes());
}
