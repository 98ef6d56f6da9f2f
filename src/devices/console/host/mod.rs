//! The host's end of the console, and what it is connected to.
//!
//! A thread of its own writes the guest's output, however slow its reader is. Input comes by the main
//! loop, which [`Input`] is a subscriber of.

mod input;
mod pty;
mod sinks;
mod socket;
mod stdio;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use log::warn;

use super::Console;
use super::terminal::RawTerminal;
use crate::config::ConsoleConfig;
use crate::util::thread::{Kind, spawn};
use crate::util::{RateLimit, guest_debug, guest_warn};
pub use input::Input;
use input::Source;

/// Called once, on the main loop's thread, when the user types Ctrl-A X.
pub type OnLeave = Box<dyn FnOnce()>;

/// Where a console's bytes go to.
trait Sink: Send + Sync {
    /// Writes all of `bytes`, however long the reader takes. On an error what is left of them is
    /// dropped; the next may pass.
    fn write(&self, bytes: &[u8]) -> io::Result<()>;

    /// Removes what other programs could find of it.
    fn close(&self) {}
}

/// The two ends of what a console is connected to. Some have no input.
struct Ends {
    sink: Arc<dyn Sink>,
    source: Option<Box<dyn Source>>,
}

/// A console connected to the host. Dropping it disconnects it.
pub struct Host {
    console: Arc<Console>,
    sink: Arc<dyn Sink>,
    terminal: Option<RawTerminal>,
}

impl Host {
    /// Connects `console`, which people know as `name`, as `config` says. Input comes once the second
    /// result is added to the main loop. On standard input a terminal goes into raw mode, and its Ctrl-A
    /// keys are served.
    ///
    /// # Errors
    /// The file, socket, pseudo-terminal, thread or descriptor cannot be had, or the terminal's mode cannot
    /// be set.
    pub fn start(
        name: &str,
        console: Arc<Console>,
        config: &ConsoleConfig,
        on_leave: OnLeave,
    ) -> Result<(Self, Option<Input>)> {
        let ends = open(name, config)?;
        let terminal = match config {
            ConsoleConfig::Stdio => RawTerminal::take().context("Failed to set up the terminal")?,
            _ => None,
        };
        Self::connect(console, ends, terminal, on_leave).context("Failed to start the console")
    }

    fn connect(
        console: Arc<Console>,
        Ends { sink, source }: Ends,
        terminal: Option<RawTerminal>,
        on_leave: OnLeave,
    ) -> io::Result<(Self, Option<Input>)> {
        // Where something fails below, this goes and takes with it what others could find.
        let host = Self {
            console: Arc::clone(&console),
            sink: Arc::clone(&sink),
            terminal,
        };
        // Only a terminal has keys that are for rvmm.
        let on_leave = host.terminal.is_some().then_some(on_leave);
        let input = |source| Input::new(Arc::clone(&console), source, on_leave);
        let input = source.map(input).transpose()?;
        // Not joined: it may wait for a reader that never reads again.
        spawn(Kind::Console, "out", move || write_output(&console, &*sink))?;
        Ok((host, input))
    }

    /// Writes what the guest has written, then disconnects. Waits for the reader as long as
    /// `patience` tells: it is given the time without progress, and false ends the wait.
    pub fn finish(self, patience: impl FnMut(Duration) -> bool) {
        if !self.console.drain(patience) {
            warn!("the console's reader does not read: the guest's last output is lost");
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.console.close();
        self.terminal = None;
        self.sink.close();
    }
}

fn open(name: &str, config: &ConsoleConfig) -> Result<Ends> {
    Ok(match config {
        ConsoleConfig::Stdio => stdio::open(),
        ConsoleConfig::None => sinks::nowhere(),
        ConsoleConfig::Pty => pty::open(name)?,
        ConsoleConfig::File(path) => sinks::file(path)?,
        ConsoleConfig::Socket(path) => socket::bind(path)?,
    })
}

fn write_output(console: &Console, sink: &dyn Sink) {
    let failures = RateLimit::named("console output");
    let mut bytes = Vec::new();
    while console.take_output(&mut bytes) {
        let Err(error) = sink.write(&bytes) else {
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

#[cfg(test)]
mod tests;
