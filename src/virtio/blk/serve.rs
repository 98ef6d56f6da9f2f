//! A queue's thread: each request is served here and now, or by io_uring while others are.
//!
//! A request that comes alone is served at once: nothing is quicker, and what arrives meanwhile
//! waits for a moment. Several at a time go to the ring, where the host has one for this image.

use std::io;
use std::thread::sleep;
use std::time::Duration;

use super::Shared;
use super::durable::Mark;
use super::execute::{Outcome, STEP};
use super::request::{Operation, Request};
use crate::memory::{Op, Pieces, Ring};
use crate::util::poll::{borrow, wait_readable_for};
use crate::util::{RateLimit, guest_debug, guest_warn};
use crate::virtio::queue::{Broken, Chain, Virtq};
use crate::virtio::stop::Stop;
use crate::virtio::worker::wait;

/// Until requests that the host could not start are tried again.
const RETRY: Duration = Duration::from_millis(10);
/// Bytes on their way in the rings of a disk, but for a single request of each: a reset waits for them.
const IN_FLIGHT: usize = 4 * STEP;

/// A request that came from this chain.
struct Pending {
    head: u16,
    request: Request,
    /// When it began.
    mark: Mark,
}

impl Shared {
    /// Serves `queue` until the worker is to stop. What was begun has ended then, or a reset has cancelled
    /// it; what was not is as it was, and the driver is told of nothing that it could take for done.
    pub(super) fn serve(&self, queue: &mut Virtq, stop: &Stop) -> Result<(), Broken> {
        let mut ring = self.ring(queue);
        while !stop.is_asked() {
            self.serve_all(queue, ring.as_mut(), stop)?;
            // What the host could not start is tried again soon.
            let must_retry = ring.as_mut().is_some_and(Ring::has_unsubmitted);
            if !must_retry || wait_readable_for(borrow(queue.kick()), RETRY) {
                wait(queue.kick());
            }
        }
        if let Some(mut ring) = ring {
            self.finish(queue, &mut ring, stop)?;
            self.stop(queue, ring)?;
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
        stop: &Stop,
    ) -> Result<(), Broken> {
        while !stop.is_asked() {
            queue.mute_kicks()?;
            let more = self.serve_some(queue, ring.as_deref_mut(), stop)?;
            if let Some(ring) = ring.as_deref_mut().filter(|_| !stop.is_asked()) {
                self.submit(ring);
                self.reap(queue, ring, stop)?;
            }
            queue.tell()?;
            if !more && !queue.ask_for_kick()? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Serves or begins as many requests as the queue has entries, or as there are. True when there may be
    /// more.
    fn serve_some(
        &self,
        queue: &mut Virtq,
        mut ring: Option<&mut Ring<Pending>>,
        stop: &Stop,
    ) -> Result<bool, Broken> {
        let mut next = queue.pop()?;
        for left in (0..queue.size()).rev() {
            if stop.is_asked() {
                if next.is_some() {
                    queue.unpop();
                }
                return Ok(false);
            }
            let Some(chain) = next else {
                return Ok(false);
            };
            let pending = self.parse(chain, queue)?;
            next = if left > 0 { queue.pop()? } else { None };
            let alone = next.is_none();
            match ring
                .as_deref_mut()
                .filter(|ring| !alone || ring.in_flight() > 0)
            {
                None => self.serve_now(queue, pending, stop)?,
                Some(ring) => self.begin(queue, ring, pending, stop)?,
            }
        }
        Ok(true)
    }

    fn parse(&self, chain: Chain, queue: &Virtq) -> Result<Pending, Broken> {
        let head = chain.head;
        let request = Request::parse(chain).ok_or_else(|| queue.no_request(head))?;
        let mark = self.image.mark();
        Ok(Pending {
            head,
            request,
            mark,
        })
    }

    fn serve_now(
        &self,
        queue: &mut Virtq,
        mut pending: Pending,
        stop: &Stop,
    ) -> Result<(), Broken> {
        match self.execute(&mut pending.request, stop) {
            Some(outcome) => pending.end(queue, outcome),
            None => Ok(()),
        }
    }

    /// Hands `pending` to the ring, if it is something the ring does.
    fn begin(
        &self,
        queue: &mut Virtq,
        ring: &mut Ring<Pending>,
        mut pending: Pending,
        stop: &Stop,
    ) -> Result<(), Broken> {
        let Some(op) = self.op(&pending.request) else {
            // It may take its time: what came before does not wait for it.
            self.submit(ring);
            self.reap(queue, ring, stop)?;
            queue.tell()?;
            return self.serve_now(queue, pending, stop);
        };
        let data = pending.request.data.take();
        let share = IN_FLIGHT / usize::from(self.queues);
        while ring.in_flight() > 0 && ring.bytes() + data.len() > share {
            if stop.cancels() {
                return Ok(());
            }
            if ring.wait().is_err() {
                break;
            }
            self.reap(queue, ring, stop)?;
        }
        match ring.push(op, data, pending) {
            Ok(()) => Ok(()),
            Err((data, mut pending)) => {
                pending.request.data = data;
                self.serve_now(queue, pending, stop)
            }
        }
    }

    /// What the ring is to do for `request`, if that is a thing for it.
    fn op(&self, request: &Request) -> Option<Op> {
        let (image, data) = (&self.image, &request.data);
        let length = data.len() as u64;
        let (op, is_well) = match request.operation {
            Operation::Read(at) => {
                let is_well = image.check(at, length).is_ok() && image.fits_read(data, at);
                (Op::Read(at), is_well)
            }
            Operation::Write(at) => {
                let is_well = image.check_write(at, length).is_ok() && image.fits_write(data, at);
                (Op::Write(at), is_well)
            }
            _ => return None,
        };
        (is_well && data.len() <= STEP).then_some(op)
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

    /// Ends what has ended in the ring.
    fn reap(&self, queue: &mut Virtq, ring: &mut Ring<Pending>, stop: &Stop) -> Result<(), Broken> {
        let mut unsynced = Vec::new();
        while let Some((data, mut pending, result)) = ring.reap() {
            match self.ended(&mut pending, data, result, stop) {
                End::As(outcome) => pending.end(queue, outcome)?,
                End::Unsynced => unsynced.push(pending),
                End::Stopped => {}
            }
        }
        // Of what is not durable when a reset comes the driver is told nothing.
        if unsynced.is_empty() || stop.cancels() {
            return Ok(());
        }
        // Nothing else waits for the host's disk.
        queue.tell()?;
        let synced = self.image.sync();
        for pending in unsynced {
            let Pending { request, mark, .. } = &pending;
            let kept = self.image.is_kept_since(*mark);
            let outcome = match synced.as_ref().err().or(kept.as_ref().err()) {
                None => Outcome::ok(0),
                Some(error) => self.failed(&request.operation, request.data.len(), error),
            };
            pending.end(queue, outcome)?;
        }
        Ok(())
    }

    /// What the driver is to be told of a request that came back from the ring with `result`.
    fn ended(
        &self,
        pending: &mut Pending,
        data: Pieces,
        result: io::Result<usize>,
        stop: &Stop,
    ) -> End {
        let request = &mut pending.request;
        let length = data.len();
        request.data = data;
        let is_write = matches!(request.operation, Operation::Write(_));
        match result {
            Ok(count) if count == length && is_write && self.is_through() => End::Unsynced,
            Ok(count) if count == length => End::As(done(request)),
            // Not once more: an error can be told once, and be that of other requests.
            Err(error) if !is_to_try(&error) => {
                End::As(self.failed(&request.operation, length, &error))
            }
            _ => self.execute(request, stop).map_or(End::Stopped, End::As),
        }
    }

    /// Waits for all that is on its way, and tells the driver, unless a reset cancels it.
    fn finish(
        &self,
        queue: &mut Virtq,
        ring: &mut Ring<Pending>,
        stop: &Stop,
    ) -> Result<(), Broken> {
        while ring.in_flight() > 0 && !stop.cancels() {
            if ring.wait().is_err() {
                sleep(RETRY);
            }
            self.reap(queue, ring, stop)?;
        }
        Ok(())
    }

    /// Ends what is on its way. The driver is told of what was done; what was cancelled, or needs more than
    /// it has had, it will not hear of.
    fn stop(&self, queue: &mut Virtq, ring: Ring<Pending>) -> Result<(), Broken> {
        for (data, pending, result) in ring.stop() {
            let is_write = matches!(pending.request.operation, Operation::Write(_));
            let is_whole = result.is_ok_and(|count| count == data.len());
            if is_whole && !(is_write && self.is_through()) {
                let outcome = done(&pending.request);
                pending.end(queue, outcome)?;
            }
        }
        Ok(())
    }
}

impl Pending {
    fn end(self, queue: &mut Virtq, outcome: Outcome) -> Result<(), Broken> {
        let Outcome { status, data } = outcome;
        queue.push(self.head, self.request.finish(status, data))
    }
}

/// How a request came back from the ring.
enum End {
    /// Done, or not.
    As(Outcome),
    /// Written, and to be synced before its driver is told.
    Unsynced,
    /// The worker is to stop.
    Stopped,
}

/// The end of a request that the ring did wholly.
fn done(request: &Request) -> Outcome {
    match request.operation {
        Operation::Read(_) => Outcome::ok(request.room),
        _ => Outcome::ok(0),
    }
}

/// Whether what the ring could not do for this reason is tried without it.
fn is_to_try(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::EINTR | libc::EINVAL | libc::EOPNOTSUPP)
    )
}

#[cfg(test)]
mod tests;
