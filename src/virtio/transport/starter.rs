//! The thread that starts and stops a machine's devices.
//!
//! To start a device means to create threads and to open file descriptors. A vCPU's thread does
//! neither: it passes the device to the devices thread. The waits are:
//!
//! - Nobody waits for a start. Notifications stay in the queues' eventfds until the device serves
//!   them.
//! - The thread that stops a device waits until the device has stopped. First it waits itself for
//!   the requests that the device has begun, which may take as long as the host's disk does. Then
//!   it waits for the devices thread. So the devices thread never waits for a disk, and a slow
//!   device delays no other device.
//! - A start waits for earlier starts and stops of other devices. Those take a few milliseconds:
//!   threads to create or join, and system calls for taps and vhost.
//! - The devices thread takes no transport's lock. It takes only a seat's lock, and does not hold
//!   that while it starts or stops a device.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::{io, mem};

use crate::util::sync::lock;
use crate::util::thread::{Kind, spawn};
use crate::virtio::device::{Activation, VirtioDevice};
use crate::virtio::notify::Fault;
use crate::virtio::queue::Virtq;
use crate::virtio::stop::StopFor;

/// The devices thread. It ends when the last transport drops it.
pub struct Starter {
    /// Sends seats with work to the thread. `None` only while the thread ends.
    work: Option<Sender<Arc<Seat>>>,
    thread: Option<JoinHandle<()>>,
}

impl Starter {
    /// Starts the thread.
    ///
    /// # Errors
    /// Fails if the host has no resources for a thread.
    pub fn new() -> io::Result<Arc<Self>> {
        let (work, seats) = channel();
        let thread = spawn(Kind::Devices, "start", move || run(&seats))?;
        Ok(Arc::new(Self {
            work: Some(work),
            thread: Some(thread),
        }))
    }

    /// Passes work to the thread. False if the thread has ended, which happens only after a panic.
    fn hand(&self, seat: &Arc<Seat>) -> bool {
        let sent = self.work.as_ref().map(|work| work.send(Arc::clone(seat)));
        matches!(sent, Some(Ok(())))
    }
}

fn run(seats: &Receiver<Arc<Seat>>) {
    for seat in seats {
        seat.act();
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            // An error means that the thread panicked, which ends the process.
            let _ = thread.join();
        }
    }
}

/// A device as the devices thread sees it.
///
/// It has no reference to the [`Starter`]: the devices thread may be the last to drop a seat, and
/// cannot wait for its own end. At most one act is pending or running at a time: the owner of the
/// seat starts a device only if it has never been started, or after [`Seat::stop`] has returned.
pub(super) struct Seat {
    device: Arc<dyn VirtioDevice>,
    fault: Fault,
    state: Mutex<State>,
    settled: Condvar,
}

#[derive(Default)]
struct State {
    todo: Option<Act>,
    /// An act was passed to the devices thread and has not finished.
    busy: bool,
    /// The device has started successfully and has not stopped.
    active: bool,
    /// The queues that the last stop returned.
    queues: Vec<Virtq>,
}

enum Act {
    Start(Activation),
    Stop(StopFor),
}

impl Seat {
    pub(super) fn new(device: Arc<dyn VirtioDevice>, fault: Fault) -> Arc<Self> {
        Arc::new(Self {
            device,
            fault,
            state: Mutex::default(),
            settled: Condvar::new(),
        })
    }

    /// Lets the devices thread start the device, and does not wait. If the start fails, the driver
    /// finds DEVICE_NEEDS_RESET.
    pub(super) fn start(self: &Arc<Self>, starter: &Starter, activation: Activation) {
        self.hand(starter, Act::Start(activation));
    }

    /// Stops the device, and returns its queues when it has stopped; `None` if it had not started.
    /// First waits for a pending start. Only one thread may call this at a time, and it must hold
    /// no lock that others need.
    pub(super) fn stop(self: &Arc<Self>, starter: &Starter, why: StopFor) -> Option<Vec<Virtq>> {
        if !self.settle().active {
            return None;
        }
        // This may take long, so it does not run on the devices thread, which other devices need.
        self.device.stop(why);
        self.hand(starter, Act::Stop(why));
        Some(mem::take(&mut self.settle().queues))
    }

    /// Waits until a pending start or stop has finished.
    pub(super) fn wait_settled(&self) {
        drop(self.settle());
    }

    fn settle(&self) -> MutexGuard<'_, State> {
        let state = lock(&self.state);
        let settled = self.settled.wait_while(state, |state| state.busy);
        settled.unwrap_or_else(PoisonError::into_inner)
    }

    fn hand(self: &Arc<Self>, starter: &Starter, act: Act) {
        let mut state = lock(&self.state);
        state.todo = Some(act);
        state.busy = true;
        drop(state);
        if !starter.hand(self) {
            let mut state = lock(&self.state);
            (state.todo, state.busy) = (None, false);
            drop(state);
            self.fault.needs_reset("the devices thread has ended");
        }
    }

    /// Does the pending act. Runs on the devices thread.
    fn act(&self) {
        let Some(act) = lock(&self.state).todo.take() else {
            return;
        };
        let (active, queues) = match act {
            Act::Start(activation) => {
                let started = self.device.activate(activation);
                let failed = started.inspect_err(|error| self.fault.needs_reset(error));
                (failed.is_ok(), Vec::new())
            }
            Act::Stop(why) => (false, self.device.deactivate(why)),
        };
        let mut state = lock(&self.state);
        state.active = active;
        state.queues = queues;
        state.busy = false;
        drop(state);
        self.settled.notify_all();
    }
}
