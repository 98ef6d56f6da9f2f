//! The console as a new pseudo-terminal, for a terminal program to open.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::PollFlags;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use rustix::io::{Errno, read};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::{Endpoint, pause, wait_readable};
use crate::util::output::write_whole;
use crate::util::poll::poll_now;
use crate::util::stderr::tell;

/// How often to look whether somebody has opened the terminal: the kernel tells nobody.
const LOOK: Duration = Duration::from_millis(100);

/// The side that rvmm holds. While nobody has the other side open, output is dropped.
pub(super) struct Pty(File);

impl Pty {
    /// Makes a pseudo-terminal in raw mode, and tells its name.
    pub(super) fn open(console: &str) -> Result<Self> {
        let (pty, name) = create().context("Failed to create a pseudo-terminal")?;
        tell(format_args!("rvmm: {console} is {name}"));
        Ok(pty)
    }

    fn has_reader(&self) -> bool {
        !poll_now(&self.0, PollFlags::OUT).contains(PollFlags::HUP)
    }
}

pub(super) fn create() -> io::Result<(Pty, String)> {
    let main = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&main)?;
    unlockpt(&main)?;
    let name = ptsname(&main, Vec::new())?;
    let name = name.to_string_lossy().into_owned();
    // Opening and closing the other side sets its mode, and leaves the state "nobody has it".
    let no_control = i32::try_from(OFlags::NOCTTY.bits()).unwrap_or(0);
    let other = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(no_control)
        .open(&name)?;
    let mut mode = tcgetattr(&other)?;
    mode.make_raw();
    tcsetattr(&other, OptionalActions::Now, &mode)?;
    Ok((Pty(main.into()), name))
}

impl Endpoint for Pty {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        if !self.has_reader() {
            return Ok(());
        }
        match write_whole(&self.0, bytes) {
            // The reader closed it meanwhile; another may come.
            Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(()),
            result => result,
        }
    }

    fn read(&self, buffer: &mut [u8], stop: &OwnedFd) -> Result<usize, Errno> {
        let ready = wait_readable(&self.0, stop)?;
        if ready.contains(PollFlags::IN) {
            match read(&self.0, &mut *buffer) {
                Err(Errno::IO) => {}
                result => return result,
            }
        }
        pause(LOOK, stop)?;
        Err(Errno::AGAIN)
    }
}
