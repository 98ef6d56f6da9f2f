//! The main loop: the machine's main thread waits for everything that controls the machine.
//!
//! It waits for the descriptors of signals, of the consoles' input, of the control socket and of
//! the RTC's alarm. vCPU threads and the handlers of these descriptors send it an [`Event`] with a
//! [`Post`]. `Machine::run` handles the events. The queues of disks and networks have their own
//! threads.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::mem::take;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use log::warn;
use vmm_sys_util::eventfd::EventFd;

use super::Outcome;
use super::watcher::Hang;
use crate::control::server::{Client, Server};
use crate::control::{Command, Reply};
use crate::devices::goldfish_rtc::GoldfishRtc;
use crate::gdb::link::{Number, Said};
use crate::hypervisor;
use crate::util::sync::lock;
use crate::util::thread::{Kind, spawn_scoped};
use crate::vcpu::Stop;

/// An event that `Machine::run` handles.
#[derive(Debug)]
pub(super) enum Event {
    /// The thread of this hart's vCPU ended.
    Vcpu(u32, hypervisor::Result<Stop>),
    /// Somebody requested the end of the machine.
    Asked(Outcome),
    /// Somebody requested that the guest powers off: its power key is to be pressed.
    Pressed,
    /// A vCPU wants to be kicked.
    Called,
    /// The user typed Ctrl-A R: report what the harts are doing.
    Report,
    /// Breakpoints wait for their address to be mapped: look again.
    Replant,
    /// This hart gets nowhere.
    Hangs(u32, Hang),
    /// What GDB does.
    Gdb(Number, Said),
    /// A client of the control socket has sent a command.
    Command(Command, Client),
}

/// Sends events to the main loop, from any thread.
#[derive(Clone)]
pub(super) struct Post {
    events: Sender<Event>,
    wake: Arc<EventFd>,
}

impl Post {
    /// Sends `event`. Once the machine has ended, the event is dropped.
    pub(super) fn send(&self, event: Event) {
        let _ = self.events.send(event);
        // This fails only if 2^64 events wait.
        let _ = self.wake.write(1);
    }

    /// Creates a post, and the receiver of its events.
    ///
    /// # Errors
    /// Fails if the host has no descriptors left.
    pub(super) fn new() -> std::io::Result<(Self, Receiver<Event>)> {
        let (events, arrived) = channel();
        let wake = Arc::new(EventFd::new(libc::EFD_CLOEXEC)?);
        Ok((Self { events, wake }, arrived))
    }
}

/// A source of events: a subscriber of the loop. It sends an [`Event`], or acts at once.
pub(super) type Source = Box<dyn MutEventSubscriber>;

/// The loop.
pub(super) struct MainLoop {
    manager: EventManager<Source>,
    arrived: Receiver<Event>,
    /// Events that arrived earlier and were put aside, such as commands while the machine ended a
    /// life.
    deferred: VecDeque<Event>,
    server: Option<(SubscriberId, Rc<RefCell<Server>>)>,
    alarm: Option<SubscriberId>,
}

impl MainLoop {
    /// Creates a loop that waits for the events of `post`. `arrived` is the receiver of `post`.
    ///
    /// # Errors
    /// Fails if the host has no descriptors left.
    pub(super) fn new(post: &Post, arrived: Receiver<Event>) -> Result<Self> {
        let manager = EventManager::new().map_err(|e| failed("create", &e))?;
        let mut main = Self {
            manager,
            arrived,
            deferred: VecDeque::new(),
            server: None,
            alarm: None,
        };
        main.add(Box::new(Wake(Arc::clone(&post.wake))));
        Ok(main)
    }

    /// Adds `source`: the loop waits for it from now on.
    pub(super) fn add(&mut self, source: Source) -> SubscriberId {
        self.manager.add_subscriber(source)
    }

    /// Adds the server of the control socket.
    pub(super) fn add_server(&mut self, server: Rc<RefCell<Server>>) {
        let id = self.add(Box::new(Rc::clone(&server)));
        self.server = Some((id, server));
    }

    /// Waits for the alarms of `rtc` instead of those of the previous RTC.
    pub(super) fn set_clock(&mut self, rtc: Option<Arc<GoldfishRtc>>) {
        if let Some(before) = self.alarm.take() {
            if let Err(error) = self.manager.remove_subscriber(before) {
                warn!("Failed to stop waiting for the guest's clock: {error}");
            }
        }
        self.alarm = rtc.map(|rtc| self.add(Box::new(Alarm(rtc))));
    }

    /// Sends `reply` to `client`, if it is still connected.
    pub(super) fn answer(&mut self, client: Client, reply: &Reply) {
        if let Some((id, server)) = &self.server {
            if let Ok(mut ops) = self.manager.event_ops(*id) {
                server.borrow_mut().answer(client, reply, &mut ops);
            }
        }
    }

    /// Waits for the next event. Returns none when `time` is over.
    ///
    /// # Errors
    /// Fails if the host cannot wait for events.
    pub(super) fn next(&mut self, time: Duration) -> Result<Option<Event>> {
        let until = Instant::now().checked_add(time);
        // Handle signals first, however many commands wait.
        self.wait(Some(Duration::ZERO))?;
        if let Some(event) = self.deferred.pop_front() {
            return Ok(Some(event));
        }
        loop {
            if let Ok(event) = self.arrived.try_recv() {
                return Ok(Some(event));
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            self.wait(left)?;
        }
    }

    /// Lets all sources that are ready act now. Their events are queued for [`MainLoop::next`].
    fn serve(&mut self) {
        if let Err(error) = self.wait(Some(Duration::ZERO)) {
            warn!("{error:#}");
        }
    }

    fn wait(&mut self, time: Option<Duration>) -> Result<()> {
        const FOR_EVER: i32 = -1;
        let milliseconds = time.map_or(FOR_EVER, |time| {
            // Round up: waking too early would cost one more turn of the loop. div_ceil would do it
            // too, but its division of 128 bits is a function with a table that stays in memory.
            let up = time.saturating_add(Duration::from_nanos(999_999));
            i32::try_from(up.as_millis()).unwrap_or(i32::MAX)
        });
        match self.manager.run_with_timeout(milliseconds) {
            Ok(_) => Ok(()),
            Err(error) => Err(failed("wait for", &error)),
        }
    }

    /// Handles the events that arrived while the machine ended a life. Returns a request for the
    /// end, or else a request to press the power key, if there was one. Events of vCPUs are
    /// dropped: the other vCPUs stopped because the first one did. Commands wait for the next life;
    /// if the machine `is_over` they are refused.
    pub(super) fn asked_meanwhile(&mut self, is_over: bool) -> Option<Event> {
        self.serve();
        let mut first = None;
        let mut events = take(&mut self.deferred);
        events.extend(self.arrived.try_iter());
        for event in events {
            match event {
                Event::Vcpu(..)
                | Event::Called
                | Event::Report
                | Event::Replant
                | Event::Hangs(..) => {}
                Event::Command(..) | Event::Gdb(..) if !is_over => self.deferred.push_back(event),
                Event::Gdb(..) => {}
                Event::Command(_, client) => {
                    self.answer(client, &Reply::Refused("the machine is ending".into()));
                }
                Event::Asked(_) if !matches!(first, Some(Event::Asked(_))) => first = Some(event),
                Event::Asked(_) => {}
                Event::Pressed => first = first.or(Some(event)),
            }
        }
        first
    }

    /// Whether a vCPU has stopped by itself, and nobody has taken that event yet.
    pub(super) fn has_vcpu_stopped(&mut self) -> bool {
        self.deferred.extend(self.arrived.try_iter());
        let mut events = self.deferred.iter();
        events.any(|event| matches!(event, Event::Vcpu(..)))
    }

    /// Drops the events of vCPUs that have reached a breakpoint. Other events stay, in their order.
    pub(super) fn drop_breakpoints(&mut self) {
        while let Ok(event) = self.arrived.try_recv() {
            if !matches!(event, Event::Vcpu(_, Ok(Stop::Breakpoint))) {
                self.deferred.push_back(event);
            }
        }
    }

    /// Runs `work`, which may take long, on a separate thread. The loop handles signals meanwhile;
    /// all other events wait. If the host has no resources for the thread, `work` runs on this
    /// thread, and signals wait too.
    ///
    /// # Errors
    /// Fails if the host cannot wait for events, or if `work` panicked, which ends the process.
    pub(super) fn while_serving<T: Send>(&mut self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let Ok((done, signal)) = pair() else {
            return Ok(work());
        };
        let is_done = Rc::new(Cell::new(false));
        let id = self.add(Box::new(Done(done, Rc::clone(&is_done))));
        // If the thread cannot be started, the work is still here.
        let seat = Mutex::new(Some(work));
        let result = std::thread::scope(|scope| {
            let body = || {
                let result = take_and_do(&seat);
                let _ = signal.write(1);
                result
            };
            let Ok(thread) = spawn_scoped(scope, Kind::Main, "work", body) else {
                return Ok(take_and_do(&seat));
            };
            while !is_done.get() && !thread.is_finished() {
                self.wait(None)?;
            }
            thread.join().map_err(|_| anyhow!("a thread panicked"))
        });
        let _ = self.manager.remove_subscriber(id);
        result?.context("a thread panicked")
    }
}

/// Two descriptors of one eventfd.
fn pair() -> std::io::Result<(EventFd, EventFd)> {
    let fd = EventFd::new(libc::EFD_CLOEXEC)?;
    let again = fd.try_clone()?;
    Ok((fd, again))
}

/// Takes the work out of `seat` and runs it. Returns none if it was taken before.
fn take_and_do<T>(seat: &Mutex<Option<impl FnOnce() -> T>>) -> Option<T> {
    // Do not hold the lock while the work runs.
    let work = lock(seat).take();
    work.map(|work| work())
}

fn failed(act: &str, error: &event_manager::Error) -> anyhow::Error {
    anyhow!("Failed to {act} the main loop's events: {error}")
}

/// Waits until `fd` is readable. A warning calls it `what`.
pub(super) fn watch(ops: &mut EventOps, fd: &impl AsRawFd, what: &str) {
    if let Err(error) = ops.add(Events::new(fd, EventSet::IN)) {
        warn!("Failed to wait for {what}: {error}");
    }
}

/// Readable when events of a [`Post`] have arrived.
struct Wake(Arc<EventFd>);

impl MutEventSubscriber for Wake {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, self.0.as_ref(), "vCPUs");
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.0.read();
    }
}

/// Readable when the work of [`MainLoop::while_serving`] is done.
struct Done(EventFd, Rc<Cell<bool>>);

impl MutEventSubscriber for Done {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.0, "a thread");
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.0.read();
        self.1.set(true);
    }
}

/// Readable when the RTC's timer has expired.
struct Alarm(Arc<GoldfishRtc>);

impl MutEventSubscriber for Alarm {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, self.0.as_ref(), "the guest's clock");
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.0.timer_is_over();
    }
}
