//! The groups "snapshot" and "clones": a guest that waits at its prompt is saved and restored.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::contestants::Contestant;
use crate::figures::Figures;
use crate::measure::{Lab, Running, millis};
use crate::memory;

/// The guest answers each typed line.
const ANSWERING: &str = "console=ttyS0 quiet panic=-1 rvmm.action=answer";
const READY: &str = "rvmm-guest: ready";
const QUESTION: &str = "ping\n";
const ANSWER: &str = "rvmm-guest: got ping";

/// A kernel that has just booted is busy with itself.
const BUSY: Duration = Duration::from_secs(5);
/// How long clones wait at their prompt before their memory is measured.
const IDLE: Duration = Duration::from_secs(10);
/// After this time, nothing is left of machines that have ended.
const GONE: Duration = Duration::from_secs(1);

/// A guest that answers typed lines.
struct Guest {
    running: Running,
    /// Its prompt stays open as long as this.
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Guest {
    fn start(mut command: Command) -> Result<Self> {
        let mut running = Running::spawn(command.stdin(Stdio::piped()))?;
        Ok(Self {
            input: running.stdin()?,
            output: BufReader::new(running.stdout()?),
            running,
        })
    }

    fn wait_for(&mut self, line: &str) -> Result<()> {
        let mut all = String::new();
        loop {
            let from = all.len();
            let length = self.output.read_line(&mut all)?;
            ensure!(length > 0, "it ended before {line:?}; it wrote {all:?}");
            if all[from..].contains(line) {
                return Ok(());
            }
        }
    }

    /// Types a line. The answer is still to come.
    fn ask(&mut self) -> Result<()> {
        Ok(self.input.write_all(QUESTION.as_bytes())?)
    }

    fn wait_for_answer(&mut self) -> Result<()> {
        self.wait_for(ANSWER)
    }
}

/// The times to take a snapshot and to restore it.
pub(crate) fn snapshot(lab: &Lab, contestant: &Contestant, figures: &mut Figures) -> Result<()> {
    let dir = lab.dir().join(contestant.snapshot());
    if contestant.is_machine() {
        take(lab, contestant, &dir, Some(figures))?;
    }
    // A line was typed, and waits. The guest's terminal echoes it, and then the shell answers.
    let mut guest = Guest::start(contestant.restore(&dir)?)?;
    guest.ask()?;
    guest.output.fill_buf()?;
    let to_byte = guest.running.millis();
    guest.wait_for_answer()?;
    let to_line = guest.running.millis();
    for (name, took) in [
        ("restore to the first byte", to_byte),
        ("restore to the answer", to_line),
    ] {
        figures.add(name, "ms", &contestant.name, took);
    }
    Ok(())
}

/// Boots a guest and takes a snapshot of it in `dir`. The guest must go on after that.
fn take(
    lab: &Lab,
    contestant: &Contestant,
    dir: &Path,
    figures: Option<&mut Figures>,
) -> Result<()> {
    let socket = lab.dir().join("socket");
    let mut command = contestant.command(&lab.linux(ANSWERING))?;
    command.arg("--ctl").arg(&socket);
    let mut guest = Guest::start(command)?;
    guest.wait_for(READY)?;
    sleep(BUSY);
    let mut take = |more: &[&str]| {
        if dir.exists() {
            fs::remove_dir_all(dir)?;
        }
        let path = dir.display().to_string();
        let words = [&["snapshot", &path], more].concat();
        let mut command = contestant.control(&socket, &words)?;
        let began = Instant::now();
        let output = command.stderr(Stdio::inherit()).output()?;
        let took = millis(began.elapsed());
        ensure!(output.status.success(), "{}", output.status);
        let frozen = frozen(&String::from_utf8_lossy(&output.stdout))?;
        guest.ask()?;
        guest.wait_for_answer().context("after the snapshot")?;
        Ok((took, frozen))
    };
    if let Some(figures) = figures {
        let mut add = |name: &str, unit, value| figures.add(name, unit, &contestant.name, value);
        let (took, frozen) = take(&["--live"])?;
        add("snapshot --live", "ms", took);
        add("snapshot --live, frozen", "ms", frozen);
        let (took, frozen) = take(&[])?;
        add("snapshot", "ms", took);
        add("snapshot, frozen", "ms", frozen);
        add("snapshot, written", "MB", written(dir)?);
    } else {
        take(&[])?;
    }
    Ok(())
}

/// The milliseconds in a line "37.8 MiB of memory written; the guest was frozen for 119.0 ms".
fn frozen(output: &str) -> Result<f64> {
    let number = output.trim_end().rsplit(' ').nth(1);
    let number = number.with_context(|| format!("it wrote {output:?}"))?;
    number
        .parse()
        .with_context(|| format!("it wrote {output:?}"))
}

/// Megabytes of the files in `dir` that are no holes.
fn written(dir: &Path) -> Result<f64> {
    let mut blocks = 0;
    for entry in fs::read_dir(dir)? {
        blocks += entry?.metadata()?.blocks();
    }
    Ok(blocks as f64 * 512.0 / 1e6)
}

/// Many guests restored from one snapshot at once: their time, and their memory while they wait at
/// their prompt and while they are paused.
pub(crate) fn clones(lab: &Lab, contestant: &Contestant, figures: &mut Figures) -> Result<()> {
    let dir = lab.dir().join(contestant.snapshot());
    if !dir.exists() {
        take(lab, contestant, &dir, None)?;
    }
    let count = f64::from(lab.clones);
    let mut add = |name: &str, unit, value| figures.add(name, unit, &contestant.name, value);
    sleep(GONE);
    let before = memory::available()?;
    let mut guests = Vec::new();
    let began = Instant::now();
    for _ in 0..lab.clones {
        let mut guest = Guest::start(contestant.restore(&dir)?)?;
        guest.ask()?;
        guests.push(guest);
    }
    for guest in &mut guests {
        guest.wait_for_answer()?;
    }
    add("a clone's answer", "ms", millis(began.elapsed()) / count);
    sleep(IDLE);
    let of_each = |before: u64, guests: &[Guest]| -> Result<[f64; 2]> {
        let of_host = before.saturating_sub(memory::available()?);
        let mut pss = 0;
        for guest in guests {
            pss += memory::all(guest.running.id())?;
        }
        Ok([pss, of_host].map(|kib| kib as f64 * 1024.0 / 1e6 / count))
    };
    let [pss, of_host] = of_each(before, &guests)?;
    add("a clone at its prompt, Pss", "MB", pss);
    add("a clone at its prompt, of host", "MB", of_host);
    drop(guests);
    sleep(GONE);
    let before = memory::available()?;
    let mut guests = Vec::new();
    for number in 0..lab.clones {
        let socket = lab.dir().join(format!("socket-{number}"));
        let mut command = contestant.restore(&dir)?;
        command.arg("--pause").arg("--ctl").arg(&socket);
        guests.push((Guest::start(command)?, socket));
    }
    let mut paused = Vec::new();
    for (mut guest, socket) in guests {
        while !is_served(&socket)? {
            ensure!(guest.running.is_there()?, "it ended early");
            sleep(Duration::from_millis(1));
        }
        paused.push(guest);
    }
    let [pss, of_host] = of_each(before, &paused)?;
    add("a paused clone, Pss", "MB", pss);
    add("a paused clone, of host", "MB", of_host);
    Ok(())
}

/// Whether a machine answers commands.
fn is_served(socket: &Path) -> Result<bool> {
    let Ok(mut stream) = UnixStream::connect(socket) else {
        return Ok(false);
    };
    stream.write_all(b"{\"command\":\"status\"}\n")?;
    Ok(stream.read(&mut [0; 1024])? > 0)
}
