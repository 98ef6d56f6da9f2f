//! The thread that starts and stops a machine's devices.
//!
//! A start makes threads and opens descriptors. A vCPU's thread does neither: it hands the device over, and
//! the devices thread does it. Who waits for whom:
//!
//! - A start is waited for by nobody. Notifications stay in the queues' eventfds until the device serves.
//! - Who stops a device waits until it has stopped: on its own thread for what the device has begun, which
//!   may take as long as the host's disk does, and then for the devices thread. So the devices thread
//!   itself never waits for a disk, and a slow device delays no other.
//! - A device's start waits for the starts and stops of others that came before it. They take a few
//!   milliseconds: threads to start or to join, and calls of the host's kernel for taps and vhost.
//! - The devices thread takes no lock of a transport: only a seat's, and never while a device works.

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

/// The devices thread. It ends with the last transport that has it.
pub struct Starter {
    /// Seats with work. None only while the thread is ended.
    work: Option<Sender<Arc<Seat>>>,
    thread: Option<JoinHandle<()>>,
}

impl Starter {
    /// Starts the thread.
    ///
    /// # Errors
    /// The host has no resources for another thread.
    pub fn new() -> io::Result<Arc<Self>> {
        let (work, seats) = channel();
        let thread = spawn(Kind::Devices, "start", move || run(&seats))?;
        Ok(Arc::new(Self {
            work: Some(work),
            thread: Some(thread),
        }))
    }

    /// False where the thread has ended, which only a panic makes it do.
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
            // A panic has ended the process.
            let _ = thread.join();
        }
    }
}

/// A device as the devices thread knows it. It has no part in the [`Starter`]: the thread may be the last
/// to drop a seat, and could not wait for its own end. At most one act waits or is under way at a time: whoever owns
/// the seat starts a device only when it has never started, or when [`Seat::stop`] has returned.
pub(super) struct Seat {
    device: Arc<dyn VirtioDevice>,
    fault: Fault,
    state: Mutex<State>,
    settled: Condvar,
}

#[derive(Default)]
struct State {
    todo: Option<Act>,
    /// An act was handed over, and has not ended.
    busy: bool,
    /// The device was started, and that went well.
    active: bool,
    /// What the last stop gave back.
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

    /// Has the device started, and does not wait for that. If it fails, the driver finds
    /// DEVICE_NEEDS_RESET.
    pub(super) fn start(self: &Arc<Self>, starter: &Starter, activation: Activation) {
        self.hand(starter, Act::Start(activation));
    }

    /// Stops the device, and returns when it has stopped, with the queues that it had; with none where
    /// it did not start. Waits for a start that is under way. Called by one thread at a time, which
    /// holds no lock that others need.
    pub(super) fn stop(self: &Arc<Self>, starter: &Starter, why: StopFor) -> Option<Vec<Virtq>> {
        if !self.settle().active {
            return None;
        }
        // Here, not on the devices thread, which others need meanwhile.
        self.device.stop(why);
        self.hand(starter, Act::Stop(why));
        Some(mem::take(&mut self.settle().queues))
    }

    /// Waits until the device has started or stopped, whatever was wanted last.
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

    /// Does what was handed over: on the devices thread.
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
