//! The thread that serves a device's queues.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use log::warn;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Broken, Virtq};
use crate::util::thread::{Kind, spawn};

/// A thread that works for a device until it is stopped, and then gives back what it owned.
pub struct Worker<T: Send + 'static = Vec<Virtq>> {
    stop: Stop,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<T>>,
}

/// Says whether a worker is to end; its own thread has it.
#[derive(Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Whether the worker is to end now.
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Asks for the end.
    pub(super) fn ask(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Worker {
    /// Starts a thread that runs `serve` on `queues`, at least one. `serve` returns when its
    /// [`Stop`] asks for that, which wakes the first queue's kick; or when the driver broke a
    /// queue: then the device needs a reset, and the thread waits for it.
    ///
    /// # Errors
    /// The host has no resources for a thread; or there is no queue.
    pub fn serve<F>(kind: Kind, name: &str, mut queues: Vec<Virtq>, serve: F) -> io::Result<Self>
    where
        F: FnOnce(&mut [Virtq], &Stop) -> Result<(), Broken> + Send + 'static,
    {
        let first = queues.first().ok_or(io::ErrorKind::InvalidInput)?;
        Self::start(kind, name, Arc::clone(first.kick()), move |stop| {
            if let Err(broken) = serve(&mut queues, stop) {
                give_up(&mut queues, &broken);
            }
            while !stop.is_asked() {
                wait(queues[0].kick());
            }
            queues
        })
    }
}

impl<T: Send + 'static> Worker<T> {
    /// Starts a thread that runs `body`, which returns soon after its [`Stop`] asks for that; `wake`
    /// is signalled then.
    ///
    /// # Errors
    /// The host has no resources for a thread.
    pub fn start<F>(kind: Kind, name: &str, wake: Arc<EventFd>, body: F) -> io::Result<Self>
    where
        F: FnOnce(&Stop) -> T + Send + 'static,
    {
        let stop = Stop::default();
        let asked = stop.clone();
        let thread = spawn(kind, name, move || body(&asked))?;
        Ok(Self {
            stop,
            wake,
            thread: Some(thread),
        })
    }

    /// Ends the thread, which ends what it has begun, and takes what it owned. None where it
    /// panicked, which ends the process.
    pub fn stop(mut self) -> Option<T> {
        self.end()
    }

    /// Asks the thread to end, and does not wait for it.
    pub fn ask(&self) {
        self.stop.ask();
        if let Err(error) = self.wake.write(1) {
            warn!("Failed to wake a device's thread: {error}");
        }
    }

    fn end(&mut self) -> Option<T> {
        let thread = self.thread.take()?;
        self.ask();
        thread.join().ok()
    }
}

/// No thread outlives its device, whatever went wrong.
impl<T: Send + 'static> Drop for Worker<T> {
    fn drop(&mut self) {
        self.end();
    }
}

/// Gives up the device for `why`: its driver finds DEVICE_NEEDS_RESET. What was done before is told all
/// the same.
fn give_up(queues: &mut [Virtq], why: &Broken) {
    for queue in queues.iter_mut() {
        // The broken one may refuse.
        let _ = queue.tell();
    }
    if let Some(queue) = queues.first() {
        queue.needs_reset(why);
    }
}

/// Waits until `kick` is signalled, and takes the signal.
pub fn wait(kick: &EventFd) {
    // EINTR is no signal, but callers look whether there is work anyway.
    let _ = kick.read();
}
