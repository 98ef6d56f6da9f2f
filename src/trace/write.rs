//! Writes events as lines of JSON.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::time::Instant;

use serde_json::{Value, json};

use super::line::{Line, args, name};
use super::{BEGIN, Event, Track, What};
use crate::util::ByteSize;

/// Room that is kept for the last lines.
const LAST_LINES: u64 = 512;

/// The number of the first row that is not a vCPU's.
const QUEUES: u32 = 1000;

/// Writes one file.
pub(super) struct Writer {
    file: BufWriter<File>,
    began: Instant,
    /// Bytes that may still be written.
    left: u64,
    place: fn(u64) -> Option<&'static str>,
    /// The rows that have a name, by track.
    rows: HashMap<Track, u32>,
    /// Events that did not fit in the file.
    dropped: u64,
}

impl Writer {
    /// Begins a file of at most `limit` bytes.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub(super) fn new(
        file: File,
        limit: ByteSize,
        place: fn(u64) -> Option<&'static str>,
    ) -> io::Result<Self> {
        let mut writer = Self {
            file: BufWriter::new(file),
            began: Instant::now(),
            left: limit.bytes().saturating_sub(LAST_LINES),
            place,
            rows: HashMap::new(),
            dropped: 0,
        };
        let version = env!("CARGO_PKG_VERSION");
        let first =
            format!("{BEGIN}\"ph\":\"M\",\"pid\":1,\"args\":{{\"version\":\"{version}\"}}}},\n");
        writer.text(&first)?;
        Ok(writer)
    }

    /// Writes `event`, if it fits.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub(super) fn event(&mut self, event: &Event) -> io::Result<()> {
        let tid = self.row(&event.track)?;
        let since = event.at.saturating_duration_since(self.began);
        let line = Line {
            name: name(&event.what, self.place),
            cat: match event.what {
                What::Exit(..) => "exit".into(),
                What::Request { .. } => "request".into(),
            },
            ph: "X".into(),
            pid: 1,
            tid,
            ts: since.as_secs_f64() * 1e6,
            dur: event.time.as_secs_f64() * 1e6,
            args: args(&event.what),
        };
        let text = serde_json::to_string(&line).map_err(io::Error::other)? + ",\n";
        match self.text(&text)? {
            true => Ok(()),
            false => {
                self.dropped += 1;
                Ok(())
            }
        }
    }

    /// Writes the last lines. `missed` events did not reach the writer. Returns the number of
    /// events that are not in the file.
    ///
    /// # Errors
    /// Fails if the file cannot be written.
    pub(super) fn end(mut self, missed: u64) -> io::Result<u64> {
        let dropped = self.dropped + missed;
        let last = json!({"name": "end", "ph": "M", "pid": 1, "args": {"dropped": dropped}});
        self.left += LAST_LINES;
        self.text(&format!("{last}\n]\n"))?;
        self.file.flush()?;
        Ok(dropped)
    }

    /// The number of the row of `track`. Names the row if it is new.
    fn row(&mut self, track: &Track) -> io::Result<u32> {
        if let Some(row) = self.rows.get(track) {
            return Ok(*row);
        }
        let others = self
            .rows
            .keys()
            .filter(|track| !matches!(track, Track::Vcpu(_)));
        let (row, name) = match track {
            Track::Vcpu(hart) => (hart + 1, format!("vcpu-{hart}")),
            Track::Queue(device, queue) => {
                let number = u32::try_from(others.count()).unwrap_or(u32::MAX - QUEUES);
                (QUEUES + number, format!("{device}.{queue}"))
            }
        };
        let args = json!({"name": name});
        let line: Value =
            json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": args});
        self.text(&format!("{line},\n"))?;
        self.rows.insert(track.clone(), row);
        Ok(row)
    }

    /// Writes `text` if it fits. Returns whether it did.
    fn text(&mut self, text: &str) -> io::Result<bool> {
        let length = text.len() as u64;
        if length > self.left {
            return Ok(false);
        }
        self.left -= length;
        self.file.write_all(text.as_bytes())?;
        Ok(true)
    }
}
