//! One run of one contestant.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::contestants::{Contestant, Job, MEM_MIB};
use crate::figures::Figures;
use crate::memory;

/// The same command line for all. The kernel runs `poweroff -f` as its init, so that the boot is
/// measured.
const QUIET: &str = "console=ttyS0 quiet panic=-1 rdinit=/bin/poweroff -- -f";
const LOGGING: &str = "console=ttyS0 panic=-1 rdinit=/bin/poweroff -- -f";
const CLOCK: &str = "console=ttyS0 quiet panic=-1 rvmm.action=clock";
const PROCESSES: &str = "console=ttyS0 quiet panic=-1 rvmm.action=processes";
const WAITING: &str = "console=ttyS0 quiet panic=-1 rvmm.action=echo";

/// The size of the kernel file for the first byte of output, about that of Debian's kernel.
const PADDED: usize = 31 << 20;
const HUGE_PAGE_MIB: u64 = 2;

/// L1 as the measurements see it.
pub(crate) struct Lab {
    dir: PathBuf,
    linux: PathBuf,
    initrd: PathBuf,
    io_initrd: PathBuf,
    guests: PathBuf,
    padded: PathBuf,
    /// Ticks per second of the guests' timer, which is the host's.
    timebase: f64,
    /// Number of guests that are restored at once.
    pub(crate) clones: u32,
    /// Disks and networks do one of so many parts of the usual work.
    pub(crate) part: u32,
    /// The number of short processes.
    processes: u32,
}

impl Lab {
    /// If `quick`, what is measured may be smaller than usual.
    pub(crate) fn set_up(quick: bool) -> Result<Self> {
        let dir = PathBuf::from("/tmp/bench");
        fs::create_dir_all(&dir)?;
        let guests = PathBuf::from(std::env::var("RVMM_TEST_GUESTS")?);
        let lab = Self {
            linux: std::env::var("RVMM_TEST_KERNEL")?.into(),
            initrd: guests.join("initramfs.cpio.gz"),
            io_initrd: guests.join("io.cpio.gz"),
            padded: dir.join("padded.img"),
            timebase: timebase()?,
            clones: if quick { 5 } else { 100 },
            part: if quick { 16 } else { 1 },
            processes: if quick { 25 } else { 250 },
            guests,
            dir,
        };
        pad(&lab.guests.join("firstbyte.img"), &lab.padded)?;
        Ok(lab)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Boots Linux once, with rvmm's statistics in `path`.
    pub(crate) fn boot_with_stats(&self, rvmm: &Contestant, path: &Path) -> Result<()> {
        let mut command = rvmm.command(&self.linux(QUIET))?;
        command.arg(format!("--stats={}", path.display()));
        let output = command.stdin(Stdio::null()).output()?;
        ensure!(output.status.success(), "{}", output.status);
        Ok(())
    }

    /// Linux with this command line.
    pub(crate) fn linux<'a>(&'a self, cmdline: &'a str) -> Job<'a> {
        Job {
            kernel: &self.linux,
            initrd: Some(&self.initrd),
            cmdline,
            cpus: 1,
            hugepages: false,
            disk: None,
            link: None,
        }
    }

    /// Linux with the drivers and the program for disks and networks.
    pub(crate) fn io<'a>(&'a self, cmdline: &'a str) -> Job<'a> {
        Job {
            initrd: Some(&self.io_initrd),
            ..self.linux(cmdline)
        }
    }

    /// Microseconds for each of `count` events that took `ticks` together.
    fn micros_each(&self, count: f64, ticks: f64) -> f64 {
        ticks / self.timebase * 1e6 / count
    }
}

fn timebase() -> Result<f64> {
    let path = "/proc/device-tree/cpus/timebase-frequency";
    let cells = fs::read(path).context(path)?;
    let hertz = cells
        .iter()
        .fold(0u64, |sum, byte| (sum << 8) | u64::from(*byte));
    Ok(hertz as f64)
}

/// The guest at `from` as a kernel of `PADDED` bytes without holes.
fn pad(from: &Path, to: &Path) -> Result<()> {
    const IMAGE_SIZE: std::ops::Range<usize> = 16..24;
    let mut image = fs::read(from)?;
    image.resize(PADDED, 0xa5);
    image[IMAGE_SIZE].copy_from_slice(&(PADDED as u64).to_le_bytes());
    Ok(fs::write(to, image)?)
}

/// No run takes so long. A contestant that still runs then hangs, and is killed.
const LIMIT: Duration = Duration::from_secs(60);

/// A running contestant. It is killed if it still runs when dropped, or after [`LIMIT`].
pub(crate) struct Running {
    child: Child,
    began: Instant,
    /// Dropped, it ends the watch.
    _watch: Sender<()>,
}

impl Running {
    fn start(contestant: &Contestant, job: &Job) -> Result<Self> {
        Self::spawn(contestant.command(job)?.stdin(Stdio::null()))
    }

    /// Starts `command`, with its output to be read.
    pub(crate) fn spawn(command: &mut Command) -> Result<Self> {
        command.stdout(Stdio::piped()).stderr(Stdio::inherit());
        let began = Instant::now();
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let (watch, over) = channel();
        let pid = rustix::process::Pid::from_child(&child);
        std::thread::spawn(move || {
            if over.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        });
        Ok(Self {
            child,
            began,
            _watch: watch,
        })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub(crate) fn is_there(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Milliseconds since its start.
    pub(crate) fn millis(&self) -> f64 {
        millis(self.began.elapsed())
    }

    pub(crate) fn stdin(&mut self) -> Result<ChildStdin> {
        self.child.stdin.take().context("no stdin")
    }

    pub(crate) fn stdout(&mut self) -> Result<ChildStdout> {
        self.child.stdout.take().context("no stdout")
    }

    /// Milliseconds until it has ended, its output, and its exit status.
    fn finish(mut self) -> Result<(f64, String, ExitStatus)> {
        let mut output = Vec::new();
        self.stdout()?.read_to_end(&mut output)?;
        let status = self.child.wait()?;
        let took = self.millis();
        Ok((took, String::from_utf8_lossy(&output).into_owned(), status))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Runs `job` to its end. Returns the milliseconds and the output.
pub(crate) fn run(contestant: &Contestant, job: &Job) -> Result<(f64, String)> {
    let (took, output, status) = Running::start(contestant, job)?.finish()?;
    ensure!(status.success(), "{status}; it wrote {:?}", tail(&output));
    Ok((took, output))
}

pub(crate) fn tail(output: &str) -> &str {
    let from = output.char_indices().rev().nth(300).map_or(0, |(at, _)| at);
    &output[from..]
}

/// Runs Linux until it powers off, and checks that it did: the kernel prints that even with
/// `quiet`.
fn run_to_power_off(contestant: &Contestant, job: &Job) -> Result<(f64, String)> {
    let (took, output) = run(contestant, job)?;
    ensure!(
        output.contains("reboot: Power down"),
        "it wrote {:?}",
        tail(&output)
    );
    Ok((took, output))
}

/// From the start of the process to Linux' power-off.
pub(crate) fn boot(lab: &Lab, contestant: &Contestant, figures: &mut Figures) -> Result<()> {
    let (took, _) = run_to_power_off(contestant, &lab.linux(QUIET))?;
    figures.add("start to power-off", "ms", &contestant.name, took);
    Ok(())
}

/// The same with guest RAM in the host's reserved huge pages.
pub(crate) fn boot_in_hugepages(
    lab: &Lab,
    contestant: &Contestant,
    figures: &mut Figures,
) -> Result<()> {
    let job = Job {
        hugepages: true,
        ..lab.linux(QUIET)
    };
    with_pages_for(contestant, &job, |job| {
        let (took, _) = run_to_power_off(contestant, job)?;
        figures.add("start to power-off, 2M pages", "ms", &contestant.name, took);
        Ok(())
    })
}

/// The same with the kernel's log on the console.
pub(crate) fn boot_with_log(
    lab: &Lab,
    contestant: &Contestant,
    figures: &mut Figures,
) -> Result<()> {
    if !contestant.is_machine() {
        return Ok(());
    }
    let (took, output) = run_to_power_off(contestant, &lab.linux(LOGGING))?;
    ensure!(output.contains("Linux version"), "no log");
    figures.add("start to power-off, with log", "ms", &contestant.name, took);
    Ok(())
}

/// The guest's own clock when its first process starts. Needs a console that works both ways.
pub(crate) fn clock_at_init(
    lab: &Lab,
    contestant: &Contestant,
    figures: &mut Figures,
) -> Result<()> {
    if !contestant.is_machine() {
        return Ok(());
    }
    let (_, output) = run(contestant, &lab.linux(CLOCK))?;
    let seconds = init_stamp(&output).context("no line about /init")?;
    figures.add("clock at /init", "ms", &contestant.name, seconds * 1e3);
    Ok(())
}

/// The milliseconds of a line "[    0.841366] Run /init as init process".
fn init_stamp(output: &str) -> Option<f64> {
    let line = output.lines().find(|line| line.contains("] Run /init"))?;
    let stamp = line.split(['[', ']']).nth(1)?;
    stamp.trim().parse().ok()
}

/// Short processes, one after the other, in a guest of four vCPUs, by its own clock.
pub(crate) fn processes(lab: &Lab, contestant: &Contestant, figures: &mut Figures) -> Result<()> {
    let cmdline = format!("{PROCESSES} rvmm.processes={}", lab.processes);
    let job = Job {
        cpus: 4,
        ..lab.linux(&cmdline)
    };
    if !contestant.is_machine() || !contestant.can(&job) {
        return Ok(());
    }
    let (_, output) = run(contestant, &job)?;
    let line = output
        .lines()
        .find_map(|line| line.strip_prefix("rvmm-guest: processes "));
    let words: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
    let [count, from, to] = words[..] else {
        bail!("it wrote {:?}", tail(&output));
    };
    let seconds = to.parse::<f64>()? - from.parse::<f64>()?;
    let each = seconds * 1e3 / count.parse::<f64>()?;
    figures.add("a short process, 4 vCPUs", "ms", &contestant.name, each);
    Ok(())
}

/// From the start of the process to the first byte of a guest that stores one at once, as a kernel
/// as large as Debian's.
pub(crate) fn first_byte(lab: &Lab, contestant: &Contestant, figures: &mut Figures) -> Result<()> {
    let job = Job {
        kernel: &lab.padded,
        initrd: None,
        cmdline: "",
        cpus: 1,
        hugepages: false,
        disk: None,
        link: None,
    };
    let mut running = Running::start(contestant, &job)?;
    let mut byte = [0];
    let mut stdout = running.stdout()?;
    // A peer may print something before its guest does.
    while byte[0] != b'!' {
        stdout.read_exact(&mut byte).context("no byte came")?;
    }
    let took = running.millis();
    let status = running.child.wait()?;
    ensure!(status.success(), "{status}");
    figures.add("start to first byte", "ms", &contestant.name, took);
    Ok(())
}

/// The cost of exits, by the guest's timer.
pub(crate) fn exits(lab: &Lab, contestant: &Contestant, figures: &mut Figures) -> Result<()> {
    let kernel = lab.guests.join("exits.img");
    let (_, output) = run(contestant, &guest(&kernel, false))?;
    let mut found = 0;
    for line in output.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["exits:", kind, count, ticks] = words[..] else {
            continue;
        };
        let name = match kind {
            "read" => "MMIO read",
            "write" => "MMIO write",
            "dbcn" => "SBI DBCN call",
            "base" => "SBI BASE call",
            other => bail!("what is {other}?"),
        };
        let each = lab.micros_each(count.parse()?, ticks.parse()?);
        figures.add(name, "us", &contestant.name, each);
        found += 1;
    }
    ensure!(found > 0, "it wrote {:?}", tail(&output));
    Ok(())
}

/// The cost of the first touch of a page, without and with huge pages.
pub(crate) fn pages(lab: &Lab, contestant: &Contestant, figures: &mut Figures) -> Result<()> {
    let kernel = lab.guests.join("pages.img");
    for (hugepages, name) in [
        (false, "first touch of 4K"),
        (true, "first touch of 4K, 2M pages"),
    ] {
        with_pages_for(contestant, &guest(&kernel, hugepages), |job| {
            let (_, output) = run(contestant, job)?;
            let line = output.lines().find(|line| line.starts_with("pages:"));
            let words: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
            let ["pages:", count, ticks] = words[..] else {
                bail!("it wrote {:?}", tail(&output));
            };
            let each = lab.micros_each(count.parse()?, ticks.parse()?);
            figures.add(name, "us", &contestant.name, each);
            Ok(())
        })?;
    }
    Ok(())
}

fn guest(kernel: &Path, hugepages: bool) -> Job<'_> {
    Job {
        kernel,
        initrd: None,
        cmdline: "",
        cpus: 1,
        hugepages,
        disk: None,
        link: None,
    }
}

/// The memory beside guest RAM of a VMM whose Linux waits for input, and then the time from SIGTERM
/// to its end.
pub(crate) fn memory_and_term(
    lab: &Lab,
    contestant: &Contestant,
    figures: &mut Figures,
) -> Result<()> {
    if !contestant.is_machine() {
        return Ok(());
    }
    let mut running = Running::start(contestant, &lab.linux(WAITING))?;
    let mut lines = BufReader::new(running.stdout()?).lines();
    loop {
        let line = lines.next().context("it ended before it was ready")??;
        if line.contains("rvmm-guest: ready") {
            break;
        }
    }
    let kib = memory::beside_ram(running.id())?;
    figures.add(
        "memory beside guest RAM",
        "MB",
        &contestant.name,
        kib as f64 * 1024.0 / 1e6,
    );
    let pid = rustix::process::Pid::from_child(&running.child);
    let asked = Instant::now();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    running.child.wait()?;
    figures.add(
        "SIGTERM to end",
        "ms",
        &contestant.name,
        millis(asked.elapsed()),
    );
    Ok(())
}

/// Reserves huge pages while a job that needs them runs. Other jobs should not have less memory
/// because of them.
fn with_pages_for(
    contestant: &Contestant,
    job: &Job,
    run: impl FnOnce(&Job) -> Result<()>,
) -> Result<()> {
    if !contestant.can(job) {
        return Ok(());
    }
    if !job.hugepages {
        return run(job);
    }
    let reserve = |count: u64| fs::write("/proc/sys/vm/nr_hugepages", count.to_string());
    reserve(MEM_MIB / HUGE_PAGE_MIB)?;
    let result = run(job);
    reserve(0)?;
    result
}
