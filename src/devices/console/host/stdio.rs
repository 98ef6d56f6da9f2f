//! The console on standard input and output.

use std::io::{self, IsTerminal};
use std::time::Duration;

use rustix::fd::OwnedFd;
use rustix::io::{Errno, read};
use rustix::stdio::{stdin, stdout};

use super::{Endpoint, pause, wait_readable, wait_readable_for};
use crate::devices::console::terminal;
use crate::util::output::write_whole;

/// How often to look whether rvmm has the terminal: a shell tells nobody that it brings a job that
/// runs to the foreground.
const LOOK: Duration = Duration::from_secs(1);

pub(super) struct Stdio {
    is_terminal: bool,
}

impl Stdio {
    pub(super) fn new() -> Self {
        let is_terminal = io::stdin().is_terminal();
        Self { is_terminal }
    }
}

impl Endpoint for Stdio {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        write_whole(stdout(), bytes)
    }

    fn read(&self, buffer: &mut [u8], stop: &OwnedFd) -> Result<usize, Errno> {
        if !self.is_terminal {
            wait_readable(stdin(), stop)?;
            return read(stdin(), buffer);
        }
        if !terminal::follow() {
            pause(LOOK, stop)?;
            return Err(Errno::AGAIN);
        }
        let ready = wait_readable_for(stdin(), stop, Some(LOOK))?;
        // What was typed meanwhile may be another's.
        if ready.is_empty() || terminal::in_background() {
            return Err(Errno::AGAIN);
        }
        match read(stdin(), buffer) {
            Err(Errno::IO) if terminal::in_background() => Err(Errno::AGAIN),
            result => result,
        }
    }
}
