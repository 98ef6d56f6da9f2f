//! Prints a trace as text: `rvmm trace`.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::{self, BufRead, Write};

use serde_json::Value;
use thiserror::Error;

use super::is_trace;
use super::line::Line;

/// The longest line that is read, in bytes. rvmm writes none that is longer.
const LINE_MAX: usize = 4096;

/// Why a file cannot be printed.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The file cannot be read, or the text cannot be written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The file is no trace of rvmm.
    #[error("it is no trace of rvmm: give the FILE of --trace")]
    NoTrace,
    /// A line is damaged.
    #[error("line {0} is damaged")]
    Line(u64),
}

/// The events to print.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only events whose name contains this text, in any case.
    pub kind: Option<String>,
    /// Only the events of this hart's vCPU.
    pub vcpu: Option<u32>,
    /// Only so many events, those that took longest, the longest first.
    pub slowest: Option<usize>,
    /// No events, only the summary.
    pub summary: bool,
}

impl Filter {
    fn has(&self, line: &Line) -> bool {
        let kind = self.kind.as_ref().map(|kind| kind.to_lowercase());
        let is_kind = kind.is_none_or(|kind| line.name.to_lowercase().contains(&kind));
        let is_vcpu = self
            .vcpu
            .is_none_or(|hart| line.tid == hart.saturating_add(1));
        line.ph == "X" && is_kind && is_vcpu
    }
}

/// The events of one name.
#[derive(Default)]
struct Total {
    count: u64,
    time: f64,
    longest: f64,
}

/// Prints the events of `file` that `filter` selects, and a summary of them, to `out`.
///
/// # Errors
/// Fails if `file` is not a trace or is damaged, and if `out` cannot be written.
pub fn print(
    mut file: impl BufRead,
    filter: &Filter,
    out: &mut impl Write,
) -> Result<(), ReadError> {
    let mut printer = Printer::new(filter, out);
    let head = file.fill_buf()?;
    if !is_trace(head) {
        return Err(ReadError::NoTrace);
    }
    let mut bytes = Vec::new();
    for number in 1.. {
        bytes.clear();
        let length = io::Read::take(&mut file, LINE_MAX as u64).read_until(b'\n', &mut bytes)?;
        if length == 0 {
            break;
        }
        let is_whole = bytes.last() == Some(&b'\n');
        let text = bytes.trim_ascii_end();
        let text = text.strip_suffix(b",").unwrap_or(text);
        if text == b"[" || text == b"]" {
            continue;
        }
        match serde_json::from_slice(text) {
            Ok(line) => printer.line(line)?,
            // rvmm was killed while it wrote this line.
            Err(_) if !is_whole && length < LINE_MAX => break,
            Err(_) => return Err(ReadError::Line(number)),
        }
    }
    Ok(printer.end()?)
}

struct Printer<'a, W> {
    filter: &'a Filter,
    out: &'a mut W,
    rows: HashMap<u32, String>,
    /// With `--slowest`: the slowest so far, the slowest first.
    slowest: Vec<Line>,
    totals: BTreeMap<String, Total>,
    /// Events that are not in the file. None if the file has no end.
    dropped: Option<u64>,
}

impl<'a, W: Write> Printer<'a, W> {
    fn new(filter: &'a Filter, out: &'a mut W) -> Self {
        Self {
            filter,
            out,
            rows: HashMap::new(),
            slowest: Vec::new(),
            totals: BTreeMap::new(),
            dropped: None,
        }
    }

    fn line(&mut self, line: Line) -> io::Result<()> {
        let number = |key: &str| line.args.get(key).and_then(Value::as_u64);
        match line.name.as_str() {
            "thread_name" => {
                let name = line.args.get("name").and_then(Value::as_str);
                self.rows
                    .insert(line.tid, name.unwrap_or_default().to_owned());
            }
            "end" if line.ph == "M" => self.dropped = number("dropped"),
            _ if self.filter.has(&line) => return self.event(line),
            _ => {}
        }
        Ok(())
    }

    fn event(&mut self, line: Line) -> io::Result<()> {
        let total = self.totals.entry(line.name.clone()).or_default();
        total.count += 1;
        total.time += line.dur;
        total.longest = total.longest.max(line.dur);
        if self.filter.summary {
            return Ok(());
        }
        let Some(most) = self.filter.slowest else {
            return self.print(&line);
        };
        let place = self
            .slowest
            .partition_point(|slower| slower.dur >= line.dur);
        if place < most {
            self.slowest.insert(place, line);
            self.slowest.truncate(most);
        }
        Ok(())
    }

    fn print(&mut self, line: &Line) -> io::Result<()> {
        let row = self.rows.get(&line.tid).map_or("?", String::as_str);
        let (at, name, time) = (line.ts / 1e6, &line.name, Micros(line.dur));
        write!(self.out, "{at:12.6} {row:<8} {time:>10}  {name}")?;
        for (name, value) in &line.args {
            match value {
                Value::String(text) => write!(self.out, " {name}={text}")?,
                Value::Array(values) => {
                    let values: Vec<&str> = values.iter().filter_map(Value::as_str).collect();
                    write!(self.out, " {name}={}", values.join(","))?;
                }
                value => write!(self.out, " {name}={value}")?,
            }
        }
        writeln!(self.out)
    }

    fn end(mut self) -> io::Result<()> {
        for line in std::mem::take(&mut self.slowest) {
            self.print(&line)?;
        }
        let mut totals: Vec<_> = std::mem::take(&mut self.totals).into_iter().collect();
        totals.sort_by(|(_, a), (_, b)| b.time.total_cmp(&a.time));
        if !self.filter.summary && !totals.is_empty() {
            writeln!(self.out)?;
        }
        writeln!(
            self.out,
            "{:<32} {:>9} {:>12} {:>10} {:>10}",
            "events", "number", "time", "mean", "longest"
        )?;
        for (name, total) in totals {
            // Far fewer than 2^53 events.
            #[allow(clippy::cast_precision_loss)]
            let mean = total.time / total.count as f64;
            let (time, mean) = (Micros(total.time), Micros(mean));
            let (count, longest) = (total.count, Micros(total.longest));
            writeln!(
                self.out,
                "{name:<32} {count:>9} {time:>12} {mean:>10} {longest:>10}"
            )?;
        }
        match self.dropped {
            Some(0) => Ok(()),
            Some(dropped) => writeln!(self.out, "{dropped} events were dropped"),
            None => writeln!(self.out, "the trace has no end: rvmm was killed"),
        }
    }
}

/// Microseconds, printed in a unit that fits.
struct Micros(f64);

impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(micros) = *self;
        let text = match micros {
            ..1000.0 => format!("{micros:.1} us"),
            ..1_000_000.0 => format!("{:.1} ms", micros / 1e3),
            _ => format!("{:.1} s", micros / 1e6),
        };
        f.pad(&text)
    }
}
