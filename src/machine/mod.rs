//! The machine. `builder` builds it, [`layout`] is its memory map, and this module runs it.
//!
//! ```text
//! Machine::build --> running <--> paused    --> a signal, Ctrl-A X,   --> consoles drained,
//!                    ^   |    by a command      --timeout, a command,     terminal restored
//!                    |   v                      power-off, or a guest
//!                    reset, by the guest        that cannot go on
//!                    or a command
//! ```

mod builder;
mod command;
mod crash;
mod debug;
mod devices;
mod ending;
mod frozen;
mod hardware;
pub(crate) mod harts;
mod irqchip;
pub mod layout;
mod life;
mod mainloop;
mod meantime;
pub mod merge;
mod names;
mod outcome;
mod requirements;
mod restore;
pub mod show;
pub mod signals;
mod snapshot;
mod stats;
pub mod status;
mod tracking;
mod virtio;
mod watcher;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libc::SIGTERM;
use log::{debug, info, warn};

use crate::config::{ConsoleConfig, GdbConfig};
use crate::control::server::{Client, Server};
use crate::control::{Command, Reply, State};
use crate::devices::console::host::{Host, Keys};
use crate::trace::Tracer;
use crate::util::{RateLimit, guest_info};
pub use builder::Machine;
use debug::Debug;
use ending::Ending;
pub use frozen::Clock;
use life::Vcpus;
use mainloop::{Event, MainLoop, Post};
use meantime::Meantime;
pub use outcome::Outcome;
pub use restore::{SavedMachine, Unfit};
use signals::Signals;
pub use stats::Stats;
pub use virtio::{MakeDevice, disk_copy};

/// How long the console's reader may pause after somebody has requested the end. Without such a
/// request rvmm waits for the reader without a limit, like any program that writes to a pipe.
const DRAIN_PATIENCE: Duration = Duration::from_millis(500);

/// The latest time at which a machine ends, and the outcome then.
#[derive(Clone, Copy)]
struct Deadline {
    at: Option<Instant>,
    outcome: Outcome,
}

impl Deadline {
    /// The deadline of `--timeout`: after `time`, or none.
    fn after(time: Option<Duration>) -> Self {
        Self {
            at: time.and_then(|time| Instant::now().checked_add(time)),
            outcome: Outcome::TimedOut,
        }
    }

    /// The time that is left.
    fn left(&self) -> Duration {
        let left = |at: Instant| at.saturating_duration_since(Instant::now());
        self.at.map_or(Duration::MAX, left)
    }

    /// The earlier of the two deadlines.
    fn or(self, other: Self) -> Self {
        if other.left() < self.left() {
            other
        } else {
            self
        }
    }
}

/// How to run a machine.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// The host's end of the console.
    pub console: &'a ConsoleConfig,
    /// End the machine this long after its start.
    pub timeout: Option<Duration>,
    /// Whether a reset by the guest restarts it. If false, a reset ends the machine.
    pub reboot: bool,
    /// If set, collect [`Stats`]. The start-up time is counted from this instant.
    pub stats_from: Option<Instant>,
    /// The path of the control socket, if any.
    pub control: Option<&'a Path>,
    /// If set, record exits and the requests of disks.
    pub tracer: Option<&'a Tracer>,
    /// Where to wait for GDB, if at all.
    pub gdb: Option<&'a GdbConfig>,
    /// Start paused: the guest does not run before a command resumes it.
    pub paused: bool,
    /// What the guest's time does when a restored guest goes on at once.
    pub clock: Clock,
}

/// The state of a running machine.
struct Running<'a> {
    how: &'a Run<'a>,
    machine: Machine,
    main: MainLoop,
    post: Post,
    ending: Ending,
    deadline: Deadline,
    stats: Option<Stats>,
    /// With `--gdb`.
    debug: Option<Debug>,
    /// Number of resets so far.
    resets: u64,
}

/// How a life of the machine ended. A life goes from the start or a reset to the next reset or the
/// end.
enum End {
    /// The guest is to be restarted. A client that requested it gets a reply after the reset.
    Reset(Option<Client>),
    /// The machine has ended.
    Over(Outcome),
}

impl Machine {
    /// Runs the machine to its end, with as many resets as the guest requests. If somebody requests
    /// the end, and the machine does not end within five seconds, this function ends the process.
    /// Call [`signals::prepare`] before.
    ///
    /// # Errors
    /// Fails if the host or one of its files fails. A failure of the guest is an [`Outcome`], not
    /// an error.
    pub fn run(self, how: &Run) -> Result<(Outcome, Option<Stats>)> {
        if let Some(tracer) = how.tracer {
            // A machine runs once, so there is no tracer yet.
            let _ = self.backends.tracer.set(tracer.clone());
        }
        let (post, arrived) = Post::new().context("Failed to create an eventfd")?;
        let ending = Ending::new(post.clone());
        let running = Running {
            how,
            machine: self,
            main: MainLoop::new(&post, arrived)?,
            post,
            ending: ending.clone(),
            deadline: Deadline::after(how.timeout),
            stats: how.stats_from.map(Stats::since),
            debug: None,
            resets: 0,
        };
        let result = running.run();
        ending.came();
        result
    }
}

impl Running<'_> {
    fn run(mut self) -> Result<(Outcome, Option<Stats>)> {
        if let Some(at) = self.deadline.at {
            self.ending.expect(self.deadline.outcome, at);
        }
        // Do this first: creating the socket changes the process's umask, so no other thread may
        // create files.
        if let Some(path) = self.how.control {
            let (post, ending) = (self.post.clone(), self.ending.clone());
            let on_command = move |command, client| {
                let stops = command == Command::Stop;
                post.send(Event::Command(command, client));
                if stops {
                    // Start the time limit here: the machine may be busy.
                    ending.expect(Outcome::Commanded, Instant::now());
                }
            };
            self.main
                .add_server(Server::listen(path, Box::new(on_command))?);
        }
        if let Some(config) = self.how.gdb {
            self.listen_for_gdb(config)?;
        }
        let resized = self.machine.backends.console.clone();
        let on_resize = move || resized.iter().for_each(|console| console.resized());
        let presses = self.machine.backends.button.is_some();
        let signals = Signals::new(self.ending.clone(), presses, on_resize);
        self.main
            .add(Box::new(signals.context("Failed to wait for signals")?));
        let consoles = self.connect_consoles()?;
        let outcome = self.live_all();
        if let Ok(outcome) = outcome {
            self.ending.settle(outcome);
        }
        // Even after an error, write what the guest has written. End the devices first: their
        // threads may still hold output.
        self.main.set_clock(None);
        let hardware = self.machine.power_off();
        self.main.while_serving(move || drop(hardware))?;
        self.drain(consoles, !matches!(outcome, Ok(Outcome::Guest(_))));
        // This drops `Signals` too: from here on a signal ends the process at once.
        drop(self.main);
        if let Some(stats) = &mut self.stats {
            stats.put_away();
        }
        Ok((outcome?, self.stats))
    }

    /// Connects the console, and the second console if there is one, to the host.
    fn connect_consoles(&mut self) -> Result<Vec<Host>> {
        let machine = &self.machine;
        let first = ("the console", &machine.console, self.how.console);
        let second = (&machine.backends.console, &machine.config.virtio_console);
        let second = match second {
            (Some(console), Some(config)) => Some(("the second console (hvc0)", console, config)),
            _ => None,
        };
        let mut hosts = Vec::new();
        for (name, console, config) in [first].into_iter().chain(second) {
            let ending = self.ending.clone();
            let post = self.post.clone();
            let keys = Keys {
                on_leave: Some(Box::new(move || ending.ask(Outcome::Left))),
                on_report: Box::new(move || post.send(Event::Report)),
            };
            let (host, input) = Host::start(name, Arc::clone(console), config, keys)?;
            hosts.push(host);
            if let Some(input) = input {
                self.main.add(Box::new(input));
            }
        }
        Ok(hosts)
    }

    /// Writes the last output of the consoles. If `hurried`, or once somebody requests the end, a
    /// reader may pause for [`DRAIN_PATIENCE`] at most.
    fn drain(&mut self, consoles: Vec<Host>, mut hurried: bool) {
        for console in consoles {
            console.finish(|idle| {
                hurried |= self.main.asked_meanwhile(true).is_some();
                hurried |= self.deadline.left().is_zero();
                !hurried || idle < DRAIN_PATIENCE
            });
        }
    }

    /// Runs all lives, to the end of the last one.
    fn live_all(&mut self) -> Result<Outcome> {
        let mut state = match self.how.paused {
            true => State::Paused,
            false => State::Running,
        };
        loop {
            match self.live(&mut state)? {
                End::Over(outcome) => return Ok(outcome),
                End::Reset(client) => {
                    let machine = &mut self.machine;
                    self.main.set_clock(None);
                    self.main.while_serving(|| machine.reset())??;
                    self.resets += 1;
                    if let Some(client) = client {
                        self.main.answer(client, &Reply::Done);
                    }
                }
            }
        }
    }

    /// Runs one life: from the first instruction to a reset or the end. When this returns, no vCPU
    /// runs, and the console has the last output of this life. The life begins running or paused,
    /// by `state`, which is updated as commands change it.
    fn live(&mut self, state: &mut State) -> Result<End> {
        if let Some(stats) = &mut self.stats {
            stats.guest_starts();
        }
        let vcpus = self.machine.take_vcpus()?;
        let hardware = self.machine.hardware()?;
        self.main.set_clock(Some(Arc::clone(&hardware.rtc)));
        let ram = self.machine.ram();
        let mut vcpus = Vcpus::of_new(vcpus, ram, hardware.resets_harts, self.stats.is_some());
        let restored = self.machine.take_restored();
        let is_restored = restored.is_some();
        if let Some(restored) = restored {
            vcpus.restore(restored);
        }
        self.debug_life(&mut vcpus)?;
        self.begin(&mut vcpus, *state, is_restored)?;
        let end = self.watch(&mut vcpus);
        // The vCPUs of a guest that cannot go on are parked already, and it was not paused.
        *state = match &end {
            Ok(End::Reset(None)) => State::Running,
            _ => vcpus.state(),
        };
        if let Some(stats) = &mut self.stats {
            stats.guest_was(*state);
        }
        vcpus.park(&mut self.main)?;
        if let Ok(End::Over(outcome)) = &end {
            self.end_gdb(*outcome, &mut vcpus)?;
        }
        if let Some(stats) = &mut self.stats {
            let hardware = self.machine.hardware()?;
            stats.add(vcpus.counted(), |gpa| hardware.registers_at(gpa));
        }
        drop(vcpus);
        let is_over = !matches!(end, Ok(End::Reset(_)));
        let end = match self.main.asked_meanwhile(is_over) {
            Some(Event::Asked(asked)) => End::Over(asked),
            Some(_) => {
                self.press()?;
                end?
            }
            None => end?,
        };
        match end {
            End::Reset(_) => guest_info!(RateLimit::named("resets"), "the guest is reset"),
            // Log this before the console is drained, which may take long.
            End::Over(outcome) => info!("{outcome}"),
        }
        Ok(end)
    }

    /// Lets the vCPUs of a new life run, or leaves it paused, by `state`. The devices of a restored
    /// machine are paused.
    fn begin(&mut self, vcpus: &mut Vcpus, state: State, is_restored: bool) -> Result<()> {
        let hardware = self.machine.hardware()?;
        let runs = state == State::Running && !self.is_held();
        match (runs, is_restored) {
            (true, true) => {
                vcpus.resume(hardware, &self.post, self.how.clock)?;
                info!("the guest goes on");
            }
            (true, false) => {
                vcpus.start(hardware, &self.post)?;
                guest_info!(RateLimit::named("lives"), "the guest runs");
            }
            (false, true) if self.is_held() => {
                vcpus.thaw(self.how.clock)?;
                hardware.devices.resume();
            }
            (false, false) if !self.is_held() => hardware.devices.pause(),
            (false, _) => {}
        }
        match state {
            _ if self.is_held() => debug!("the guest waits for GDB"),
            State::Running => {}
            State::Paused => info!("the guest is paused: rvmm ctl PATH resume starts it"),
        }
        Ok(())
    }

    /// Handles events until one of them ends this life.
    fn watch(&mut self, vcpus: &mut Vcpus) -> Result<End> {
        let mut meantime = Meantime::new(self.machine.watcher());
        loop {
            meantime.replants(vcpus.wants_plants());
            match meantime.next_event(&mut self.main, vcpus.running(), &self.deadline)? {
                Some(Event::Gdb(number, said)) => {
                    if let Some(end) = self.said(number, said, vcpus)? {
                        return Ok(end);
                    }
                }
                Some(Event::Called) => {}
                Some(Event::Pressed) => {
                    // A paused guest could not power off, nor one that GDB has stopped.
                    if self.is_partly_held() {
                        self.detach(vcpus)?;
                    }
                    if let Err(error) = self.go_on(vcpus, Clock::Stop)? {
                        let error = anyhow::Error::from(error);
                        warn!("{error:#}: the guest cannot be asked to power off");
                        return Ok(End::Over(Outcome::Signal(SIGTERM)));
                    }
                    self.press()?;
                }
                Some(Event::Hangs(hart, hang)) => {
                    if let Some(end) = self.hangs(hart, hang, vcpus)? {
                        return Ok(end);
                    }
                }
                Some(Event::Report) => self.report_to_user(vcpus)?,
                Some(Event::Replant) => self.replant(vcpus)?,
                Some(Event::Vcpu(hart, end)) => {
                    if let Some(end) = self.stopped(hart, end?, vcpus)? {
                        return Ok(end);
                    }
                }
                Some(Event::Asked(outcome)) => return Ok(End::Over(outcome)),
                Some(Event::Command(command, client)) => {
                    if let Some(end) = self.obey(command, client, vcpus)? {
                        return Ok(end);
                    }
                }
                None => return Ok(End::Over(self.deadline.outcome)),
            }
        }
    }

    /// Asks the guest to power off, and sets a deadline for it.
    fn press(&mut self) -> Result<()> {
        let machine = &mut self.machine;
        let Some(patience) = machine.config.on_sigterm.patience() else {
            return Ok(());
        };
        let last = Deadline {
            outcome: Outcome::Overdue(SIGTERM),
            ..Deadline::after(Some(patience))
        };
        self.deadline = self.deadline.or(last);
        if let Some(at) = self.deadline.at {
            self.ending.expect(self.deadline.outcome, at);
        }
        // The devices of a machine that was paused may still be starting.
        let devices = &machine.hardware()?.devices;
        self.main.while_serving(|| devices.settle())?;
        if machine.backends.button.iter().any(|button| button.press()) {
            info!("SIGTERM: pressed the guest's power key");
        } else {
            info!("SIGTERM: the guest has no driver for the power key: sending SysRq to its UART");
            machine.hardware()?.sysrq_power_off();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
