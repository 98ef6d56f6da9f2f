//! The `rvmm` command: parses the command line, sets up logging, runs the machine, and turns its
//! outcome into an exit status.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, IsTerminal, Write};
use std::path::{self, Path};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use log::LevelFilter;
use rustix::process::{Resource, getrlimit, setrlimit};
use rvmm::boot::fdt;
use rvmm::cli::{self, Act, Cli, Command, Request, Restore, RunFlags, SnapshotAct};
use rvmm::config::{ConsoleConfig, TraceConfig};
use rvmm::control::{Reply, client};
use rvmm::devices::console::terminal;
use rvmm::fork;
use rvmm::hypervisor::Hypervisor;
use rvmm::info::Info;
use rvmm::machine::{
    Clock, Machine, Outcome, Run, SavedMachine, Stats, Unfit, layout, merge, show, signals, status,
};
use rvmm::trace::read::{Filter, ReadError};
use rvmm::trace::{self, Recorder};
use rvmm::util::outfile::{Whole, append, stream_to};
use rvmm::util::output::{self, Unwaiting};
use rvmm::util::stderr::{Stderr, print};
use rvmm::util::{Hex, on_one_line};
use serde_json::Value;

fn main() -> ExitCode {
    let began = Instant::now();
    signals::prepare();
    match cli::parse(std::env::args_os()) {
        Request::Run(cli) => run(&cli, began),
        Request::Do(Command::Info { json }) => match info(json) {
            Ok(text) => print_stdout(text),
            Err(error) => failed(&error),
        },
        Request::Do(Command::Trace {
            file,
            slowest,
            kind,
            vcpu,
            summary,
        }) => {
            let filter = Filter {
                kind,
                vcpu,
                slowest,
                summary,
            };
            match print_trace(&file, &filter) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => failed(&error),
            }
        }
        Request::Do(Command::Restore(restore)) => restored(&restore, began),
        Request::Do(Command::Snapshot { act }) => match snapshot(&act) {
            Ok(text) => print_stdout(text),
            Err(error) => failed(&error),
        },
        Request::Do(Command::Ctl { path, act }) => match ctl(&path, &act) {
            Ok(text) => print_stdout(text),
            Err(error) => failed(&error),
        },
        Request::Print(text) => print_stdout(text),
        Request::Refuse(message, status) => end(&message, status),
    }
}

/// `rvmm ctl`. Returns what is to be printed on standard output.
fn ctl(path: &Path, act: &Act) -> Result<Vec<u8>> {
    if let Act::Fork(fork) = act {
        return Ok(fork::fork(path, fork)?.into());
    }
    let command = act.command();
    let command = command.context("Failed to find the working directory")?;
    let reply = client::ask(path, command.context("there is no such command")?)?;
    let json = |value: &Value| serde_json::to_string_pretty(value).map(|text| text + "\n");
    Ok(match (reply, act) {
        (Reply::Status(status), Act::Status { json: true }) => {
            json(&serde_json::to_value(status)?)?.into()
        }
        (Reply::Status(status), _) => status.to_string().into(),
        (Reply::Stats(stats), _) => json(&stats)?.into(),
        (Reply::DeviceTree(Hex(tree)), Act::DumpDtb { file: Some(file) }) => {
            dump_tree(file, &tree)
                .with_context(|| format!("Failed to write device tree {file:?}"))?;
            Vec::new()
        }
        (Reply::DeviceTree(Hex(tree)), _) => tree,
        (Reply::Report(text), _) => text.into(),
        (Reply::Snapshot(taken), _) => taken.to_string().into(),
        (Reply::Done | Reply::Refused(_), _) => Vec::new(),
    })
}

/// Prints `bytes` on standard output. It is no error if the reader closes the pipe early.
fn print_stdout(bytes: impl AsRef<[u8]>) -> ExitCode {
    match output::write_whole(io::stdout(), bytes.as_ref()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            let message = format!("Failed to write to standard output: {error}");
            end(&message, status::HOST_FAILED)
        }
        _ => ExitCode::SUCCESS,
    }
}

/// `rvmm info`. Returns the text to print.
fn info(json: bool) -> Result<String> {
    let info = Info::gather(open_hypervisor()?.as_ref())?;
    if json {
        return Ok(serde_json::to_string_pretty(&info)? + "\n");
    }
    Ok(info.to_string())
}

/// `rvmm trace`. It is no error if the reader closes the pipe early.
fn print_trace(path: &Path, filter: &Filter) -> Result<()> {
    let failed = || format!("Failed to print trace {path:?}");
    let file = BufReader::new(File::open(path).with_context(failed)?);
    let mut out = BufWriter::new(io::stdout());
    let printed = trace::read::print(file, filter, &mut out);
    match printed.and_then(|()| Ok(out.flush()?)) {
        Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            // Do not write the rest.
            drop(out.into_parts());
            Ok(())
        }
        printed => printed.with_context(failed),
    }
}

/// Raises the limit of open files to its maximum: each device needs a dozen descriptors or more,
/// and each queue a few.
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // If this fails, the old limit stays.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Runs a new machine.
fn run(cli: &Cli, began: Instant) -> ExitCode {
    ending_well(&cli.run, || {
        let hypervisor = open_hypervisor;
        if let Some(path) = &cli.dump_dtb {
            let machine = Machine::build(&cli.vm, hypervisor()?)?;
            dump_tree(path, machine.device_tree())
                .with_context(|| format!("Failed to write device tree {path:?}"))?;
            return Ok(None);
        }
        let build = || Machine::build(&cli.vm, hypervisor()?);
        run_machine(&cli.run, &cli.vm.console, Clock::Stop, began, build).map(Some)
    })
}

/// Runs the machine of a snapshot.
fn restored(restore: &Restore, began: Instant) -> ExitCode {
    ending_well(&restore.run, || {
        let saved = SavedMachine::open(&restore.dir)?;
        let config = restore.apply(saved.config()).map_err(anyhow::Error::msg)?;
        let console = config.console.clone();
        let build = || Machine::restore(config, saved, open_hypervisor()?);
        run_machine(&restore.run, &console, restore.clock.into(), began, build).map(Some)
    })
}

/// `rvmm snapshot`. Returns the text to print.
fn snapshot(act: &SnapshotAct) -> Result<String> {
    match act {
        SnapshotAct::Show { dir, json } => {
            let shown = show::Shown::of(&SavedMachine::open(dir)?)?;
            Ok(match json {
                true => shown.json()?,
                false => shown.to_string(),
            })
        }
        SnapshotAct::Verify { dir } => show::verify(&SavedMachine::open(dir)?),
        SnapshotAct::Merge { dirs, into } => {
            let into = path::absolute(into).context("Failed to find the working directory")?;
            merge::merge(dirs, &into).map(|()| String::new())
        }
    }
}

/// Sets up the process, calls `work`, and turns its result into an exit code.
fn ending_well(flags: &RunFlags, work: impl FnOnce() -> Result<Option<Outcome>>) -> ExitCode {
    end_on_panic();
    raise_descriptor_limit();
    if let Err(error) = start_logging(flags) {
        return failed(&error);
    }
    let (message, status) = match work() {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(outcome)) if outcome.is_expected() => {
            return ExitCode::from(outcome.exit_status());
        }
        Ok(Some(outcome)) => (outcome.to_string(), outcome.exit_status()),
        Err(error) if error.is::<Unfit>() => return failed(&error),
        Err(error) => (with_way_out(&error), status::HOST_FAILED),
    };
    if flags.log_file.is_some() {
        // The log goes only to the file, so write the message to both.
        log::error!("{}", on_one_line(&message));
    }
    end(&message, status)
}

/// Ends rvmm because the host or one of its files failed.
fn failed(error: &anyhow::Error) -> ExitCode {
    if let Some(Unfit(lines)) = error.downcast_ref() {
        // Each is a reason of its own.
        let lines = lines
            .iter()
            .map(|line| format!("rvmm: {}", on_one_line(line)));
        lines.for_each(print);
        return ExitCode::from(status::HOST_FAILED);
    }
    end(&with_way_out(error), status::HOST_FAILED)
}

/// The message of `error`. For errors that can occur in many places, it includes a way out.
fn with_way_out(error: &anyhow::Error) -> String {
    let errors = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>());
    let way_out = match errors.filter_map(io::Error::raw_os_error).last() {
        Some(libc::EMFILE) => ": raise the limit of open files with ulimit -n",
        Some(libc::ENFILE) => ": raise the host's limit of open files with sysctl fs.file-max",
        _ => "",
    };
    format!("{error:#}{way_out}")
}

/// Prints why rvmm ends, as one line, and returns the exit code.
fn end(message: &str, status: u8) -> ExitCode {
    print(format_args!("rvmm: {}", on_one_line(message)));
    ExitCode::from(status)
}

/// Makes a panic on any thread end the process: it is a bug in rvmm. Restores the terminal and
/// prints one line before.
fn end_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        terminal::restore();
        let place = panic.location().map(ToString::to_string);
        let place = place.unwrap_or_default();
        let payload = panic.payload();
        let message = payload.downcast_ref::<&str>().copied();
        let message = message.or(payload.downcast_ref::<String>().map(String::as_str));
        let message = message.unwrap_or("no message");
        print(format_args!(
            "rvmm: internal error at {place}: {message}; please report it"
        ));
        std::process::exit(status::HOST_FAILED.into());
    }));
}

/// Builds and runs a machine.
fn run_machine(
    flags: &RunFlags,
    console: &ConsoleConfig,
    clock: Clock,
    began: Instant,
    build: impl FnOnce() -> Result<Machine>,
) -> Result<Outcome> {
    // Check the file before the guest runs.
    let statistics = match &flags.stats {
        Some(Some(path)) => Some((path.as_path(), statistics_file(path)?)),
        _ => None,
    };
    let machine = build()?;
    let recorder = match &flags.trace {
        Some(trace) => Some(record(trace)?),
        None => None,
    };
    let ended = machine.run(&Run {
        tracer: recorder.as_ref().map(Recorder::tracer),
        console,
        timeout: flags.timeout.map(|time| time.0),
        reboot: !flags.no_reboot,
        stats_from: flags.stats.is_some().then_some(began),
        control: flags.ctl.as_deref(),
        gdb: flags.gdb.as_ref(),
        paused: flags.pause,
        clock,
    });
    // Also if the machine has failed.
    let is_recorded = match (recorder, &flags.trace) {
        (Some(recorder), Some(trace)) => end_record(recorder, &trace.path),
        _ => Ok(()),
    };
    let (outcome, stats) = ended?;
    if let Some(stats) = stats {
        report_stats(&stats, statistics)?;
    }
    is_recorded?;
    Ok(outcome)
}

/// Ends the trace in the file at `path`.
fn end_record(recorder: Recorder, path: &Path) -> Result<()> {
    let dropped = recorder
        .finish()
        .with_context(|| format!("Failed to write trace {path:?}"))?;
    if dropped > 0 {
        log::warn!(
            "trace {path:?} lacks {dropped} events: they came too fast, or the file is full"
        );
    }
    Ok(())
}

/// Opens the file of `--trace`, and starts to write it.
fn record(config: &TraceConfig) -> Result<Recorder> {
    let TraceConfig { path, limit } = config;
    let file = stream_to(path, trace::is_trace);
    let recorder = file.and_then(|file| Recorder::start(file, *limit, layout::owner));
    recorder.with_context(|| format!("Failed to write trace {path:?}"))
}

/// Writes the statistics of `--stats`: as JSON to `file`, or as text to standard error if there is
/// no file or it cannot be written.
fn report_stats(stats: &Stats, file: Option<(&Path, Whole)>) -> Result<()> {
    let written = file.map(|(path, file)| {
        let json = format!("{:#}\n", stats.json());
        file.write(json.as_bytes())
            .with_context(|| format!("Failed to write statistics {path:?}"))
    });
    match written {
        Some(Ok(())) => Ok(()),
        failed => {
            // Line by line, because standard error may not take all of the text at once.
            stats.to_string().lines().for_each(print);
            failed.unwrap_or(Ok(()))
        }
    }
}

/// Writes a device tree to `path`, which must be new, empty or hold an earlier tree.
fn dump_tree(path: &Path, tree: &[u8]) -> io::Result<()> {
    Whole::prepare(path, fdt::is_ours)?.write(tree)
}

/// Prepares the file for statistics, which must be new, empty or hold earlier statistics.
fn statistics_file(path: &Path) -> Result<Whole> {
    Whole::prepare(path, Stats::is_json)
        .with_context(|| format!("Failed to write statistics {path:?}"))
}

#[cfg(target_arch = "riscv64")]
fn open_hypervisor() -> Result<Arc<dyn Hypervisor>> {
    Ok(Arc::new(rvmm::hypervisor::kvm::Kvm::open()?))
}

#[cfg(not(target_arch = "riscv64"))]
fn open_hypervisor() -> Result<Arc<dyn Hypervisor>> {
    Err(rvmm::hypervisor::host::Unfit::NotRiscv(std::env::consts::ARCH).into())
}

fn start_logging(flags: &RunFlags) -> Result<()> {
    let level = match flags.verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        _ => LevelFilter::Debug,
    };
    // The terminal may be in raw mode for the guest, where a newline alone does not return to the
    // first column.
    let on_terminal = flags.log_file.is_none() && io::stderr().is_terminal();
    let line_end = if on_terminal { "\r\n" } else { "\n" };
    let mut logger = env_logger::Builder::new();
    // Do not log messages of other crates: those about wrong data of the guest have no rate limit.
    logger.filter_module("rvmm", level);
    logger.format(move |buffer, record| {
        let level = record.level().as_str().to_ascii_lowercase();
        write!(buffer, "rvmm: {level}: {}{line_end}", record.args())
    });
    // vCPU threads write log lines, and must not block if nobody reads standard error.
    logger.target(env_logger::Target::Pipe(Box::new(Stderr)));
    if let Some(path) = &flags.log_file {
        let file = append(path).with_context(|| format!("Failed to open log file {path:?}"))?;
        let file = Unwaiting::new(file)?;
        logger.target(env_logger::Target::Pipe(Box::new(file)));
    }
    logger.init();
    Ok(())
}
