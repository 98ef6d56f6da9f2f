//! The terminal that rvmm runs on. It is in raw mode while the guest uses it.
//!
//! The previous mode is kept in a static variable, so that it can be restored however rvmm ends or
//! stops: by the guard's drop, by a panic, or by SIGTSTP.
//!
//! While rvmm is in the background the terminal belongs to another program: rvmm does not read from
//! it and does not change its mode, and the guest keeps running. SIGTTIN and SIGTTOU are blocked
//! (`machine::signals`), so that an access that loses a race for the foreground does not stop rvmm.

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
    /// The guest is to use the terminal whenever rvmm is in the foreground.
    wanted: bool,
    /// The mode was restored, because rvmm is about to stop or end.
    away: bool,
    /// Another program had the terminal meanwhile, and may have changed its mode.
    lost: bool,
    /// The mode before rvmm set raw mode, while raw mode is set.
    before: Option<Termios>,
}

/// Standard input in raw mode. Dropping this restores the previous mode.
pub(super) struct RawTerminal(());

impl RawTerminal {
    /// Puts standard input into raw mode: every key goes to the guest, which does its own echo. In
    /// the background, raw mode is set once rvmm is in the foreground. Returns `None` if standard
    /// input is no terminal.
    pub(super) fn take() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let mut terminal = lock(&TERMINAL);
        (terminal.wanted, terminal.away) = (true, false);
        let guard = Self(());
        let taken = terminal.take();
        // On an error the guard is dropped, which takes the lock.
        drop(terminal);
        taken?;
        Ok(Some(guard))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Do both under one lock, so that a SIGCONT in between cannot set raw mode again.
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
            // rvmm was stopped by SIGSTOP and could not restore the mode.
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
            // Ignore errors: the terminal may be gone.
            let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
        }
    }
}

/// Restores the terminal's previous mode, before rvmm stops or ends. Does nothing if rvmm did not
/// change the mode.
pub fn restore() {
    let mut terminal = lock(&TERMINAL);
    terminal.away = true;
    terminal.give_back();
}

/// Sets raw mode again after [`restore`], or after a SIGSTOP.
pub fn resume() {
    let mut terminal = lock(&TERMINAL);
    terminal.away = false;
    // Ignore errors: the terminal may be gone.
    let _ = terminal.take();
}

/// Sets raw mode if rvmm has come to the foreground since. Returns false if rvmm is in the
/// background.
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

/// Whether standard input is a terminal and rvmm is not in its foreground process group.
pub(super) fn in_background() -> bool {
    tcgetpgrp(stdin()).is_ok_and(|group| group != getpgrp())
}

/// Columns and rows of the terminal on standard output, if it is one.
pub fn size() -> Option<[u16; 2]> {
    let size = tcgetwinsize(stdout()).ok()?;
    Some([size.ws_col, size.ws_row])
}
