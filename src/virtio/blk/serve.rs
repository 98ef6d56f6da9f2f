//! The thread of a queue. It executes a request itself, or passes it to io_uring.
//!
//! A single request is executed at once: nothing is faster, and requests that arrive meanwhile wait
//! only briefly. Several requests at a time go to an io_uring, if the host has one and it suits the
//! image.

use std::io;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::Shared;
use super::durable::Mark;
use super::execute::{Outcome, STEP};
use super::request::{Operation, Request};
use crate::memory::{Op, Pieces, Ring};
use crate::trace::{Event, Track, What};
use crate::util::poll::{borrow, wait_readable_for};
use crate::util::{RateLimit, guest_debug, guest_warn};
use crate::virtio::queue::{Broken, Chain, Virtq};
use crate::virtio::stop::Stop;
use crate::virtio::worker::wait;

/// How long to wait before requests that the host could not start are submitted again.
const RETRY: Duration = Duration::from_millis(10);
/// Most bytes in flight in all rings of a disk, because a reset waits for them. A ring without
/// requests takes one of any size.
const IN_FLIGHT: usize = 4 * STEP;

/// A request in progress, with the head of its chain.
struct Pending {
    head: u16,
    request: Request,
    /// What had been written when the request began.
    mark: Mark,
    /// When the request began, if requests are recorded.
    began: Option<Instant>,
}

impl Shared {
    /// Serves `queue` until the worker must stop. When this returns, requests that have begun have
    /// ended, or a reset has cancelled them. The others are still in the queue. The driver is never
    /// notified of a request that was not completed.
    pub(super) fn serve(&self, queue: &mut Virtq, stop: &Stop) -> Result<(), Broken> {
        let mut ring = self.ring(queue);
        while !stop.is_asked() {
            self.serve_all(queue, ring.as_mut(), stop)?;
            // If the host could not start requests, try again soon.
            let must_retry = ring.as_mut().is_some_and(Ring::has_unsubmitted);
            if !must_retry || wait_readable_for(borrow(queue.kick()), RETRY) {
                wait(queue.kick());
            }
        }
        if let Some(mut ring) = ring {
            self.finish(queue, &mut ring, stop)?;
            self.stop(queue, ring)?;
        }
        queue.notify()
    }

    /// Returns an io_uring whose completions signal the queue's kick, as the driver's notifications
    /// do. `None` if there is no io_uring, or if it does not suit the image.
    fn ring(&self, queue: &Virtq) -> Option<Ring<Pending>> {
        let file = self.image.unwaiting()?;
        let ring = Ring::new(queue.size(), file, queue.kick());
        if let Err(error) = &ring {
            let limit = RateLimit::named("io_uring");
            guest_debug!(limit, "{}: Failed to set up io_uring: {error}", self.name);
        }
        ring.ok()
    }

    /// Serves all available requests, and all completions of the ring.
    fn serve_all(
        &self,
        queue: &mut Virtq,
        mut ring: Option<&mut Ring<Pending>>,
        stop: &Stop,
    ) -> Result<(), Broken> {
        while !stop.is_asked() {
            queue.disable_notifications()?;
            let more = self.serve_some(queue, ring.as_deref_mut(), stop)?;
            if let Some(ring) = ring.as_deref_mut().filter(|_| !stop.is_asked()) {
                self.submit(ring);
                self.reap(queue, ring, stop)?;
            }
            queue.notify()?;
            if !more && !queue.enable_notifications()? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Executes or begins the available requests, but no more than the queue has entries. True if
    /// there may be more.
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
            began: self.tracer.get().map(|_| Instant::now()),
        })
    }

    fn serve_now(
        &self,
        queue: &mut Virtq,
        mut pending: Pending,
        stop: &Stop,
    ) -> Result<(), Broken> {
        match self.execute(&mut pending.request, stop) {
            Some(outcome) => self.end(&pending, queue, outcome),
            None => Ok(()),
        }
    }

    /// Passes `pending` to the ring. Executes it here if the ring does not take it.
    fn begin(
        &self,
        queue: &mut Virtq,
        ring: &mut Ring<Pending>,
        mut pending: Pending,
        stop: &Stop,
    ) -> Result<(), Broken> {
        let Some(op) = self.op(&pending.request) else {
            // This request may take long. Start and complete earlier ones first.
            self.submit(ring);
            self.reap(queue, ring, stop)?;
            queue.notify()?;
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

    /// Returns the ring's operation for `request`; `None` if the request must be executed here.
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
            // The requests stay in the ring. They are submitted again later.
            guest_warn!(
                self.failures,
                "{}: Failed to start requests: {error}",
                self.name
            );
        }
    }

    /// Ends the requests that the ring has completed.
    fn reap(&self, queue: &mut Virtq, ring: &mut Ring<Pending>, stop: &Stop) -> Result<(), Broken> {
        let mut unsynced = Vec::new();
        while let Some((data, mut pending, result)) = ring.reap() {
            match self.ended(&mut pending, data, result, stop) {
                End::As(outcome) => self.end(&pending, queue, outcome)?,
                End::Unsynced => unsynced.push(pending),
                End::Stopped => {}
            }
        }
        // A reset comes: the driver must not be notified of writes that are not durable.
        if unsynced.is_empty() || stop.cancels() {
            return Ok(());
        }
        // Notify the driver of the other requests first. They need not wait for the sync.
        queue.notify()?;
        let synced = self.image.sync();
        for pending in unsynced {
            let Pending { request, mark, .. } = &pending;
            let kept = self.image.is_kept_since(*mark);
            let outcome = match synced.as_ref().err().or(kept.as_ref().err()) {
                None => Outcome::ok(0),
                Some(error) => self.failed(&request.operation, request.data.len(), error),
            };
            self.end(&pending, queue, outcome)?;
        }
        Ok(())
    }

    /// Determines the result of a request from `result`, the ring's. Executes the request again if
    /// the ring has done a part of it or did not support it.
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
            // Do not try again: Linux may report an error only once, and it may concern other
            // requests too.
            Err(error) if !is_to_try(&error) => {
                End::As(self.failed(&request.operation, length, &error))
            }
            _ => self.execute(request, stop).map_or(End::Stopped, End::As),
        }
    }

    /// Waits for all requests in flight, and returns them to the driver. Stops waiting if a reset
    /// cancels them.
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

    /// Returns `pending` to the driver. By reference, because a move would copy the request.
    fn end(&self, pending: &Pending, queue: &mut Virtq, outcome: Outcome) -> Result<(), Broken> {
        let Outcome { status, data } = outcome;
        let request = &pending.request;
        queue.push(pending.head, request.finish(status, data))?;
        if let (Some(tracer), Some(at)) = (self.tracer.get(), pending.began) {
            let (act, offset) = request.operation.describe();
            tracer.record(Event {
                track: Track::Queue(Arc::clone(&self.track), queue.index()),
                at,
                time: at.elapsed(),
                what: What::Request {
                    act,
                    offset,
                    bytes: request.length as u64,
                    status: status.name(),
                },
            });
        }
        Ok(())
    }

    /// Cancels the requests in flight. Returns those that were completed to the driver; not those
    /// that were cancelled or are incomplete.
    fn stop(&self, queue: &mut Virtq, ring: Ring<Pending>) -> Result<(), Broken> {
        for (data, pending, result) in ring.stop() {
            let is_write = matches!(pending.request.operation, Operation::Write(_));
            let is_whole = result.is_ok_and(|count| count == data.len());
            if is_whole && !(is_write && self.is_through()) {
                let outcome = done(&pending.request);
                self.end(&pending, queue, outcome)?;
            }
        }
        Ok(())
    }
}

/// What to do with a request that the ring has completed.
enum End {
    /// Return it to the driver with this result.
    As(Outcome),
    /// Written, but to be synced before it is returned to the driver.
    Unsynced,
    /// A reset has cancelled it.
    Stopped,
}

/// The result of a request that the ring has done in full.
fn done(request: &Request) -> Outcome {
    match request.operation {
        Operation::Read(_) => Outcome::ok(request.room),
        _ => Outcome::ok(0),
    }
}

/// Whether to try a request without the ring, which failed with this error.
fn is_to_try(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::EINTR | libc::EINVAL | libc::EOPNOTSUPP)
    )
}

#[cfg(test)]
mod tests;
