//! A console's input: a subscriber of the main loop that hands the guest what comes.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use event_manager::{Error, EventOps, EventSet, Events, MutEventSubscriber};
use log::{debug, warn};
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::OnLeave;
use crate::devices::console::Console;
use crate::devices::console::escape::{Escape, HELP, Key};
use crate::util::stderr::tell;

/// Until an input that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Bytes that are read at once.
const AT_ONCE: usize = 4096;

/// Numbers of what the main loop waits for.
const SOURCE: u32 = 0;
const TURN: u32 = 1;
const TIMER: u32 = 2;

/// Where a console's input comes from. Only the main loop's thread uses it, so that no call may wait for somebody.
pub(super) trait Source {
    /// What to wait for before the next [`Source::read`]. The descriptor stays open until then.
    fn wait(&mut self) -> Wait<'_>;

    /// Reads what is there. [`Errno::AGAIN`] when nothing is; 0 when no more input will ever come; after
    /// other errors it is asked again later.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Errno>;
}

/// What a source waits for: its descriptor to be readable, or the end of a time, whichever comes first.
pub(super) struct Wait<'a> {
    pub(super) fd: Option<BorrowedFd<'a>>,
    pub(super) time: Option<Duration>,
}

/// Moves bytes from a source to the console. Added to the main loop it works until the input or the console
/// ends.
pub struct Input {
    console: Arc<Console>,
    source: Box<dyn Source>,
    /// A terminal's keys for rvmm.
    escape: Option<(Escape, Option<OnLeave>)>,
    /// Readable when there is room for input again, or when the source needs no waiting.
    turn: Arc<EventFd>,
    /// Readable when the time of a [`Wait`] is over.
    timer: TimerFd,
    /// The source's descriptor, while the loop waits for it.
    watched: Option<RawFd>,
    failing: Option<Errno>,
    has_ended: bool,
}

impl Input {
    /// Input for `console` from `source`. With `on_leave` it is a terminal, whose Ctrl-A keys are for rvmm.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub(super) fn new(
        console: Arc<Console>,
        source: Box<dyn Source>,
        on_leave: Option<OnLeave>,
    ) -> io::Result<Self> {
        let turn = Arc::new(EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?);
        let wake = Arc::clone(&turn);
        console.set_on_input_room(Box::new(move || drop(wake.write(1))));
        Ok(Self {
            console,
            source,
            escape: on_leave.map(|on_leave| (Escape::default(), Some(on_leave))),
            turn,
            timer: TimerFd::new()?,
            watched: None,
            failing: None,
            has_ended: false,
        })
    }

    /// Reads once, then waits for what the source waits for.
    fn advance(&mut self, ops: &mut EventOps) {
        if self.has_ended {
            return;
        }
        // The descriptor may be another after the read, and the number the same.
        if let Some(fd) = self.watched.take() {
            if let Err(error) = ops.remove(Events::empty(&fd)) {
                debug!("Failed to leave the console's input: {error}");
            }
        }
        let _ = self.timer.clear();
        if self.console.is_closed() {
            // What comes now is the next program's.
            self.has_ended = true;
            return;
        }
        // A terminal's keys for rvmm do not wait behind those for a guest that does not read.
        let room = match self.escape {
            Some(_) => AT_ONCE,
            None => self.console.input_room().min(AT_ONCE),
        };
        if room == 0 {
            return;
        }
        let mut buffer = [0; AT_ONCE];
        let mut pause = None;
        match self.source.read(&mut buffer[..room]) {
            Ok(0) => {
                debug!("the console's input has ended");
                self.has_ended = true;
            }
            Ok(count) => {
                self.failing = None;
                self.has_ended = !self.take(&buffer[..count]);
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => {
                if self.failing.replace(error) != Some(error) {
                    warn!("Failed to read the console's input: {error}; it is tried again");
                }
                pause = Some(RETRY);
            }
        }
        if !self.has_ended {
            self.watch(pause, ops);
        }
    }

    /// Waits for the source, or for `pause` alone.
    fn watch(&mut self, pause: Option<Duration>, ops: &mut EventOps) {
        let (fd, time) = match pause {
            Some(_) => (None, pause),
            None => {
                let Wait { fd, time } = self.source.wait();
                (fd.map(|fd| fd.as_raw_fd()), time)
            }
        };
        self.wait_for(time);
        let Some(fd) = fd else {
            return;
        };
        match ops.add(Events::with_data(&fd, SOURCE, EventSet::IN)) {
            Ok(()) => self.watched = Some(fd),
            // A regular file, or /dev/null: epoll_ctl(2) takes none that is always readable.
            Err(Error::Epoll(refused)) if refused == errno::Error::new(libc::EPERM) => {
                let _ = self.turn.write(1);
            }
            Err(error) => {
                let refused = Errno::NOMEM;
                if self.failing.replace(refused) != Some(refused) {
                    warn!("Failed to wait for the console's input: {error}; it is tried again");
                }
                self.wait_for(Some(RETRY));
            }
        }
    }

    fn wait_for(&mut self, time: Option<Duration>) {
        let Some(time) = time else {
            return;
        };
        if let Err(error) = self.timer.reset(time, None) {
            warn!("Failed to set a timer for the console's input: {error}");
        }
    }

    /// Hands typed bytes to the guest; false when there is no more to do.
    fn take(&mut self, typed: &[u8]) -> bool {
        let Some((escape, on_leave)) = &mut self.escape else {
            return self.console.type_input(typed);
        };
        let mut bytes = Vec::with_capacity(typed.len());
        let mut leave = false;
        for byte in typed {
            match escape.key(*byte) {
                Key::Byte(byte) => bytes.push(byte),
                Key::Held => {}
                Key::Help => tell(format_args!("\r\n{HELP}\r")),
                Key::Leave => leave = true,
                #[cfg(debug_assertions)]
                Key::Panic => panic!("Ctrl-A P was typed"),
            }
        }
        if leave {
            debug!("Ctrl-A X was typed");
            if let Some(leave) = on_leave.take() {
                leave();
            }
            return false;
        }
        self.console.type_input(&bytes)
    }
}

impl MutEventSubscriber for Input {
    fn init(&mut self, ops: &mut EventOps) {
        let turn = Events::with_data(self.turn.as_ref(), TURN, EventSet::IN);
        let timer = Events::with_data(&self.timer, TIMER, EventSet::IN);
        if let Err(error) = ops.add(turn).and_then(|()| ops.add(timer)) {
            warn!("Failed to wait for the console's input: {error}");
            return;
        }
        self.watch(None, ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        // A timer's signal goes when it is set or cleared.
        if events.data() == TURN {
            let _ = self.turn.read();
        }
        self.advance(ops);
    }
}
