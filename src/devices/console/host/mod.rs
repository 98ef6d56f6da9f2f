//! The host's end of the console: two threads that move bytes, and what they move them to.

mod pty;
mod sinks;
mod socket;
mod stdio;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use log::{debug, warn};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::{Errno, write};

use super::Console;
use super::escape::{Escape, HELP, Key};
use super::terminal::RawTerminal;
use crate::config::ConsoleConfig;
use crate::util::stderr::tell;
use crate::util::thread::{Kind, spawn};

/// Called once, on the console's thread, when the user types Ctrl-A X.
pub type OnLeave = Box<dyn FnOnce() + Send>;

/// Where a console's bytes go to and come from.
trait Endpoint: Send + Sync {
    /// Writes all of `bytes`, however long the reader takes. An error is final.
    fn write(&self, bytes: &[u8]) -> io::Result<()>;

    /// Waits for input, and for `stop`. [`Errno::CANCELED`] when that came; 0 when no more input
    /// will ever come.
    fn read(&self, buffer: &mut [u8], stop: &OwnedFd) -> Result<usize, Errno>;

    /// Removes what other programs could find of it.
    fn close(&self) {}
}

/// A console connected to the host. Dropping it disconnects it.
pub struct Host {
    console: Arc<Console>,
    endpoint: Arc<dyn Endpoint>,
    /// Readable when the input thread should end.
    stop: Arc<OwnedFd>,
    input: Option<JoinHandle<()>>,
    terminal: Option<RawTerminal>,
}

impl Host {
    /// Connects `console` as `config` says. On standard input a terminal goes into raw mode, and
    /// its Ctrl-A keys are served.
    ///
    /// # Errors
    /// The host refused the file, socket, pseudo-terminal, a thread, or the terminal's mode.
    pub fn start(console: Arc<Console>, config: &ConsoleConfig, on_leave: OnLeave) -> Result<Self> {
        let endpoint = open(config)?;
        let terminal = match config {
            ConsoleConfig::Stdio => RawTerminal::take().context("Failed to set up the terminal")?,
            _ => None,
        };
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let (writer, output) = (Arc::clone(&endpoint), Arc::clone(&console));
        let failed = || "Failed to start the console";
        // Not joined: it may wait for a reader that never reads again.
        spawn(Kind::Console, "out", move || {
            write_output(&output, &*writer)
        })
        .with_context(failed)?;
        let input = Input {
            console: Arc::clone(&console),
            endpoint: Arc::clone(&endpoint),
            stop: Arc::clone(&stop),
            escape: terminal.is_some().then(Escape::default),
            on_leave: Some(on_leave),
        };
        let input = spawn(Kind::Console, "in", move || input.run()).with_context(failed)?;
        Ok(Self {
            console,
            endpoint,
            stop,
            input: Some(input),
            terminal,
        })
    }

    /// Writes what the guest has written, then disconnects. Waits for the reader as long as
    /// `patience` tells: it is given the time without progress, and false ends the wait.
    pub fn finish(mut self, patience: impl FnMut(Duration) -> bool) {
        let drained = self.console.drain(patience);
        self.stop();
        if !drained {
            warn!("the console's reader does not read: the guest's last output is lost");
        }
    }

    fn stop(&mut self) {
        self.console.close();
        // An eventfd takes a write of 1 unless its count is at its end.
        let _ = write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.input.take() {
            let _ = thread.join();
        }
        self.terminal = None;
        self.endpoint.close();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop();
    }
}

fn open(config: &ConsoleConfig) -> Result<Arc<dyn Endpoint>> {
    Ok(match config {
        ConsoleConfig::Stdio => Arc::new(stdio::Stdio),
        ConsoleConfig::None => Arc::new(sinks::Nowhere),
        ConsoleConfig::Pty => Arc::new(pty::Pty::open()?),
        ConsoleConfig::File(path) => Arc::new(sinks::LogFile::create(path)?),
        ConsoleConfig::Socket(path) => Arc::new(socket::Socket::bind(path)?),
    })
}

fn write_output(console: &Console, endpoint: &dyn Endpoint) {
    let mut bytes = Vec::new();
    let mut reader_lives = true;
    while console.take_output(&mut bytes) {
        // Once the reader is gone the guest's output has nowhere to go, and the guest goes on.
        if !reader_lives {
            continue;
        }
        match endpoint.write(&bytes) {
            Ok(()) => {}
            Err(error) => {
                reader_lives = false;
                match error.kind() {
                    io::ErrorKind::BrokenPipe => debug!("the console's reader has gone"),
                    _ => warn!("Failed to write the guest's console: {error}; it is dropped now"),
                }
            }
        }
    }
}

struct Input {
    console: Arc<Console>,
    endpoint: Arc<dyn Endpoint>,
    stop: Arc<OwnedFd>,
    /// Only a terminal has keys that are for rvmm.
    escape: Option<Escape>,
    on_leave: Option<OnLeave>,
}

impl Input {
    fn run(mut self) {
        let mut buffer = [0; 1024];
        loop {
            match self.endpoint.read(&mut buffer, &self.stop) {
                Ok(0) => return debug!("the console's input has ended"),
                Ok(count) if self.take(&buffer[..count]) => {}
                Ok(_) | Err(Errno::CANCELED) => return,
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return warn!("Failed to read the console's input: {error}"),
            }
        }
    }

    /// Hands typed bytes to the guest; false when there is no more to do.
    fn take(&mut self, typed: &[u8]) -> bool {
        let Some(escape) = &mut self.escape else {
            return self.console.push_input(typed);
        };
        let mut bytes = Vec::with_capacity(typed.len());
        let mut leave = false;
        for byte in typed {
            match escape.key(*byte) {
                Key::Byte(byte) => bytes.push(byte),
                Key::Held => {}
                Key::Help => tell(format_args!("\r\n{HELP}\r")),
                Key::Leave => leave = true,
                #[cfg(debug_assertions)]
                Key::Panic => panic!("Ctrl-A P was typed"),
            }
        }
        if leave {
            debug!("Ctrl-A X was typed");
            if let Some(leave) = self.on_leave.take() {
                leave();
            }
            return false;
        }
        self.console.type_input(&bytes)
    }
}

/// Waits until `fd` is readable. `Errno::CANCELED` when `stop` is.
fn wait_readable(fd: impl AsFd, stop: &OwnedFd) -> Result<PollFlags, Errno> {
    let mut fds = [
        PollFd::new(&fd, PollFlags::IN),
        PollFd::new(stop, PollFlags::IN),
    ];
    poll(&mut fds, None)?;
    if fds[1].revents().is_empty() {
        Ok(fds[0].revents())
    } else {
        Err(Errno::CANCELED)
    }
}

/// Waits for `time`. `Errno::CANCELED` when `stop` is readable before.
fn pause(time: Duration, stop: &OwnedFd) -> Result<(), Errno> {
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: time.subsec_nanos().into(),
    };
    match poll(&mut [PollFd::new(stop, PollFlags::IN)], Some(&timeout))? {
        0 => Ok(()),
        _ => Err(Errno::CANCELED),
    }
}

#[cfg(test)]
mod tests;
