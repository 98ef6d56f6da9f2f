//! The console on standard input and output.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use log::{debug, info, warn};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::io::{Errno, read, write};

use super::Console;
use super::escape::{Escape, HELP, Key};
use super::tty::RawTerminal;
use crate::util::thread::{Kind, spawn};

/// Called once, on the console's thread, when the user types Ctrl-A X.
pub type OnLeave = Box<dyn FnOnce() + Send>;

/// The threads that move the console's bytes. [`Stdio::finish`] ends them.
pub struct Stdio {
    console: Arc<Console>,
    /// Readable when the input thread should end.
    stop: Arc<OwnedFd>,
    input: Option<std::thread::JoinHandle<()>>,
    terminal: Option<RawTerminal>,
}

impl Stdio {
    /// Connects `console` to standard input and output; a terminal goes into raw mode, and its
    /// Ctrl-A keys are served.
    ///
    /// # Errors
    /// The host refused a thread, an eventfd or the terminal's mode.
    pub fn start(console: Arc<Console>, on_leave: OnLeave) -> io::Result<Self> {
        let terminal = RawTerminal::take()?;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let output = Arc::clone(&console);
        // Not joined: it may wait for a reader that never reads again.
        spawn(Kind::Console, "out", move || write_output(&output))?;
        let input = Input {
            console: Arc::clone(&console),
            stop: Arc::clone(&stop),
            escape: terminal.is_some().then(Escape::default),
            on_leave: Some(on_leave),
        };
        let input = spawn(Kind::Console, "in", move || input.run())?;
        Ok(Self {
            console,
            stop,
            input: Some(input),
            terminal,
        })
    }

    /// Writes what the guest has written, as long as the reader takes some every `patience`; then
    /// restores the terminal.
    pub fn finish(mut self, patience: Duration) {
        if !self.console.drain(patience) {
            warn!("the reader of standard output stopped reading: the guest's last output is lost");
        }
        self.stop();
    }

    fn stop(&mut self) {
        self.console.close();
        // An eventfd takes a write of 1 unless its count is at its end.
        let _ = write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.input.take() {
            let _ = thread.join();
        }
        self.terminal = None;
    }
}

impl Drop for Stdio {
    fn drop(&mut self) {
        self.stop();
    }
}

fn write_output(console: &Console) {
    let mut bytes = Vec::new();
    let mut reader_lives = true;
    while console.take_output(&mut bytes) {
        // Once the reader is gone the guest's output has nowhere to go, and the guest goes on.
        let mut stdout = io::stdout().lock();
        if reader_lives
            && stdout
                .write_all(&bytes)
                .and_then(|()| stdout.flush())
                .is_err()
        {
            debug!("standard output is closed: the guest's output is dropped");
            reader_lives = false;
        }
    }
}

struct Input {
    console: Arc<Console>,
    stop: Arc<OwnedFd>,
    /// Only a terminal has keys that are for rvmm.
    escape: Option<Escape>,
    on_leave: Option<OnLeave>,
}

impl Input {
    fn run(mut self) {
        let mut buffer = [0; 1024];
        loop {
            match self.read(&mut buffer) {
                Ok(0) => return debug!("standard input has ended"),
                Ok(count) if self.take(&buffer[..count]) => {}
                Ok(_) | Err(Errno::CANCELED) => return,
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return warn!("Failed to read standard input: {error}"),
            }
        }
    }

    /// Waits for input. 0 at its end, ECANCELED when the console is closed.
    fn read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        let stdin = rustix::stdio::stdin();
        let mut fds = [
            PollFd::new(&stdin, PollFlags::IN),
            PollFd::new(&*self.stop, PollFlags::IN),
        ];
        poll(&mut fds, None)?;
        if !fds[1].revents().is_empty() {
            return Err(Errno::CANCELED);
        }
        read(stdin, buffer)
    }

    /// Hands typed bytes to the guest; false when there is no more to do.
    fn take(&mut self, typed: &[u8]) -> bool {
        let Some(escape) = &mut self.escape else {
            return self.console.push_input(typed);
        };
        let mut bytes = Vec::with_capacity(typed.len());
        for byte in typed {
            match escape.key(*byte) {
                Key::Byte(byte) => bytes.push(byte),
                Key::Held => {}
                Key::Help => eprint!("\r\n{HELP}\r\n"),
                Key::Leave => {
                    info!("Ctrl-A X was typed");
                    if let Some(leave) = self.on_leave.take() {
                        leave();
                    }
                    return false;
                }
            }
        }
        self.console.push_input(&bytes)
    }
}
