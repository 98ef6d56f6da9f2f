//! A record of what a machine does: each exit to rvmm, and each request to a disk.
//!
//! The file is in the trace event format that Perfetto and Chrome read (JSON, an array of events).
//! `rvmm trace` prints it as text. vCPU threads and devices put events into a channel that holds
//! [`WAITING`] of them, and one thread writes the file. They never wait for that thread: if the
//! channel is full, or the file has reached its limit, events are dropped, counted, and the count
//! is in the file.

mod line;
pub mod read;
mod write;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::hypervisor::{VmEntry, VmExit};
use crate::util::ByteSize;
use crate::util::thread::{Kind, spawn};
use write::Writer;

/// The most events that wait to be written. Each takes about 150 bytes.
pub const WAITING: usize = 16 << 10;

/// The first bytes of a trace. No other program's trace begins so.
const BEGIN: &str = "[\n{\"name\":\"rvmm trace\",";

/// Something that happened.
#[derive(Clone, Debug)]
pub struct Event {
    /// Whose event it is.
    pub track: Track,
    /// When it began.
    pub at: Instant,
    /// How long it took.
    pub time: Duration,
    /// What it is.
    pub what: What,
}

/// Whose events stand in one row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Track {
    /// The vCPU of this hart.
    Vcpu(u32),
    /// A device's queue, such as `disk0.1`.
    Queue(Arc<str>, u16),
}

/// The kinds of events.
#[derive(Clone, Debug)]
pub enum What {
    /// An exit to rvmm, and its result. None if it ended the machine or needed more work.
    Exit(VmExit, Option<VmEntry>),
    /// A disk's request, from the moment the device took it from its queue to the moment it was
    /// returned to the driver.
    Request {
        /// What the request does, such as `read`.
        act: &'static str,
        /// Offset on the disk in bytes.
        offset: u64,
        /// Length of the data in bytes.
        bytes: u64,
        /// The result, such as `ok`.
        status: &'static str,
    },
}

/// Takes events. A clone refers to the same trace.
#[derive(Clone)]
pub struct Tracer(Arc<Shared>);

/// Holds a tracer once a machine runs with a trace.
pub type Slot = Arc<OnceLock<Tracer>>;

struct Shared {
    events: SyncSender<Message>,
    /// Events that found no room.
    dropped: AtomicU64,
    /// Events are not recorded for now.
    is_off: AtomicBool,
}

/// What the writer's thread gets.
enum Message {
    Event(Event),
    /// The end of the trace: no later event is written.
    End,
}

impl Tracer {
    /// Records `event`, or drops it if the writer is behind. Does not wait.
    pub fn record(&self, event: Event) {
        if self.0.is_off.load(Ordering::Relaxed) {
            return;
        }
        if self.0.events.try_send(Message::Event(event)).is_err() {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Records events from now on, or does not.
    pub fn switch(&self, on: bool) {
        self.0.is_off.store(!on, Ordering::Relaxed);
    }

    fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }
}

/// Writes a trace to a file, on a thread of its own.
pub struct Recorder {
    tracer: Tracer,
    thread: JoinHandle<io::Result<u64>>,
}

impl Recorder {
    /// Starts to write to `file`, which is empty, at most `limit` bytes. `place` names the device
    /// at a guest-physical address.
    ///
    /// # Errors
    /// Fails if the host has no resources for a thread, or if the file cannot be written.
    pub fn start(
        file: File,
        limit: ByteSize,
        place: fn(u64) -> Option<&'static str>,
    ) -> io::Result<Self> {
        let (events, arrived) = sync_channel(WAITING);
        let dropped = AtomicU64::new(0);
        let is_off = AtomicBool::new(false);
        let shared = Shared {
            events,
            dropped,
            is_off,
        };
        let tracer = Tracer(Arc::new(shared));
        let writer = Writer::new(file, limit, place)?;
        let counter = tracer.clone();
        let thread = spawn(Kind::Main, "trace", move || run(writer, &arrived, &counter))?;
        Ok(Self { tracer, thread })
    }

    /// The tracer for vCPUs and devices.
    pub fn tracer(&self) -> &Tracer {
        &self.tracer
    }

    /// Ends the trace, and waits until it is written. Returns the number of events that were
    /// dropped.
    ///
    /// # Errors
    /// Fails if the file could not be written.
    pub fn finish(self) -> io::Result<u64> {
        // This fails only if the writer has failed, which the thread returns.
        let _ = self.tracer.0.events.send(Message::End);
        let ended = self.thread.join();
        ended.unwrap_or_else(|_| Err(io::Error::other("the thread that writes it panicked")))
    }
}

fn run(mut writer: Writer, arrived: &Receiver<Message>, tracer: &Tracer) -> io::Result<u64> {
    for message in arrived {
        match message {
            Message::Event(event) => writer.event(&event)?,
            Message::End => break,
        }
    }
    writer.end(tracer.dropped())
}

/// Whether `head`, the start of a file, is that of a trace.
pub fn is_trace(head: &[u8]) -> bool {
    head.starts_with(BEGIN.as_bytes())
}

#[cfg(test)]
mod tests;
