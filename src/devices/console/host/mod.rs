//! The host's side of the console, and what it is connected to.
//!
//! A separate thread writes the guest's output, because its reader may be slow. Input is read on
//! the main loop, by the subscriber [`Input`].

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

/// The functions of the Ctrl-A keys of a terminal. They are called on the main loop's thread.
pub struct Keys {
    /// For Ctrl-A X. Called at most once.
    pub on_leave: Option<Box<dyn FnOnce()>>,
    /// For Ctrl-A R.
    pub on_report: Box<dyn Fn()>,
}

/// Takes a console's output.
trait Sink: Send + Sync {
    /// Writes all of `bytes`, and blocks as long as the reader needs. On an error, the rest of
    /// `bytes` is lost. The next write may succeed.
    fn write(&self, bytes: &[u8]) -> io::Result<()>;

    /// Removes what other programs can see of it, such as a socket's path.
    fn close(&self) {}
}

/// The output and input ends that a console is connected to. Some have no input.
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
    /// Connects `console` as `config` says. Messages call it `name`. The second result reads input;
    /// it must be added to the main loop. A terminal on standard input goes into raw mode, and rvmm
    /// handles its Ctrl-A keys.
    ///
    /// # Errors
    /// Fails if the file or socket cannot be opened, the pseudo-terminal, the thread or a
    /// descriptor cannot be created, or the terminal's mode cannot be set.
    pub fn start(
        name: &str,
        console: Arc<Console>,
        config: &ConsoleConfig,
        keys: Keys,
    ) -> Result<(Self, Option<Input>)> {
        let ends = open(name, config)?;
        let terminal = match config {
            ConsoleConfig::Stdio => RawTerminal::take().context("Failed to set up the terminal")?,
            _ => None,
        };
        Self::connect(console, ends, terminal, keys).context("Failed to start the console")
    }

    fn connect(
        console: Arc<Console>,
        Ends { sink, source }: Ends,
        terminal: Option<RawTerminal>,
        keys: Keys,
    ) -> io::Result<(Self, Option<Input>)> {
        // If something below fails, this is dropped and removes the socket's file.
        let host = Self {
            console: Arc::clone(&console),
            sink: Arc::clone(&sink),
            terminal,
        };
        // Only a terminal has keys that are for rvmm.
        let keys = host.terminal.is_some().then_some(keys);
        let input = |source| Input::new(Arc::clone(&console), source, keys);
        let input = source.map(input).transpose()?;
        // The thread is never joined: it may wait for a reader that never reads again.
        spawn(Kind::Console, "out", move || write_output(&console, &*sink))?;
        Ok((host, input))
    }

    /// Writes the rest of the guest's output, then disconnects. Calls `patience` with the time
    /// since the last progress; if it returns false, stops waiting for the reader.
    pub fn finish(self, patience: impl FnMut(Duration) -> bool) {
        if !self.console.drain(patience) {
            warn!("nobody reads the console's output: the rest of it is lost");
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
        // The guest goes on, and its next output is tried again: a pipe may have a reader again, or
        // a disk free space.
        match error.kind() {
            io::ErrorKind::BrokenPipe => {
                let limit = RateLimit::named("console reader");
                guest_debug!(limit, "the console's reader has disconnected");
            }
            _ => guest_warn!(
                failures,
                "Failed to write the guest's console output: {error}; this part of it is lost"
            ),
        }
    }
}

#[cfg(test)]
mod tests;
