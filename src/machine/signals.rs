//! Signals: those that ask for the end of the VM, and those that stop rvmm for a while.

use std::fs;
use std::io;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGWINCH};
use signal_hook::iterator;
use signal_hook::low_level::emulate_default_handler;

use super::{Event, send};
use crate::devices::console::terminal;
use crate::util::thread::{Kind, spawn};

/// A thread that turns signals into events, until it is dropped.
pub(super) struct Signals {
    handle: iterator::Handle,
    thread: Option<JoinHandle<()>>,
}

impl Signals {
    /// Starts to tell every SIGTERM, SIGINT, SIGHUP and SIGQUIT; SIGTSTP and SIGCONT give the
    /// terminal back and take it again; of SIGWINCH `on_resize` is told.
    pub(super) fn start(
        tell: Sender<Event>,
        on_resize: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let ignored = ignored_signals();
        let wanted = [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT, SIGWINCH];
        let wanted = wanted.iter().filter(|signal| !ignored.contains(signal));
        let mut signals = iterator::Signals::new(wanted)?;
        let handle = signals.handle();
        let thread = spawn(Kind::Signals, "wait", move || {
            for signal in signals.forever() {
                match signal {
                    SIGTSTP => suspend(),
                    SIGCONT => terminal::resume(),
                    SIGWINCH => on_resize(),
                    _ => send(&tell, Event::Signal(signal)),
                }
            }
        })?;
        Ok(Self {
            handle,
            thread: Some(thread),
        })
    }
}

/// Those that whoever started rvmm wants it to ignore, as nohup does: they stay ignored.
fn ignored_signals() -> Vec<i32> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let mask = mask.unwrap_or(0);
    (1..64)
        .filter(|signal| (mask >> (signal - 1)) & 1 == 1)
        .collect()
}

/// Stops the whole process, vCPUs too, with the terminal as its user knows it.
fn suspend() {
    terminal::restore();
    // Fails for signals without a default action only.
    let _ = emulate_default_handler(SIGTSTP);
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
