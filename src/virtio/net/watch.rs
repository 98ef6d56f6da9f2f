//! Watches what only the host's kernel serves: whether the tap still exists, and whether vhost has
//! reported an error on a queue.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::Shared;
use crate::util::poll::{Events, borrow};
use crate::util::thread::Kind;
use crate::virtio::notify::Fault;
use crate::virtio::worker::Worker;

/// How often to look for the tap. Nothing signals that a tap was deleted.
const EVERY: Duration = Duration::from_secs(1);

/// Numbers of the events that the thread waits for. The queues' numbers start at QUEUES.
const WAKE: u8 = 0;
const QUEUES: u8 = 1;

/// Starts the thread. `errors` has the number of each queue, and the eventfd that vhost signals
/// when it cannot go on with that queue. The device needs a reset then.
///
/// # Errors
/// Fails if the host has no file descriptors left, or no resources for a thread.
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
                    // One report suffices: vhost signals the error again at each notification.
                    let _ = events.remove(borrow(error));
                    fault.needs_reset(format_args!("vhost-net reported an error on queue {queue}"));
                }
            }
        }
    })
}
