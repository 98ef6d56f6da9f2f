//! The console on standard input and output.

use std::io::{self, Write};

use rustix::fd::OwnedFd;
use rustix::io::{Errno, read};
use rustix::stdio::stdin;

use super::{Endpoint, wait_readable};

pub(super) struct Stdio;

impl Endpoint for Stdio {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes)?;
        stdout.flush()
    }

    fn read(&self, buffer: &mut [u8], stop: &OwnedFd) -> Result<usize, Errno> {
        wait_readable(stdin(), stop)?;
        read(stdin(), buffer)
    }
}
