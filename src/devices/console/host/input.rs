//! A console's input: a subscriber of the main loop that passes input to the guest.

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

use super::Keys;
use crate::devices::console::Console;
use crate::devices::console::escape::{Escape, HELP, Key};
use crate::util::stderr::print;

/// Time until a failed read is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// The most bytes that one read takes.
const AT_ONCE: usize = 4096;

/// Numbers by which the main loop's events identify their source.
const SOURCE: u32 = 0;
const TURN: u32 = 1;
const TIMER: u32 = 2;

/// Where a console's input comes from. Only the main loop's thread uses it, so no call may block.
pub(super) trait Source {
    /// Returns what to wait for before the next [`Source::read`]. The descriptor must stay open
    /// until then.
    fn wait(&mut self) -> Wait<'_>;

    /// Reads available input. Returns [`Errno::AGAIN`] if there is none now, and 0 at the end of
    /// the input. After another error, the read is tried again later.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Errno>;
}

/// What a source waits for: until its descriptor is readable or the time is over, whichever comes
/// first.
pub(super) struct Wait<'a> {
    pub(super) fd: Option<BorrowedFd<'a>>,
    pub(super) time: Option<Duration>,
}

/// Moves bytes from a source to the console. Once it is added to the main loop, it works until the
/// input ends or the console is closed.
pub struct Input {
    console: Arc<Console>,
    source: Box<dyn Source>,
    /// For a terminal: the parser of its Ctrl-A keys, and their functions.
    escape: Option<(Escape, Keys)>,
    /// Readable when there is room for input again, or when the source can be read without waiting.
    turn: Arc<EventFd>,
    /// Readable when the time of a [`Wait`] is over.
    timer: TimerFd,
    /// The source's descriptor, while the loop waits for it.
    watched: Option<RawFd>,
    /// The last warning, which is not repeated while the failure lasts.
    failure: Option<String>,
    has_ended: bool,
}

impl Input {
    /// Creates the input of `console` from `source`. With `keys`, the source is a terminal whose
    /// Ctrl-A keys are for rvmm.
    ///
    /// # Errors
    /// Fails if the host cannot create an eventfd or a timer.
    pub(super) fn new(
        console: Arc<Console>,
        source: Box<dyn Source>,
        keys: Option<Keys>,
    ) -> io::Result<Self> {
        let turn = Arc::new(EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?);
        let wake = Arc::clone(&turn);
        console.set_on_input_room(Box::new(move || drop(wake.write(1))));
        Ok(Self {
            console,
            source,
            escape: keys.map(|keys| (Escape::default(), keys)),
            turn,
            timer: TimerFd::new()?,
            watched: None,
            failure: None,
            has_ended: false,
        })
    }

    /// Reads once, then waits for what the source waits for.
    fn advance(&mut self, ops: &mut EventOps) {
        if self.has_ended {
            return;
        }
        // Remove it now: after the read, the same number may be another descriptor.
        if let Some(fd) = self.watched.take() {
            if let Err(error) = ops.remove(Events::empty(&fd)) {
                debug!("Failed to stop waiting for the console's input: {error}");
            }
        }
        let _ = self.timer.clear();
        if self.console.is_closed() {
            // Input that comes now is for the next program.
            self.has_ended = true;
            return;
        }
        // Always read from a terminal: Ctrl-A keys must work even if the guest does not read its
        // input.
        let room = match self.escape {
            Some(_) => AT_ONCE,
            None => self.console.input_room().min(AT_ONCE),
        };
        if room == 0 {
            return;
        }
        let mut buffer = [0; AT_ONCE];
        match self.source.read(&mut buffer[..room]) {
            Ok(0) => {
                debug!("the console's input has ended");
                self.has_ended = true;
            }
            Ok(count) => {
                self.failure = None;
                self.has_ended = !self.take(&buffer[..count]);
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => {
                self.try_later(format!("Failed to read the console's input: {error}"));
                return;
            }
        }
        if !self.has_ended {
            self.watch(ops);
        }
    }

    /// Waits for what the source waits for.
    fn watch(&mut self, ops: &mut EventOps) {
        let Wait { fd, time } = self.source.wait();
        let fd = fd.map(|fd| fd.as_raw_fd());
        self.wait_for(time);
        let Some(fd) = fd else {
            return;
        };
        match ops.add(Events::with_data(&fd, SOURCE, EventSet::IN)) {
            Ok(()) => self.watched = Some(fd),
            // A regular file or /dev/null: epoll_ctl(2) refuses files that are always readable.
            Err(Error::Epoll(refused)) if refused == errno::Error::new(libc::EPERM) => {
                let _ = self.turn.write(1);
            }
            Err(error) => {
                self.try_later(format!("Failed to wait for the console's input: {error}"));
            }
        }
    }

    /// Warns of a failure, once, and reads again after [`RETRY`].
    fn try_later(&mut self, failure: String) {
        if self.failure.as_ref() != Some(&failure) {
            warn!("{failure}; rvmm will try again");
            self.failure = Some(failure);
        }
        self.wait_for(Some(RETRY));
    }

    fn wait_for(&mut self, time: Option<Duration>) {
        let Some(time) = time else {
            return;
        };
        if let Err(error) = self.timer.reset(time, None) {
            warn!("Failed to set a timer for the console's input: {error}");
        }
    }

    /// Passes typed bytes to the guest. Returns false if no more input is to be read.
    fn take(&mut self, typed: &[u8]) -> bool {
        let Some((escape, keys)) = &mut self.escape else {
            return self.console.type_input(typed);
        };
        let mut bytes = Vec::with_capacity(typed.len());
        let mut leave = false;
        for byte in typed {
            match escape.key(*byte) {
                Key::Byte(byte) => bytes.push(byte),
                Key::Held => {}
                Key::Help => print(format_args!("\r\n{HELP}\r")),
                Key::Leave => leave = true,
                Key::Report => (keys.on_report)(),
                #[cfg(debug_assertions)]
                Key::Panic => panic!("Ctrl-A P was typed"),
            }
        }
        if leave {
            debug!("Ctrl-A X was typed");
            if let Some(leave) = keys.on_leave.take() {
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
        self.watch(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        // The timer needs no read: setting or clearing it clears its expiration.
        if events.data() == TURN {
            let _ = self.turn.read();
        }
        self.advance(ops);
    }
}
