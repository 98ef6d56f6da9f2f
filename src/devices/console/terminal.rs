//! The terminal that rvmm runs on, in raw mode while the guest has it.
//!
//! What it was before is kept for the whole process, so that every way out can restore it: the
//! guard's drop, a panic, a stop by SIGTSTP.

use std::io::{self, IsTerminal};
use std::sync::Mutex;

use rustix::process::getpgrp;
use rustix::stdio::{stdin, stdout};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr};

use crate::util::sync::lock;

/// The terminal's mode before rvmm took it.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Standard input in raw mode; dropping it restores what was before.
pub(super) struct RawTerminal(());

impl RawTerminal {
    /// Puts standard input into raw mode: every key goes to the guest, which echoes by itself.
    /// `None` where it is no terminal.
    pub(super) fn take() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin())?;
        *lock(&BEFORE) = Some(before.clone());
        let guard = Self(());
        set_raw(&before)?;
        Ok(Some(guard))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Under one lock: a SIGCONT in between must not take the terminal again.
        if let Some(before) = lock(&BEFORE).take() {
            let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
        }
    }
}

/// Gives the terminal back its mode, for a while or for good. Does nothing where it was not taken.
pub fn restore() {
    if let Some(before) = &*lock(&BEFORE) {
        // A terminal that is gone needs no mode.
        let _ = tcsetattr(stdin(), OptionalActions::Now, before);
    }
}

/// Takes the terminal again after [`restore`], when rvmm goes on after a stop. Not in the
/// background, where that would stop it once more.
pub fn resume() {
    let in_foreground = tcgetpgrp(stdin()).is_ok_and(|group| group == getpgrp());
    if let Some(before) = lock(&BEFORE).as_ref().filter(|_| in_foreground) {
        let _ = set_raw(before);
    }
}

/// Columns and rows of the terminal that standard output is, if it is one.
pub fn size() -> Option<[u16; 2]> {
    let size = tcgetwinsize(stdout()).ok()?;
    Some([size.ws_col, size.ws_row])
}

fn set_raw(before: &Termios) -> io::Result<()> {
    let mut raw = before.clone();
    raw.make_raw();
    Ok(tcsetattr(stdin(), OptionalActions::Now, &raw)?)
}
