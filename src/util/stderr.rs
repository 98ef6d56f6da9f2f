//! Standard error that never blocks and never panics: a reader that has gone or does not read
//! loses rvmm's messages, and nothing else.

use std::fmt;
use std::io::{self, Write};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Writes to standard error what it takes at once; the rest is dropped.
#[derive(Debug)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Ready for writing means room for a line at least: PIPE_BUF bytes of a pipe.
        if is_writable() {
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

fn is_writable() -> bool {
    let stderr = io::stderr();
    let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}
