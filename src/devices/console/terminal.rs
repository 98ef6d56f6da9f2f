//! The terminal that rvmm runs on, in raw mode while the guest has it.
//!
//! What it was before is kept for the whole process, so that every way out can restore it: the
//! guard's drop, a panic, a stop by SIGTSTP.
//!
//! In the background the terminal is another program's: rvmm reads nothing there and leaves its
//! mode alone, and the guest runs on. SIGTTIN and SIGTTOU are blocked (`machine::signals`), so that what
//! loses a race for the foreground stops nothing.

use std::io::{self, IsTerminal};
use std::sync::Mutex;

use rustix::process::getpgrp;
use rustix::stdio::{stdin, stdout};
use rustix::termios::{
    OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr,
};

use crate::util::sync::lock;

static TERMINAL: Mutex<Terminal> = Mutex::new(Terminal {
    wanted: false,
    away: false,
    lost: false,
    before: None,
});

struct Terminal {
    /// The guest is to have it whenever rvmm is in the foreground.
    wanted: bool,
    /// It was restored, because rvmm is about to stop or end.
    away: bool,
    /// It was another program's meanwhile, which may have changed its mode.
    lost: bool,
    /// Its mode before rvmm took it, while rvmm has it.
    before: Option<Termios>,
}

/// Standard input in raw mode; dropping it restores what was before.
pub(super) struct RawTerminal(());

impl RawTerminal {
    /// Puts standard input into raw mode: every key goes to the guest, which echoes by itself. In
    /// the background that waits for the foreground. `None` where it is no terminal.
    pub(super) fn take() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let mut terminal = lock(&TERMINAL);
        (terminal.wanted, terminal.away) = (true, false);
        let guard = Self(());
        let taken = terminal.take();
        // The guard's drop takes the lock.
        drop(terminal);
        taken?;
        Ok(Some(guard))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Under one lock: a SIGCONT in between must not take the terminal again.
        let mut terminal = lock(&TERMINAL);
        terminal.wanted = false;
        terminal.give_back();
    }
}

impl Terminal {
    fn take(&mut self) -> io::Result<()> {
        if !self.wanted || self.away {
            return Ok(());
        }
        self.lost = in_background();
        if self.lost {
            return Ok(());
        }
        let before = match self.before.take() {
            // Stopped by SIGSTOP, which left no time to restore it.
            Some(before) => before,
            None => tcgetattr(stdin())?,
        };
        let mut raw = before.clone();
        self.before = Some(before);
        raw.make_raw();
        // A read does not wait for a key: another program may have taken the one that was there.
        raw.special_codes[SpecialCodeIndex::VMIN] = 0;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        Ok(tcsetattr(stdin(), OptionalActions::Now, &raw)?)
    }

    fn give_back(&mut self) {
        if in_background() {
            return;
        }
        if let Some(before) = self.before.take() {
            // A terminal that is gone needs no mode.
            let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
        }
    }
}

/// Gives the terminal back its mode, for a while or for good. Does nothing where it was not taken.
pub fn restore() {
    let mut terminal = lock(&TERMINAL);
    terminal.away = true;
    terminal.give_back();
}

/// Takes the terminal again after [`restore`], or after a stop that left no time for it.
pub fn resume() {
    let mut terminal = lock(&TERMINAL);
    terminal.away = false;
    // A terminal that is gone needs no mode.
    let _ = terminal.take();
}

/// Takes the terminal if rvmm has come to the foreground without it. False in the background.
pub(super) fn follow() -> bool {
    let mut terminal = lock(&TERMINAL);
    if in_background() {
        terminal.lost = true;
        return false;
    }
    if terminal.before.is_none() || terminal.lost {
        let _ = terminal.take();
    }
    true
}

/// Whether standard input is a terminal that another process group has now.
pub(super) fn in_background() -> bool {
    tcgetpgrp(stdin()).is_ok_and(|group| group != getpgrp())
}

/// Columns and rows of the terminal that standard output is, if it is one.
pub fn size() -> Option<[u16; 2]> {
    let size = tcgetwinsize(stdout()).ok()?;
    Some([size.ws_col, size.ws_row])
}
