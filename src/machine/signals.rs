//! Signals that ask for the end of the VM.

use std::io;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator;

use super::{Event, send};
use crate::util::thread::{Kind, spawn};

/// A thread that turns signals into events, until it is dropped.
pub(super) struct Signals {
    handle: iterator::Handle,
    thread: Option<JoinHandle<()>>,
}

impl Signals {
    /// Starts to tell every SIGTERM, SIGINT, SIGHUP and SIGQUIT.
    pub(super) fn start(tell: Sender<Event>) -> io::Result<Self> {
        let mut signals = iterator::Signals::new([SIGTERM, SIGINT, SIGHUP, SIGQUIT])?;
        let handle = signals.handle();
        let thread = spawn(Kind::Signals, "wait", move || {
            for signal in signals.forever() {
                send(&tell, Event::Signal(signal));
            }
        })?;
        Ok(Self {
            handle,
            thread: Some(thread),
        })
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
