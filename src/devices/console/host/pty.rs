//! Connects a console to a new pseudo-terminal, which a terminal program can open.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::PollFlags;
use rustix::fd::AsFd;
use rustix::fs::OFlags;
use rustix::io::{Errno, ioctl_fionbio, read};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::input::{Source, Wait};
use super::{Ends, Sink};
use crate::util::output::write_whole;
use crate::util::poll::poll_now;
use crate::util::stderr::print;

/// Time between two checks whether somebody has opened the terminal. The kernel has no notification
/// for that.
const LOOK: Duration = Duration::from_millis(100);

/// rvmm's side of the pseudo-terminal. While nobody has the other side open, output is dropped.
#[derive(Clone)]
pub(super) struct Pty(Arc<File>);

/// Creates a pseudo-terminal in raw mode, and prints its name.
pub(super) fn open(console: &str) -> Result<Ends> {
    let (pty, name) = create().context("Failed to create a pseudo-terminal")?;
    print(format_args!("rvmm: {console} is {name}"));
    Ok(Ends {
        sink: Arc::new(pty.clone()),
        source: Some(Box::new(pty)),
    })
}

impl Pty {
    fn has_reader(&self) -> bool {
        !poll_now(&self.0, PollFlags::OUT).contains(PollFlags::HUP)
    }
}

pub(super) fn create() -> io::Result<(Pty, String)> {
    let main = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    // The main loop reads it, so a read must not block. No other program shares this descriptor.
    ioctl_fionbio(&main, true)?;
    grantpt(&main)?;
    unlockpt(&main)?;
    let name = ptsname(&main, Vec::new())?;
    let name = name.to_string_lossy().into_owned();
    // Open the other side to set its mode. When this function closes the other side, the
    // pseudo-terminal reports a hang-up (POLLHUP) until somebody opens the other side again.
    let no_control = i32::try_from(OFlags::NOCTTY.bits()).unwrap_or(0);
    let other = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(no_control)
        .open(&name)?;
    let mut mode = tcgetattr(&other)?;
    mode.make_raw();
    tcsetattr(&other, OptionalActions::Now, &mode)?;
    Ok((Pty(Arc::new(main.into())), name))
}

impl Sink for Pty {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        if !self.has_reader() {
            return Ok(());
        }
        match write_whole(&*self.0, bytes) {
            // The reader has closed the other side meanwhile. Another reader may open it later.
            Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(()),
            result => result,
        }
    }
}

impl Source for Pty {
    fn wait(&mut self) -> Wait<'_> {
        // While nobody has the other side open, poll reports a hang-up at once, so rvmm cannot wait
        // for the descriptor. Input that came before the hang-up can still be read.
        let ready = poll_now(&self.0, PollFlags::IN);
        let may_wait = ready.contains(PollFlags::IN) || !ready.contains(PollFlags::HUP);
        Wait {
            fd: may_wait.then(|| self.0.as_fd()),
            time: (!may_wait).then_some(LOOK),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Errno> {
        match read(&self.0, buffer) {
            // The other side was closed.
            Err(Errno::IO) => Err(Errno::AGAIN),
            result => result,
        }
    }
}
