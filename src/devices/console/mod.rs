//! The guest's console: two bounded queues between the guest and the host.
//!
//! The UART and the SBI debug console share the queues. A vCPU thread never blocks here: when the
//! output queue is full, the UART is not ready to transmit and a DBCN write is short. The host's
//! side ([`host`]) reads only as much input as the queue has room for. It always reads a terminal,
//! whose keys may be for rvmm.

pub mod escape;
pub mod host;
mod saved;
pub mod terminal;

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::util::sync::lock;
pub use saved::ConsoleState;

/// Capacity of the output queue in bytes.
pub const OUTPUT_CAPACITY: usize = 64 << 10;
/// The listener treats an output queue with less room than this as full, because a 16550A sends
/// this many bytes at once.
pub const LOW_ROOM: usize = 16;
/// Time between two writes to the host while the guest writes continuously. The first byte after a
/// silence is written at once.
const PACE: Duration = Duration::from_millis(1);
/// The number of lines after a silence of [`PACE`] that are written at once when they end: the
/// answer to a command does not wait, and a guest that writes continuously gains nothing.
const PROMPT_LINES: u8 = 4;
/// Capacity of the input queue in bytes.
pub const INPUT_CAPACITY: usize = 64 << 10;

/// Gets a call when the state of a queue has changed: input has arrived, or there is room for
/// output again. Called on a thread of the host's side, without any console lock held.
pub trait Listener: Send + Sync {
    /// There may be new input, or room for output again.
    fn console_changed(&self);
}

/// The queues. Only the thread that takes the output waits.
#[derive(Default)]
pub struct Console {
    queues: Mutex<Queues>,
    /// Signaled when there is output, or when the console was closed.
    output_ready: Condvar,
    /// Signaled when output was written to the host, while somebody drains the console.
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
    /// Bytes that the writer has taken but not written yet.
    in_flight: usize,
    /// Number of completed writes, so that [`Console::drain`] can see progress.
    writes: u64,
    writer: Writer,
    /// Lines since the last silence that were written at once.
    prompt_lines: u8,
    /// Somebody waits in [`Console::drain`] until all output is written.
    draining: bool,
    closed: bool,
}

/// State of the thread that takes output. It is woken only if it waits: a UART sends one byte at a
/// time, and a system call for each byte would be expensive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Writer {
    /// Writes the output that it took.
    #[default]
    Busy,
    /// Has written output, and waits for [`PACE`] before it takes more.
    Pacing,
    /// Waits for output.
    Idle,
}

/// The guest's side.
impl Console {
    /// Queues as much of `bytes` as there is room for, and returns the number of queued bytes.
    pub fn write(&self, bytes: &[u8]) -> usize {
        let mut queues = lock(&self.queues);
        let count = bytes.len().min(queues.output_room());
        queues.output.extend(&bytes[..count]);
        let wake = match queues.writer {
            Writer::Idle => count > 0,
            Writer::Pacing => {
                let has_line = bytes[..count].contains(&b'\n');
                has_line && queues.takes_line() || queues.output.len() >= OUTPUT_CAPACITY / 2
            }
            Writer::Busy => false,
        };
        if wake {
            // One wake-up is enough, however long the thread takes to run.
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

    /// Moves waiting input into `bytes`, and returns the number of bytes.
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

    /// Bytes of waiting input.
    pub fn input_len(&self) -> usize {
        lock(&self.queues).input.len()
    }
}

/// The host's side.
impl Console {
    /// Sets the listener for changes: the UART, and after a reset the new UART.
    pub fn set_listener(&self, listener: Weak<dyn Listener>) {
        *lock(&self.listener) = Some(listener);
    }

    /// Sets the function that wakes the host's side when there is room for input again after
    /// [`Console::input_room`] has returned 0. `wake` may be called on a vCPU's thread, without any
    /// console lock held. It must not block. Only the first call of this function has an effect.
    pub fn set_on_input_room(&self, wake: Box<dyn Fn() + Send + Sync>) {
        let _ = self.on_input_room.set(wake);
    }

    /// Bytes that [`Console::type_input`] would take now. If it returns 0, the host's side is woken
    /// once the guest has read half of the waiting input.
    pub fn input_room(&self) -> usize {
        let mut queues = lock(&self.queues);
        let room = INPUT_CAPACITY - queues.input.len();
        queues.wants_input_room = room == 0;
        room
    }

    /// Queues `bytes` as input for the guest. What does not fit in the queue is lost, as on a
    /// serial line. Returns false if the console is closed.
    pub fn type_input(&self, bytes: &[u8]) -> bool {
        let mut queues = lock(&self.queues);
        let count = bytes.len().min(INPUT_CAPACITY - queues.input.len());
        queues.input.extend(&bytes[..count]);
        let open = !queues.closed;
        drop(queues);
        self.notify_listener();
        open
    }

    /// Clears `bytes`, waits for output, and moves all of it into `bytes`. Each call also marks the
    /// output of the previous call as written. Returns false if the console is closed and all
    /// output was taken.
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
            self.notify_listener();
            queues = lock(&self.queues);
        }
        if has_written && !queues.is_urgent() && !queues.has_prompt_line() {
            queues.writer = Writer::Pacing;
            let wait = self.output_ready.wait_timeout(queues, PACE);
            (queues, _) = wait.unwrap_or_else(PoisonError::into_inner);
            if queues.output.is_empty() {
                queues.prompt_lines = 0;
            }
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

    /// Closes the console. Queued output can still be taken.
    pub fn close(&self) {
        lock(&self.queues).closed = true;
        self.output_ready.notify_all();
    }

    /// Whether the console is closed.
    pub fn is_closed(&self) -> bool {
        lock(&self.queues).closed
    }

    /// Waits until all output is written, and returns true. Calls `patience` at least every 50 ms
    /// with the time since the last progress; if that returns false, stops waiting and returns
    /// false.
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
            // Unlock meanwhile: `patience` may do other work that uses the console.
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

    /// Must be called when the size of the terminal window has changed.
    pub fn resized(&self) {
        self.notify_listener();
    }

    fn notify_listener(&self) {
        let listener = lock(&self.listener).as_ref().and_then(Weak::upgrade);
        if let Some(listener) = listener {
            listener.console_changed();
        }
    }
}

impl Queues {
    /// Whether output should be written without waiting for more.
    fn is_urgent(&self) -> bool {
        self.draining || self.closed || self.output.len() >= OUTPUT_CAPACITY / 2
    }

    /// Whether another line may be written at once. Counts it.
    fn takes_line(&mut self) -> bool {
        let is_prompt = self.prompt_lines < PROMPT_LINES;
        self.prompt_lines += u8::from(is_prompt);
        is_prompt
    }

    /// Whether a line has come while the writer was busy that is to be written at once. Counts it.
    fn has_prompt_line(&mut self) -> bool {
        self.output.contains(&b'\n') && self.takes_line()
    }

    /// The room in the output queue. Bytes that the writer has taken count until they are written;
    /// otherwise twice the capacity would be buffered.
    fn output_room(&self) -> usize {
        OUTPUT_CAPACITY - (self.output.len() + self.in_flight).min(OUTPUT_CAPACITY)
    }
}

#[cfg(test)]
mod tests;
