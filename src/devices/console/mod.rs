//! The guest's console: two bounded queues between the guest and the host.
//!
//! The UART and the SBI debug console share them. A vCPU thread never waits here: when the output
//! queue is full the UART is not ready to transmit and a DBCN write is short. The host's side
//! ([`host`]) reads no more input than there is room for, but from a terminal, whose keys may be
//! for rvmm.

pub mod escape;
pub mod host;
pub mod terminal;

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::util::sync::lock;

/// Bytes of output kept for a reader that is slower than the guest.
pub const OUTPUT_CAPACITY: usize = 64 << 10;
/// With less room than this the listener counts the queue as full: a 16550A sends as much at once.
pub const LOW_ROOM: usize = 16;
/// Time between two writes to the host while a guest talks. The first byte after silence goes at
/// once.
const PACE: Duration = Duration::from_millis(1);
/// Bytes of input kept for a guest that is slower than the typist.
pub const INPUT_CAPACITY: usize = 64 << 10;

/// Told, on a host thread, that a queue's state has changed: input came, or room for output.
/// Called without any console lock held.
pub trait Listener: Send + Sync {
    /// Input may be waiting, or room for output be there again.
    fn console_changed(&self);
}

/// The queues. Only who takes output waits.
#[derive(Default)]
pub struct Console {
    queues: Mutex<Queues>,
    /// Output came, or the console was closed.
    output_ready: Condvar,
    /// Output was written to the host.
    output_drained: Condvar,
    listener: Mutex<Option<Weak<dyn Listener>>>,
    /// Wakes the host's side when there is room for input again.
    on_input_room: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Default)]
struct Queues {
    output: VecDeque<u8>,
    input: VecDeque<u8>,
    /// The host's side waits for room for input.
    wants_input_room: bool,
    /// Bytes that the writer has taken and not yet written.
    in_flight: usize,
    /// Counts completed writes, so that a drain sees progress.
    writes: u64,
    writer: Writer,
    /// Somebody waits for the queue to be empty.
    draining: bool,
    closed: bool,
}

/// What the thread that takes output does. Only one that waits is woken: a UART sends a byte at a
/// time, and a system call for each would cost more than the byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Writer {
    /// Writes what it took.
    #[default]
    Busy,
    /// Has written, and lets output gather for [`PACE`] before it takes more.
    Pacing,
    /// Waits for output.
    Idle,
}

/// The guest's side.
impl Console {
    /// Queues as much of `bytes` as there is room for, and tells how many.
    pub fn write(&self, bytes: &[u8]) -> usize {
        let mut queues = lock(&self.queues);
        let count = bytes.len().min(queues.output_room());
        queues.output.extend(&bytes[..count]);
        let wake = match queues.writer {
            Writer::Idle => count > 0,
            Writer::Pacing => queues.output.len() >= OUTPUT_CAPACITY / 2,
            Writer::Busy => false,
        };
        if wake {
            // Woken once is enough, however long it takes to come.
            queues.writer = Writer::Busy;
        }
        drop(queues);
        if wake {
            self.output_ready.notify_one();
        }
        count
    }

    /// Bytes that [`Console::write`] would take now.
    pub fn output_room(&self) -> usize {
        lock(&self.queues).output_room()
    }

    /// Takes waiting input into `bytes`, and tells how many.
    pub fn read(&self, bytes: &mut [u8]) -> usize {
        let mut queues = lock(&self.queues);
        let count = bytes.len().min(queues.input.len());
        for (byte, from) in bytes.iter_mut().zip(queues.input.drain(..count)) {
            *byte = from;
        }
        let wake = queues.wants_input_room && queues.input.len() <= INPUT_CAPACITY / 2;
        if wake {
            queues.wants_input_room = false;
        }
        drop(queues);
        if let Some(on_room) = self.on_input_room.get().filter(|_| wake) {
            on_room();
        }
        count
    }

    /// Bytes of input that wait.
    pub fn input_len(&self) -> usize {
        lock(&self.queues).input.len()
    }
}

/// The host's side.
impl Console {
    /// Sets who is told of changes: the UART, and after a reset the new one.
    pub fn set_listener(&self, listener: Weak<dyn Listener>) {
        *lock(&self.listener) = Some(listener);
    }

    /// Sets what wakes the host's side after [`Console::input_room`] was 0. It may be called on a
    /// vCPU's thread, without any console lock held, and must not wait. Only the first call counts.
    pub fn set_on_input_room(&self, wake: Box<dyn Fn() + Send + Sync>) {
        let _ = self.on_input_room.set(wake);
    }

    /// Bytes that [`Console::type_input`] would take now. After 0 the host's side is woken once the guest has
    /// taken half of what waits.
    pub fn input_room(&self) -> usize {
        let mut queues = lock(&self.queues);
        let room = INPUT_CAPACITY - queues.input.len();
        queues.wants_input_room = room == 0;
        room
    }

    /// Hands `bytes` to the guest as far as its queue has room; the rest is lost, as on a serial
    /// line. False when the console is closed.
    pub fn type_input(&self, bytes: &[u8]) -> bool {
        let mut queues = lock(&self.queues);
        let count = bytes.len().min(INPUT_CAPACITY - queues.input.len());
        queues.input.extend(&bytes[..count]);
        let open = !queues.closed;
        drop(queues);
        self.tell_listener();
        open
    }

    /// Waits for output and takes all of it into `bytes`, which is emptied first. False, without
    /// output, once the console is closed and all was taken. Each call says that what the one
    /// before took is written.
    pub fn take_output(&self, bytes: &mut Vec<u8>) -> bool {
        bytes.clear();
        let mut queues = lock(&self.queues);
        let was_full = queues.in_flight > 0 && queues.output_room() < LOW_ROOM;
        let has_written = std::mem::take(&mut queues.in_flight) > 0;
        queues.writes += 1;
        if queues.draining {
            self.output_drained.notify_all();
        }
        if was_full {
            drop(queues);
            self.tell_listener();
            queues = lock(&self.queues);
        }
        if has_written && !queues.is_urgent() {
            queues.writer = Writer::Pacing;
            let wait = self.output_ready.wait_timeout(queues, PACE);
            (queues, _) = wait.unwrap_or_else(PoisonError::into_inner);
        }
        while queues.output.is_empty() && !queues.closed {
            queues.writer = Writer::Idle;
            queues = self
                .output_ready
                .wait(queues)
                .unwrap_or_else(PoisonError::into_inner);
        }
        queues.writer = Writer::Busy;
        bytes.extend(queues.output.drain(..));
        queues.in_flight = bytes.len();
        !bytes.is_empty()
    }

    /// Ends the console: what is queued can still be taken, and input is refused.
    pub fn close(&self) {
        lock(&self.queues).closed = true;
        self.output_ready.notify_all();
    }

    /// Whether the console has ended.
    pub fn is_closed(&self) -> bool {
        lock(&self.queues).closed
    }

    /// Waits until all output is written. `patience` is asked now and then, with the time since
    /// some was written last; once it says false the wait ends, and the answer is false.
    pub fn drain(&self, mut patience: impl FnMut(Duration) -> bool) -> bool {
        const ASK: Duration = Duration::from_millis(50);
        let mut queues = lock(&self.queues);
        queues.draining = true;
        self.output_ready.notify_all();
        let (mut writes, mut since) = (queues.writes, Instant::now());
        while !queues.output.is_empty() || queues.in_flight > 0 {
            if queues.writes != writes {
                (writes, since) = (queues.writes, Instant::now());
            }
            // It may look after other things, which use the console.
            drop(queues);
            if !patience(since.elapsed()) {
                return false;
            }
            queues = lock(&self.queues);
            if queues.output.is_empty() && queues.in_flight == 0 {
                break;
            }
            let wait = self.output_drained.wait_timeout(queues, ASK);
            (queues, _) = wait.unwrap_or_else(PoisonError::into_inner);
        }
        queues.draining = false;
        true
    }

    /// Whoever looks at the console has a window of another size now.
    pub fn resized(&self) {
        self.tell_listener();
    }

    fn tell_listener(&self) {
        let listener = lock(&self.listener).as_ref().and_then(Weak::upgrade);
        if let Some(listener) = listener {
            listener.console_changed();
        }
    }
}

impl Queues {
    /// Whether output should not gather any longer.
    fn is_urgent(&self) -> bool {
        self.draining || self.closed || self.output.len() >= OUTPUT_CAPACITY / 2
    }

    /// What the writer has taken counts until it is written, or the queue would hold twice as much.
    fn output_room(&self) -> usize {
        OUTPUT_CAPACITY - (self.output.len() + self.in_flight).min(OUTPUT_CAPACITY)
    }
}

#[cfg(test)]
mod tests;
