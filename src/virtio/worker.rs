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

/// A thread that works for a device until it is stopped, and then gives back what it owned.
pub struct Worker<T: Send + 'static = Vec<Virtq>> {
    stop: Stop,
    wake: Arc<EventFd>,
    ended: Arc<Ended>,
    thread: Option<JoinHandle<T>>,
}

/// Whether a worker's thread has nothing left to do but to go.
#[derive(Default)]
struct Ended(Mutex<bool>, Condvar);

impl Ended {
    fn wait(&self) {
        let waited = self.1.wait_while(lock(&self.0), |ended| !*ended);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Tells at its end, also at that of a panic.
struct TellEnd(Arc<Ended>);

impl Drop for TellEnd {
    fn drop(&mut self) {
        *lock(&self.0.0) = true;
        self.0.1.notify_all();
    }
}

impl Worker {
    /// Starts a thread that runs `serve` on `queues`, at least one. `serve` returns when its
    /// [`Stop`] asks for that, which wakes the first queue's kick; or when the driver broke a
    /// queue: then the device needs a reset, and the thread waits for it. It is not called for queues
    /// of which one was broken before a pause. What was pushed is told in any case.
    ///
    /// # Errors
    /// The host has no resources for a thread; or there is no queue.
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
                // A broken one may refuse.
                let _ = queue.tell();
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
        let ended = Arc::<Ended>::default();
        let tell = TellEnd(Arc::clone(&ended));
        let thread = spawn(kind, name, move || {
            let _tell = tell;
            body(&asked)
        })?;
        Ok(Self {
            stop,
            wake,
            ended,
            thread: Some(thread),
        })
    }

    /// Ends the thread, which ends what it has begun, and takes what it owned. None where it
    /// panicked, which ends the process.
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

    /// Waits until the thread, which was asked to end, has ended what it had begun. What it owned is
    /// still to be taken.
    fn wait_end(&self) {
        self.ended.wait();
    }

    fn end(&mut self) -> Option<T> {
        let thread = self.thread.take()?;
        self.ask(StopFor::Reset);
        thread.join().ok()
    }
}

/// No thread outlives its device, whatever went wrong.
impl<T: Send + 'static> Drop for Worker<T> {
    fn drop(&mut self) {
        self.end();
    }
}

/// The threads that serve the queues of a device which is active: what most devices consist of.
#[derive(Default)]
pub struct Workers(Mutex<Vec<Worker>>);

impl Workers {
    /// Adds one that was started.
    pub fn add(&self, worker: Worker) {
        lock(&self.0).push(worker);
    }

    /// Ends all threads, and returns when they have ended what they had begun: all that most devices need
    /// for [`stop`](super::device::VirtioDevice::stop).
    pub fn stop(&self, why: StopFor) {
        let workers = lock(&self.0);
        // All at once: none begins anything while another is waited for.
        workers.iter().for_each(|worker| worker.ask(why));
        workers.iter().for_each(Worker::wait_end);
    }

    /// The queues of all, in the order in which they were added. Threads that were not stopped are.
    pub fn take_back(&self) -> Vec<Virtq> {
        let workers = std::mem::take(&mut *lock(&self.0));
        workers.iter().for_each(|worker| worker.ask(StopFor::Reset));
        let queues = workers.into_iter().filter_map(Worker::stop);
        queues.flatten().collect()
    }
}

/// Gives up the device for `why`: its driver finds DEVICE_NEEDS_RESET. What was done before is told all
/// the same.
fn give_up(queues: &mut [Virtq], why: &Broken) {
    for queue in queues.iter_mut() {
        // The broken one may refuse.
        let _ = queue.tell();
    }
    if let Some(queue) = queues.first_mut() {
        queue.needs_reset(why);
    }
}

/// Waits until `kick` is signalled, and takes the signal.
pub fn wait(kick: &EventFd) {
    // EINTR is no signal, but callers look whether there is work anyway.
    let _ = kick.read();
}
