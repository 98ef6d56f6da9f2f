//! The connection of one client. It reads and writes lines, and limits their size and time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The longest line that a client may send, in bytes, newline included.
const LINE_MAX: usize = 4096;

/// The connection of a client. No function blocks.
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    /// Received bytes that were not returned as lines yet.
    line: Vec<u8>,
    /// The part of the reply that is not sent yet.
    unsent: Vec<u8>,
    /// A command of this client is being carried out, and gets its reply later.
    pub(super) is_asking: bool,
    /// A line was refused. No more lines are read, and the connection is closed after the reply.
    pub(super) is_closing: bool,
    /// The time limit for the client to send its line, or to take its reply.
    pub(super) deadline: Instant,
    /// The time that the client has for each of them.
    patience: Duration,
}

/// The result of [`Connection::read`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// There is no complete line yet.
    Wait,
    /// The client sent this line.
    Line(Vec<u8>),
    /// The client sent a line that is too long.
    TooLong,
    /// The client has disconnected.
    Gone,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, patience: Duration) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            line: Vec::new(),
            unsent: Vec::new(),
            is_asking: false,
            is_closing: false,
            deadline: Instant::now() + patience,
            patience,
        })
    }

    /// Whether to read from the client. It may send a line once the reply to the line before is
    /// sent.
    pub(super) fn wants_line(&self) -> bool {
        !self.is_asking && !self.is_closing && self.unsent.is_empty()
    }

    /// Whether a part of a reply is still to be sent.
    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Reads available bytes.
    pub(super) fn read(&mut self) -> Next {
        if let Some(line) = self.take_line() {
            return Next::Line(line);
        }
        let mut bytes = [0; LINE_MAX];
        let room = LINE_MAX - self.line.len();
        match self.stream.read(&mut bytes[..room]) {
            // End of file: the client has closed its side.
            Ok(0) => Next::Gone,
            Ok(count) => {
                self.line.extend_from_slice(&bytes[..count]);
                match self.take_line() {
                    Some(line) => Next::Line(line),
                    None if self.line.len() == LINE_MAX => Next::TooLong,
                    None => Next::Wait,
                }
            }
            Err(error) if is_for_later(&error) => Next::Wait,
            Err(_) => Next::Gone,
        }
    }

    /// Takes the first complete line, if there is one. Bytes after it stay.
    pub(super) fn take_line(&mut self) -> Option<Vec<u8>> {
        let end = self.line.iter().position(|byte| *byte == b'\n')?;
        let rest = self.line.split_off(end + 1);
        let mut line = std::mem::replace(&mut self.line, rest);
        line.truncate(end);
        Some(line)
    }

    /// Sends `reply` and a newline. Keeps what the socket does not take now for
    /// [`Connection::send_rest`].
    ///
    /// # Errors
    /// Fails if the client has disconnected.
    pub(super) fn send(&mut self, reply: &str) -> io::Result<()> {
        self.deadline = Instant::now() + self.patience;
        self.unsent.extend_from_slice(reply.as_bytes());
        self.unsent.push(b'\n');
        self.send_rest()
    }

    /// Sends the rest of a reply, as much as the socket takes now.
    ///
    /// # Errors
    /// Fails if the client has disconnected.
    pub(super) fn send_rest(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if is_for_later(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        // The next line has its own time limit.
        self.deadline = Instant::now() + self.patience;
        Ok(())
    }
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
