//! The host's end of the console: two threads that move bytes, and what they move them to.

mod pty;
mod sinks;
mod socket;
mod stdio;

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
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
use crate::util::{RateLimit, guest_debug, guest_warn};

/// How long an input thread may take to end, which has nothing to finish.
const READ_PATIENCE: Duration = Duration::from_millis(200);
/// Until an input that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Called once, on the console's thread, when the user types Ctrl-A X.
pub type OnLeave = Box<dyn FnOnce() + Send>;

/// Where a console's bytes go to and come from.
trait Endpoint: Send + Sync {
    /// Writes all of `bytes`, however long the reader takes. On an error what is left of them is
    /// dropped; the next may pass.
    fn write(&self, bytes: &[u8]) -> io::Result<()>;

    /// Waits for input, and for `stop`. [`Errno::CANCELED`] when that came; 0 when no more input
    /// will ever come; [`Errno::AGAIN`] to be asked again; others to be asked again later.
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
    input: Option<InputThread>,
    terminal: Option<RawTerminal>,
}

/// The thread that reads input.
struct InputThread {
    thread: JoinHandle<()>,
    /// Disconnected when it is about to end.
    ended: Receiver<Infallible>,
}

impl Host {
    /// Connects `console`, which people know as `name`, as `config` says. On standard input a terminal
    /// goes into raw mode, and its Ctrl-A keys are served.
    ///
    /// # Errors
    /// The host refused the file, socket, pseudo-terminal, a thread, or the terminal's mode.
    pub fn start(
        name: &str,
        console: Arc<Console>,
        config: &ConsoleConfig,
        on_leave: OnLeave,
    ) -> Result<Self> {
        let endpoint = open(name, config)?;
        let terminal = match config {
            ConsoleConfig::Stdio => RawTerminal::take().context("Failed to set up the terminal")?,
            _ => None,
        };
        Self::connect(console, endpoint, terminal, on_leave)
    }

    fn connect(
        console: Arc<Console>,
        endpoint: Arc<dyn Endpoint>,
        terminal: Option<RawTerminal>,
        on_leave: OnLeave,
    ) -> Result<Self> {
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
        let (running, ended) = channel::<Infallible>();
        let body = move || {
            input.run();
            drop(running);
        };
        let thread = spawn(Kind::Console, "in", body).with_context(failed)?;
        Ok(Self {
            console,
            endpoint,
            stop,
            input: Some(InputThread { thread, ended }),
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
        if let Some(InputThread { thread, ended }) = self.input.take() {
            // Where others read the same terminal or pipe, one of them may have taken what woke it.
            if ended.recv_timeout(READ_PATIENCE) == Err(RecvTimeoutError::Disconnected) {
                let _ = thread.join();
            }
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

fn open(name: &str, config: &ConsoleConfig) -> Result<Arc<dyn Endpoint>> {
    Ok(match config {
        ConsoleConfig::Stdio => Arc::new(stdio::Stdio::new()),
        ConsoleConfig::None => Arc::new(sinks::Nowhere),
        ConsoleConfig::Pty => Arc::new(pty::Pty::open(name)?),
        ConsoleConfig::File(path) => Arc::new(sinks::LogFile::open(path)?),
        ConsoleConfig::Socket(path) => Arc::new(socket::Socket::bind(path)?),
    })
}

fn write_output(console: &Console, endpoint: &dyn Endpoint) {
    let failures = RateLimit::named("console output");
    let mut bytes = Vec::new();
    while console.take_output(&mut bytes) {
        let Err(error) = endpoint.write(&bytes) else {
            continue;
        };
        // The guest goes on, and what it writes next is tried: a pipe may have a reader again, a
        // disk room.
        match error.kind() {
            io::ErrorKind::BrokenPipe => {
                let limit = RateLimit::named("console reader");
                guest_debug!(limit, "the console's reader has gone");
            }
            _ => guest_warn!(
                failures,
                "Failed to write the guest's console: {error}; that piece of it is lost"
            ),
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
        let mut failing = None;
        loop {
            match self.endpoint.read(&mut buffer, &self.stop) {
                Ok(0) => return debug!("the console's input has ended"),
                Ok(count) if self.take(&buffer[..count]) => failing = None,
                Ok(_) | Err(Errno::CANCELED) => return,
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => {
                    if failing.replace(error) != Some(error) {
                        warn!("Failed to read the console's input: {error}; it is tried again");
                    }
                    if pause(RETRY, &self.stop) == Err(Errno::CANCELED) {
                        return;
                    }
                }
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
    wait_readable_for(fd, stop, None)
}

/// The same for `time` at most; then nothing holds for `fd`.
fn wait_readable_for(
    fd: impl AsFd,
    stop: &OwnedFd,
    time: Option<Duration>,
) -> Result<PollFlags, Errno> {
    let mut fds = [
        PollFd::new(&fd, PollFlags::IN),
        PollFd::new(stop, PollFlags::IN),
    ];
    let time = time.and_then(|time| Timespec::try_from(time).ok());
    poll(&mut fds, time.as_ref())?;
    if fds[1].revents().is_empty() {
        Ok(fds[0].revents())
    } else {
        Err(Errno::CANCELED)
    }
}

/// Waits for `time`. `Errno::CANCELED` when `stop` is readable before.
fn pause(time: Duration, stop: &OwnedFd) -> Result<(), Errno> {
    let time = Timespec::try_from(time).ok();
    match poll(&mut [PollFd::new(stop, PollFlags::IN)], time.as_ref())? {
        0 => Ok(()),
        _ => Err(Errno::CANCELED),
    }
}

#[cfg(test)]
mod tests;
