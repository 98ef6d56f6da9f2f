//! The thread that serves a device's queues.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use log::warn;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Broken, Virtq};
use crate::util::thread::{Kind, spawn};

/// A thread that owns some queues until it is stopped.
pub struct Worker {
    stop: Arc<AtomicBool>,
    wake: Arc<EventFd>,
    thread: JoinHandle<Vec<Virtq>>,
}

/// Says whether a worker is to end; its own thread has it.
#[derive(Clone)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Whether the worker is to end now.
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl Worker {
    /// Starts a thread that runs `serve` on `queues`, at least one. `serve` returns when its
    /// [`Stop`] asks for that, which wakes the first queue's kick; or when the driver broke a
    /// queue: then the device needs a reset, and the thread waits for it.
    ///
    /// # Errors
    /// The host has no resources for a thread; or there is no queue.
    pub fn start<F>(kind: Kind, name: &str, mut queues: Vec<Virtq>, serve: F) -> io::Result<Self>
    where
        F: FnOnce(&mut [Virtq], &Stop) -> Result<(), Broken> + Send + 'static,
    {
        let first = queues.first().ok_or(io::ErrorKind::InvalidInput)?;
        let wake = Arc::clone(first.kick());
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Stop(Arc::clone(&stop));
        let thread = spawn(kind, name, move || {
            if let Err(broken) = serve(&mut queues, &asked) {
                queues[0].give_up(&broken);
            }
            while !asked.is_asked() {
                wait(queues[0].kick());
            }
            queues
        })?;
        Ok(Self { stop, wake, thread })
    }

    /// Ends the thread, which finishes what it has begun, and takes its queues.
    pub fn stop(self) -> Vec<Virtq> {
        self.stop.store(true, Ordering::Release);
        if let Err(error) = self.wake.write(1) {
            warn!("Failed to wake a device's thread: {error}");
        }
        // A panic of the thread has ended the process.
        self.thread.join().unwrap_or_default()
    }
}

/// Waits until `kick` is signalled, and takes the signal.
pub fn wait(kick: &EventFd) {
    // EINTR is no signal, but callers look whether there is work anyway.
    let _ = kick.read();
}

/// Waits until one of `fds` is readable and tells which are.
///
/// # Errors
/// The host's.
pub fn wait_readable<const N: usize>(fds: [BorrowedFd; N]) -> io::Result<[bool; N]> {
    let mut polled = fds.each_ref().map(|fd| PollFd::new(fd, PollFlags::IN));
    match poll(&mut polled, None) {
        Ok(_) | Err(Errno::INTR) => Ok(polled.each_ref().map(|fd| !fd.revents().is_empty())),
        Err(errno) => Err(errno.into()),
    }
}
