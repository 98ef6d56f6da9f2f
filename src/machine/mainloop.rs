//! The main loop: one thread, the machine's own, waits for all that controls the machine.
//!
//! Signals, the consoles' input, the control socket and the clock's alarm are descriptors that it waits for; vCPU
//! threads and some of these send it an [`Event`] by a [`Post`]. What each of them means is decided by `Machine::run`. The
//! data plane, disks' and networks' queues, has threads of its own.

use std::cell::RefCell;
use std::collections::VecDeque;
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
use crate::control::server::{Client, Server};
use crate::control::{Command, Reply};
use crate::devices::goldfish_rtc::GoldfishRtc;
use crate::hypervisor;
use crate::util::sync::lock;
use crate::util::thread::{Kind, spawn_scoped};
use crate::vcpu::Stop;

/// What the machine is to do something about.
#[derive(Debug)]
pub(super) enum Event {
    /// A vCPU's thread ended.
    Vcpu(hypervisor::Result<Stop>),
    /// Somebody asked for the end.
    Asked(Outcome),
    /// Somebody asked the guest for its end.
    Pressed,
    /// A vCPU wants to be kicked.
    Called,
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
    /// Sends `event`. Nobody takes it once the machine has ended, and that is fine.
    pub(super) fn send(&self, event: Event) {
        let _ = self.events.send(event);
        // It fails only when 2^64 events wait.
        let _ = self.wake.write(1);
    }

    /// A post, and where its events arrive.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub(super) fn new() -> std::io::Result<(Self, Receiver<Event>)> {
        let (events, arrived) = channel();
        let wake = Arc::new(EventFd::new(libc::EFD_CLOEXEC)?);
        Ok((Self { events, wake }, arrived))
    }
}

/// What the loop waits for is added as a subscriber, which sends an [`Event`] or acts at once.
pub(super) type Source = Box<dyn MutEventSubscriber>;

/// The loop.
pub(super) struct MainLoop {
    manager: EventManager<Source>,
    arrived: Receiver<Event>,
    /// Commands that came while a reset began.
    deferred: VecDeque<Event>,
    server: Option<(SubscriberId, Rc<RefCell<Server>>)>,
    alarm: Option<SubscriberId>,
}

impl MainLoop {
    /// A loop that waits for the events of `post`, which `arrived` has.
    ///
    /// # Errors
    /// The host has no descriptors left.
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

    /// Waits for `source` too.
    pub(super) fn add(&mut self, source: Source) -> SubscriberId {
        self.manager.add_subscriber(source)
    }

    /// Serves the control socket too.
    pub(super) fn add_server(&mut self, server: Rc<RefCell<Server>>) {
        let id = self.add(Box::new(Rc::clone(&server)));
        self.server = Some((id, server));
    }

    /// Waits for the alarms of `rtc`, and of no clock that was there before.
    pub(super) fn set_clock(&mut self, rtc: Option<Arc<GoldfishRtc>>) {
        if let Some(before) = self.alarm.take() {
            if let Err(error) = self.manager.remove_subscriber(before) {
                warn!("Failed to leave the guest's clock: {error}");
            }
        }
        self.alarm = rtc.map(|rtc| self.add(Box::new(Alarm(rtc))));
    }

    /// Sends `reply` to `client`, if it is still there.
    pub(super) fn answer(&mut self, client: Client, reply: &Reply) {
        if let Some((id, server)) = &self.server {
            if let Ok(mut ops) = self.manager.event_ops(*id) {
                server.borrow_mut().answer(client, reply, &mut ops);
            }
        }
    }

    /// The next event; none when `time` is over.
    ///
    /// # Errors
    /// The host cannot wait.
    pub(super) fn next(&mut self, time: Duration) -> Result<Option<Event>> {
        let until = Instant::now().checked_add(time);
        // However many commands come, signals are seen.
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

    /// Serves all sources that have something now. Their events wait for [`MainLoop::next`].
    fn serve(&mut self) {
        if let Err(error) = self.wait(Some(Duration::ZERO)) {
            warn!("{error:#}");
        }
    }

    fn wait(&mut self, time: Option<Duration>) -> Result<()> {
        const FOR_EVER: i32 = -1;
        let milliseconds = time.map_or(FOR_EVER, |time| {
            // Not a moment too early: that would be one more turn.
            i32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
        });
        match self.manager.run_with_timeout(milliseconds) {
            Ok(_) => Ok(()),
            Err(error) => Err(failed("wait for", &error)),
        }
    }

    /// What a person asked for while the machine was busy: the end, or else the guest's. What vCPUs sent
    /// is dropped: they stopped because the first one did. A command waits for the next life, or is refused if the
    /// machine `is_over`.
    pub(super) fn asked_meanwhile(&mut self, is_over: bool) -> Option<Event> {
        self.serve();
        let mut first = None;
        while let Ok(event) = self.arrived.try_recv() {
            match event {
                Event::Vcpu(_) | Event::Called => {}
                Event::Command(..) if !is_over => self.deferred.push_back(event),
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

    /// Does `work`, which may take its time, on a thread of its own: signals act meanwhile, and all other events
    /// wait. Where the host has no resources for that, signals wait too.
    ///
    /// # Errors
    /// The host cannot wait, or `work` panicked, which ends the process.
    pub(super) fn while_serving<T: Send>(&mut self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let Ok((done, signal)) = pair() else {
            return Ok(work());
        };
        let is_done = Rc::new(RefCell::new(false));
        let id = self.add(Box::new(Done(done, Rc::clone(&is_done))));
        // A thread that cannot be started leaves it here.
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
            while !*is_done.borrow() && !thread.is_finished() {
                self.wait(None)?;
            }
            thread.join().map_err(|_| anyhow!("a thread panicked"))
        });
        let _ = self.manager.remove_subscriber(id);
        result?.context("a thread panicked")
    }
}

/// An eventfd, and once more the same.
fn pair() -> std::io::Result<(EventFd, EventFd)> {
    let fd = EventFd::new(libc::EFD_CLOEXEC)?;
    let again = fd.try_clone()?;
    Ok((fd, again))
}

/// Does the work of `seat`, if nobody else has.
fn take_and_do<T>(seat: &Mutex<Option<impl FnOnce() -> T>>) -> Option<T> {
    // The lock is not held while it works.
    let work = lock(seat).take();
    work.map(|work| work())
}

fn failed(act: &str, error: &event_manager::Error) -> anyhow::Error {
    anyhow!("Failed to {act} the main loop's events: {error}")
}

/// Adds what a source waits for.
pub(super) fn watch(ops: &mut EventOps, fd: &impl AsRawFd, what: &str) {
    if let Err(error) = ops.add(Events::new(fd, EventSet::IN)) {
        warn!("Failed to wait for {what}: {error}");
    }
}

/// Events have come.
struct Wake(Arc<EventFd>);

impl MutEventSubscriber for Wake {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, self.0.as_ref(), "vCPUs");
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.0.read();
    }
}

/// The work of [`MainLoop::while_serving`] is done.
struct Done(EventFd, Rc<RefCell<bool>>);

impl MutEventSubscriber for Done {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &self.0, "a thread");
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.0.read();
        *self.1.borrow_mut() = true;
    }
}

/// The guest's clock may ring.
struct Alarm(Arc<GoldfishRtc>);

impl MutEventSubscriber for Alarm {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, self.0.as_ref(), "the guest's clock");
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.0.timer_is_over();
    }
}
