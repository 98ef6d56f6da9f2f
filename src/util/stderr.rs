//! Standard error that never blocks and never panics: a reader that has gone or does not read
//! loses rvmm's messages, and nothing else.

use std::fmt;
use std::io::{self, Write};

use rustix::event::PollFlags;

use super::poll::poll_now;

/// Writes to standard error what it takes at once; the rest is dropped.
#[derive(Debug)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Ready for writing means room for a line at least: PIPE_BUF bytes of a pipe.
        if !poll_now(io::stderr(), PollFlags::OUT).is_empty() {
            let _ = io::stderr().write(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tells the user one line.
pub fn tell(message: impl fmt::Display) {
    let _ = Stderr.write_all(format!("{message}\n").as_bytes());
}
