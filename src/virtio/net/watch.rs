//! A look at what the host's kernel serves alone: whether the tap is there still, and whether vhost has
//! given up a queue.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::Shared;
use crate::util::poll::{Events, borrow};
use crate::util::thread::Kind;
use crate::virtio::notify::Fault;
use crate::virtio::worker::Worker;

/// Nothing tells of a tap that goes.
const EVERY: Duration = Duration::from_secs(1);

/// Numbers of what the thread waits for; those of queues follow.
const WAKE: u8 = 0;
const QUEUES: u8 = 1;

/// Starts the thread. `errors` has for each queue's number what vhost signals when it gives it up: then
/// the device needs a reset.
///
/// # Errors
/// The host has no descriptors left, or no resources for a thread.
pub(super) fn watch(
    shared: &Arc<Shared>,
    fault: Fault,
    errors: Vec<(u16, EventFd)>,
) -> io::Result<Worker<()>> {
    let wake = Arc::new(EventFd::new(libc::EFD_CLOEXEC)?);
    let events = Events::new()?;
    events.add_signal(WAKE, &wake)?;
    for (number, (_, error)) in (QUEUES..).zip(&errors) {
        events.add_signal(number, error)?;
    }
    let (shared, name) = (Arc::clone(shared), format!("{}.tap", shared.name));
    Worker::start(Kind::Net, &name, wake, move |stop| {
        while !stop.is_asked() {
            if !shared.link.is_gone() && shared.pairs.iter().any(|tap| tap.is_gone()) {
                shared.lose_link(&io::Error::from_raw_os_error(libc::EBADFD));
            }
            let ready = events.wait((!shared.link.is_gone()).then_some(EVERY));
            for (number, (queue, error)) in (QUEUES..).zip(&errors) {
                if ready.has(number) {
                    // Told once: each further notification of the driver's would be another error.
                    let _ = events.remove(borrow(error));
                    fault.needs_reset(format_args!("vhost-net gave up queue {queue}"));
                }
            }
        }
    })
}
