//! The thread that serves a device's queues.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use log::warn;
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Broken, Virtq};
use super::stop::{Stop, StopFor};
use crate::util::sync::lock;
use crate::util::thread::{Kind, spawn};

/// A thread that works for a device until it is stopped, and then returns what it owned.
pub struct Worker<T: Send + 'static = Vec<Virtq>> {
    stop: Stop,
    wake: Arc<EventFd>,
    ended: Arc<Ended>,
    thread: Option<JoinHandle<T>>,
}

/// Whether the worker's thread has done all its work and is about to exit.
#[derive(Default)]
struct Ended(Mutex<bool>, Condvar);

impl Ended {
    fn wait(&self) {
        let waited = self.1.wait_while(lock(&self.0), |ended| !*ended);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Marks the thread as ended when dropped, also when the thread panics.
struct NotifyEnd(Arc<Ended>);

impl Drop for NotifyEnd {
    fn drop(&mut self) {
        *lock(&self.0.0) = true;
        self.0.1.notify_all();
    }
}

impl Worker {
    /// Starts a thread that runs `serve` on `queues`, of which there must be at least one.
    ///
    /// `serve` must return soon after its [`Stop`] asks for that; the request to stop signals the
    /// first queue's kick. `serve` returns an error if a queue breaks. Then the device needs a
    /// reset, and the thread waits until it is stopped. If one of the queues broke before a pause,
    /// `serve` is not called. In any case the driver is notified of used buffers.
    ///
    /// # Errors
    /// Fails if the host has no resources for a thread, or if there is no queue.
    pub fn serve<F>(kind: Kind, name: &str, mut queues: Vec<Virtq>, serve: F) -> io::Result<Self>
    where
        F: FnOnce(&mut [Virtq], &Stop) -> Result<(), Broken> + Send + 'static,
    {
        let first = queues.first().ok_or(io::ErrorKind::InvalidInput)?;
        Self::start(kind, name, Arc::clone(first.kick()), move |stop| {
            if !queues.iter().any(Virtq::is_broken) {
                if let Err(broken) = serve(&mut queues, stop) {
                    give_up(&mut queues, &broken);
                }
            }
            for queue in &mut queues {
                // A broken queue may return an error.
                let _ = queue.notify();
            }
            while !stop.is_asked() {
                wait(queues[0].kick());
            }
            queues
        })
    }
}

impl<T: Send + 'static> Worker<T> {
    /// Starts a thread that runs `body`. `body` must return soon after its [`Stop`] asks for that;
    /// the request to stop signals `wake`.
    ///
    /// # Errors
    /// Fails if the host has no resources for a thread.
    pub fn start<F>(kind: Kind, name: &str, wake: Arc<EventFd>, body: F) -> io::Result<Self>
    where
        F: FnOnce(&Stop) -> T + Send + 'static,
    {
        let stop = Stop::default();
        let asked = stop.clone();
        let ended = Arc::<Ended>::default();
        let notify_end = NotifyEnd(Arc::clone(&ended));
        let thread = spawn(kind, name, move || {
            let _notify_end = notify_end;
            body(&asked)
        })?;
        Ok(Self {
            stop,
            wake,
            ended,
            thread: Some(thread),
        })
    }

    /// Stops the thread as for a reset, and returns what it owned. `None` if the thread panicked,
    /// which ends the process anyway.
    pub fn stop(mut self) -> Option<T> {
        self.end()
    }

    /// Asks the thread to end, and does not wait for it.
    pub fn ask(&self, why: StopFor) {
        self.stop.ask(why);
        if let Err(error) = self.wake.write(1) {
            warn!("Failed to wake a device's thread: {error}");
        }
    }

    /// Waits until the thread, which was asked to end, has done so. What it owned can still be
    /// taken with [`Worker::stop`].
    fn wait_end(&self) {
        self.ended.wait();
    }

    fn end(&mut self) -> Option<T> {
        let thread = self.thread.take()?;
        self.ask(StopFor::Reset);
        thread.join().ok()
    }
}

/// No thread outlives its device, even after an error.
impl<T: Send + 'static> Drop for Worker<T> {
    fn drop(&mut self) {
        self.end();
    }
}

/// The threads that serve the queues of an active device. Most devices consist of these.
#[derive(Default)]
pub struct Workers(Mutex<Vec<Worker>>);

impl Workers {
    /// Adds a worker.
    pub fn add(&self, worker: Worker) {
        lock(&self.0).push(worker);
    }

    /// Stops all threads, and returns when they have ended. Most devices need nothing else for
    /// [`stop`](super::device::VirtioDevice::stop).
    pub fn stop(&self, why: StopFor) {
        let workers = lock(&self.0);
        // Asks all threads before it waits for one, so that none begins a request meanwhile.
        workers.iter().for_each(|worker| worker.ask(why));
        workers.iter().for_each(Worker::wait_end);
    }

    /// Returns the queues of all workers, in the order in which the workers were added. Stops
    /// threads that still run.
    pub fn take_back(&self) -> Vec<Virtq> {
        let workers = std::mem::take(&mut *lock(&self.0));
        workers.iter().for_each(|worker| worker.ask(StopFor::Reset));
        let queues = workers.into_iter().filter_map(Worker::stop);
        queues.flatten().collect()
    }
}

/// Sets DEVICE_NEEDS_RESET because of `why`. First notifies the driver of the buffers used so far.
fn give_up(queues: &mut [Virtq], why: &Broken) {
    for queue in queues.iter_mut() {
        // The broken queue may return an error.
        let _ = queue.notify();
    }
    if let Some(queue) = queues.first_mut() {
        queue.needs_reset(why);
    }
}

/// Waits until `kick` is signalled, and clears the signal.
pub fn wait(kick: &EventFd) {
    // After EINTR the callers look for work in vain, which is harmless.
    let _ = kick.read();
}
