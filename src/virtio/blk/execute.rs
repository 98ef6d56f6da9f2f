//! Executes one request at once, in steps. Between two steps the worker checks whether a reset
//! cancels the request.

use std::io;
use std::sync::atomic::Ordering;

use super::Shared;
use super::request::{ID_BYTES, Operation, Range, Request, Status};
use crate::memory::Pieces;
use crate::util::guest_warn;
use crate::virtio::stop::Stop;

/// Bytes of one step. A driver can ask for 4 GiB in one request, by naming the same RAM again and
/// again. Linux's requests are smaller than a step.
pub(super) const STEP: usize = 4 << 20;

/// The result of a request, as reported to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    /// The status byte.
    pub status: Status,
    /// Bytes written from the start of the room for data.
    pub data: usize,
}

impl Outcome {
    /// The request succeeded, and `data` bytes were read.
    pub(super) fn ok(data: usize) -> Self {
        let status = Status::Ok;
        Self { status, data }
    }

    /// The request failed. How many bytes were read is unknown, so none are reported.
    fn not(status: Status) -> Self {
        Self { status, data: 0 }
    }
}

/// Why a request was not done.
enum Unfinished {
    /// A reset cancelled it.
    Stopped,
    /// The host or the driver caused an error.
    Failed(io::Error),
}

impl From<io::Error> for Unfinished {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl Shared {
    /// Executes `request`. Returns `None` if a reset cancelled it. The driver then gets no result,
    /// as in a power failure. A pause does not cancel.
    pub(super) fn execute(&self, request: &mut Request, stop: &Stop) -> Option<Outcome> {
        if stop.cancels() {
            return None;
        }
        let (image, length) = (&self.image, request.data.len());
        let Request {
            operation, data, ..
        } = request;
        let done = match operation {
            Operation::Read(at) => {
                let read = self.in_steps(data, *at, stop, |data, at| image.read(data, at));
                read.map(|()| length)
            }
            Operation::Write(at) => {
                let write = |data: &mut Pieces, at| self.kept(|| image.write(data, at));
                self.in_steps(data, *at, stop, write).map(|()| 0)
            }
            Operation::WriteZeroes(ranges) => {
                let write = |range| self.kept(|| image.write_zeroes(range));
                each(ranges, stop, write).map(|()| 0)
            }
            Operation::Discard(ranges) => {
                each(ranges, stop, |range| image.discard(range)).map(|()| 0)
            }
            Operation::Flush => image.flush().map(|()| 0).map_err(Unfinished::from),
            Operation::Id => Ok(self.write_id(data)),
            Operation::Unsupported => return Some(Outcome::not(Status::Unsupported)),
        };
        match done {
            Ok(data) => Some(Outcome::ok(data)),
            Err(Unfinished::Stopped) => None,
            Err(Unfinished::Failed(error)) => Some(self.failed(operation, length, &error)),
        }
    }

    /// Whether each write must be durable before its request ends.
    pub(super) fn is_through(&self) -> bool {
        self.through.load(Ordering::Acquire)
    }

    /// Runs `write`, and syncs afterwards if each write must be durable.
    fn kept(&self, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mark = self.image.mark();
        write()?;
        if self.is_through() {
            self.image.sync()?;
            self.image.is_kept_since(mark)?;
        }
        Ok(())
    }

    /// Runs `step` on `data` in pieces of at most [`STEP`] bytes. `offset` is where the data is on
    /// the disk.
    fn in_steps(
        &self,
        data: &mut Pieces,
        mut offset: u64,
        stop: &Stop,
        step: impl Fn(&mut Pieces, u64) -> io::Result<()>,
    ) -> Result<(), Unfinished> {
        self.image.check(offset, data.len() as u64)?;
        while data.len() > STEP {
            let rest = data.split_off(STEP);
            step(data, offset)?;
            *data = rest;
            offset += STEP as u64;
            if stop.cancels() {
                return Err(Unfinished::Stopped);
            }
        }
        Ok(step(data, offset)?)
    }

    /// Logs that `operation`, with `length` bytes of data, failed with `error`. Returns an I/O
    /// error for the driver.
    pub(super) fn failed(
        &self,
        operation: &Operation,
        length: usize,
        error: &io::Error,
    ) -> Outcome {
        let act = match operation {
            Operation::Read(offset) => format!("read {length} bytes at {offset:#x}"),
            Operation::Write(offset) => format!("write {length} bytes at {offset:#x}"),
            Operation::Flush => "flush".into(),
            Operation::Discard(_) => "discard".into(),
            Operation::WriteZeroes(_) => "write zeroes".into(),
            Operation::Id | Operation::Unsupported => String::new(),
        };
        let (name, path) = (&self.name, self.image.path());
        guest_warn!(
            self.failures,
            "{name} ({path:?}): Failed to {act}: {error}; the guest got an I/O error"
        );
        Outcome::not(Status::IoError)
    }

    /// Writes the disk's name to `room`, padded with zeros. Returns the number of bytes written.
    fn write_id(&self, room: &Pieces) -> usize {
        let mut id = [0; ID_BYTES];
        let name = self.name.as_bytes();
        let count = name.len().min(ID_BYTES);
        id[..count].copy_from_slice(&name[..count]);
        room.copy_from(&id)
    }
}

/// Runs `call` for each of `ranges`. None of them is long, so a reset is checked for only in
/// between.
fn each(
    ranges: &[Range],
    stop: &Stop,
    call: impl Fn(Range) -> io::Result<()>,
) -> Result<(), Unfinished> {
    for range in ranges {
        if stop.cancels() {
            return Err(Unfinished::Stopped);
        }
        call(*range)?;
    }
    Ok(())
}
