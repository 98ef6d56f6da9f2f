//! A request done here and now, in steps: between them the worker looks whether a reset cancels it.

use std::io;
use std::sync::atomic::Ordering;

use super::Shared;
use super::request::{ID_BYTES, Operation, Range, Request, Status};
use crate::memory::Pieces;
use crate::util::guest_warn;
use crate::virtio::stop::Stop;

/// Bytes of one step: a driver can ask for 4 GiB at once, by naming the same RAM again and again. Linux's
/// asks for less than this.
pub(super) const STEP: usize = 4 << 20;

/// How a request ended, as its driver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Its status.
    pub status: Status,
    /// Bytes written from the start of the room for data.
    pub data: usize,
}

impl Outcome {
    /// As asked, with so many bytes of data.
    pub(super) fn ok(data: usize) -> Self {
        let status = Status::Ok;
        Self { status, data }
    }

    /// Not as asked. How much data came before that is not known.
    fn not(status: Status) -> Self {
        Self { status, data: 0 }
    }
}

/// Why a request was not done.
enum Unfinished {
    /// A reset cancels it.
    Stopped,
    /// The host's, or the driver's.
    Failed(io::Error),
}

impl From<io::Error> for Unfinished {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl Shared {
    /// Does `request`. None where a reset cancelled it: the driver is told nothing then, as when the power
    /// goes. A pause waits for its end.
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
            Operation::Id => Ok(self.tell_id(data)),
            Operation::Unsupported => return Some(Outcome::not(Status::Unsupported)),
        };
        match done {
            Ok(data) => Some(Outcome::ok(data)),
            Err(Unfinished::Stopped) => None,
            Err(Unfinished::Failed(error)) => Some(self.failed(operation, length, &error)),
        }
    }

    /// Whether each write is durable when it ends.
    pub(super) fn is_through(&self) -> bool {
        self.through.load(Ordering::Acquire)
    }

    /// Runs `write`, and makes it durable if each write is to be.
    fn kept(&self, write: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mark = self.image.mark();
        write()?;
        if self.is_through() {
            self.image.sync()?;
            self.image.is_kept_since(mark)?;
        }
        Ok(())
    }

    /// Runs `step` on `data`, whose place on the disk is `offset`, so many bytes at a time.
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

    /// `operation`, with `length` bytes of data, failed with `error`.
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
            "{name} ({path:?}): Failed to {act}: {error}; the guest was told"
        );
        Outcome::not(Status::IoError)
    }

    fn tell_id(&self, room: &Pieces) -> usize {
        let mut id = [0; ID_BYTES];
        let name = self.name.as_bytes();
        let count = name.len().min(ID_BYTES);
        id[..count].copy_from_slice(&name[..count]);
        room.copy_from(&id)
    }
}

/// Runs `call` for each of `ranges`, none of which is long.
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
