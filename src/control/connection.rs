//! One client's connection: lines in, lines out, both bounded.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The longest line that a client may send, with its end.
const LINE_MAX: usize = 4096;

/// A client. It waits for nobody.
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    /// What came of the line that is not whole yet.
    line: Vec<u8>,
    /// What of a reply is not sent yet.
    unsent: Vec<u8>,
    /// A command is being carried out: its reply is still to come.
    pub(super) is_asking: bool,
    /// The client has closed its side, or was refused: no more lines are read.
    pub(super) is_closing: bool,
    /// When the client must have sent its line, or taken its reply.
    pub(super) deadline: Instant,
    /// Its time for each of them.
    patience: Duration,
}

/// What there is to do for a client.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Wait for it.
    Wait,
    /// It sent this line.
    Line(Vec<u8>),
    /// It sent more than a line may have.
    TooLong,
    /// It has gone.
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

    /// Whether the client is to be listened to: one line at a time.
    pub(super) fn wants_line(&self) -> bool {
        !self.is_asking && !self.is_closing && self.unsent.is_empty()
    }

    /// Whether it is to be written to.
    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Reads what has come.
    pub(super) fn read(&mut self) -> Next {
        if let Some(line) = self.take_line() {
            return Next::Line(line);
        }
        let mut bytes = [0; LINE_MAX];
        let room = LINE_MAX - self.line.len();
        match self.stream.read(&mut bytes[..room]) {
            // A client may close its side right after its command.
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

    /// The first whole line, if there is one; what follows stays.
    pub(super) fn take_line(&mut self) -> Option<Vec<u8>> {
        let end = self.line.iter().position(|byte| *byte == b'\n')?;
        let rest = self.line.split_off(end + 1);
        let mut line = std::mem::replace(&mut self.line, rest);
        line.truncate(end);
        Some(line)
    }

    /// Sends `reply` and a line's end, as far as the client takes it now.
    ///
    /// # Errors
    /// The client has gone.
    pub(super) fn send(&mut self, reply: &str) -> io::Result<()> {
        self.deadline = Instant::now() + self.patience;
        self.unsent.extend_from_slice(reply.as_bytes());
        self.unsent.push(b'\n');
        self.send_rest()
    }

    /// Sends what is left.
    ///
    /// # Errors
    /// The client has gone.
    pub(super) fn send_rest(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if is_for_later(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        // The next line has its own time.
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
