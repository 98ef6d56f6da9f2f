//! A queue's thread: each request is served here and now, or by io_uring while others are.
//!
//! A request that comes alone is served at once: nothing is quicker, and what arrives meanwhile
//! waits for a moment. Several at a time go to the ring, where the host has one for this image.

use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Shared;
use super::request::{ID_BYTES, Operation, Request, Status};
use crate::memory::{Op, Pieces, Ring};
use crate::util::poll::{borrow, wait_readable_for};
use crate::util::{RateLimit, guest_debug, guest_warn};
use crate::virtio::queue::{Broken, Chain, Virtq};
use crate::virtio::worker::{Stop, wait};

/// Until requests that the host could not start are tried again.
const RETRY: Duration = Duration::from_millis(10);

/// A request that came from this chain.
struct Pending {
    head: u16,
    request: Request,
}

impl Pending {
    fn parse(chain: Chain, queue: &Virtq) -> Result<Self, Broken> {
        let head = chain.head;
        let request = Request::parse(chain).ok_or_else(|| queue.no_request(head))?;
        Ok(Self { head, request })
    }
}

impl Shared {
    /// Serves `queue` until the worker is to stop; what was begun is finished then.
    pub(super) fn serve(&self, queue: &mut Virtq, stop: &Stop) -> Result<(), Broken> {
        let mut ring = self.ring(queue);
        while !stop.is_asked() {
            self.serve_all(queue, ring.as_mut())?;
            // What the host could not start is tried again soon.
            let must_retry = ring.as_mut().is_some_and(Ring::has_unsubmitted);
            if !must_retry || wait_readable_for(borrow(queue.kick()), RETRY) {
                wait(queue.kick());
            }
        }
        while let Some(ring) = ring.as_mut().filter(|ring| ring.in_flight() > 0) {
            if ring.wait().is_err() {
                break;
            }
            self.reap(queue, ring)?;
        }
        queue.tell()
    }

    /// A ring whose ends wake this thread as the driver's notifications do.
    fn ring(&self, queue: &Virtq) -> Option<Ring<Pending>> {
        let file = self.image.unwaiting()?;
        let ring = Ring::new(queue.size(), file, queue.kick());
        if let Err(error) = &ring {
            let limit = RateLimit::named("io_uring");
            guest_debug!(limit, "{}: no io_uring: {error}", self.name);
        }
        ring.ok()
    }

    /// Serves every request there is, and all that have ended in the ring.
    fn serve_all(
        &self,
        queue: &mut Virtq,
        mut ring: Option<&mut Ring<Pending>>,
    ) -> Result<(), Broken> {
        let mut left = queue.size();
        loop {
            queue.mute_kicks()?;
            let mut next = queue.pop()?;
            while let Some(chain) = next {
                let pending = Pending::parse(chain, queue)?;
                left = left.saturating_sub(1);
                // After as many as the queue has entries it is time to look whether to stop.
                next = if left > 0 { queue.pop()? } else { None };
                let alone = next.is_none();
                match ring
                    .as_deref_mut()
                    .filter(|ring| !alone || ring.in_flight() > 0)
                {
                    None => self.serve_now(queue, pending)?,
                    Some(ring) => self.begin(queue, ring, pending)?,
                }
            }
            if let Some(ring) = ring.as_deref_mut() {
                self.submit(ring);
                self.reap(queue, ring)?;
            }
            queue.tell()?;
            if left == 0 {
                queue.kick_again();
                return Ok(());
            }
            if !queue.ask_for_kick()? {
                return Ok(());
            }
        }
    }

    fn serve_now(&self, queue: &mut Virtq, pending: Pending) -> Result<(), Broken> {
        let Pending { head, mut request } = pending;
        let status = self.execute(&mut request);
        queue.push(head, request.finish(status))
    }

    /// Hands `pending` to the ring, if it is something the ring does.
    fn begin(
        &self,
        queue: &mut Virtq,
        ring: &mut Ring<Pending>,
        mut pending: Pending,
    ) -> Result<(), Broken> {
        let request = &pending.request;
        let length = request.data.len() as u64;
        let op = match request.operation {
            Operation::Read(at) if self.image.check(at, length).is_ok() => Op::Read(at),
            Operation::Write(at) if self.image.check_write(at, length).is_ok() => {
                Op::Write(at, self.write_flags())
            }
            _ => {
                // It may take its time: what came before does not wait for it.
                self.submit(ring);
                self.reap(queue, ring)?;
                queue.tell()?;
                return self.serve_now(queue, pending);
            }
        };
        let data = pending.request.take_data();
        match ring.push(op, data, pending) {
            Ok(()) => Ok(()),
            Err((data, mut pending)) => {
                pending.request.data = data;
                self.serve_now(queue, pending)
            }
        }
    }

    fn is_through(&self) -> bool {
        self.through.load(Ordering::Acquire)
    }

    /// Flags of each write: RWF_*.
    fn write_flags(&self) -> i32 {
        if self.is_through() {
            libc::RWF_DSYNC
        } else {
            0
        }
    }

    fn submit(&self, ring: &mut Ring<Pending>) {
        if let Err(error) = ring.submit() {
            // They stay in the ring, and are tried again with the next request.
            guest_warn!(
                self.failures,
                "{}: Failed to start requests: {error}",
                self.name
            );
        }
    }

    fn reap(&self, queue: &mut Virtq, ring: &mut Ring<Pending>) -> Result<(), Broken> {
        while let Some((data, Pending { head, mut request }, result)) = ring.reap() {
            request.data = data;
            let status = match result {
                Ok(count) if count == request.data.len() => Status::Ok,
                // In part, or not at all: once more, the slow way, which knows what to say.
                _ => self.execute(&mut request),
            };
            queue.push(head, request.finish(status))?;
        }
        Ok(())
    }

    fn execute(&self, request: &mut Request) -> Status {
        let image = &self.image;
        let length = request.data.len();
        let done = match &request.operation {
            Operation::Read(offset) => image.read(&mut request.data, *offset),
            Operation::Write(offset) => image.write(&mut request.data, *offset, self.write_flags()),
            Operation::Flush => image.flush(),
            Operation::Id => self.tell_id(&request.data),
            Operation::Discard(ranges) => ranges.iter().try_for_each(|r| image.discard(*r)),
            Operation::WriteZeroes(ranges) => {
                let zeroed = ranges.iter().try_for_each(|r| image.write_zeroes(*r));
                zeroed.and_then(|()| {
                    if self.is_through() {
                        image.flush()
                    } else {
                        Ok(())
                    }
                })
            }
            Operation::Unsupported => return Status::Unsupported,
        };
        match done {
            Ok(()) => Status::Ok,
            Err(error) => self.failed(&request.operation, length, &error),
        }
    }

    fn failed(&self, operation: &Operation, length: usize, error: &io::Error) -> Status {
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
        Status::IoError
    }

    fn tell_id(&self, room: &Pieces) -> io::Result<()> {
        let mut id = [0; ID_BYTES];
        let name = self.name.as_bytes();
        let count = name.len().min(ID_BYTES);
        id[..count].copy_from_slice(&name[..count]);
        room.copy_from(&id);
        Ok(())
    }
}
