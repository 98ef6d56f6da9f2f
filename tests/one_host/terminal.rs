//! rvmm on its own terminal, under a shell with job control: foreground, background, stop and end.
#![cfg(target_arch = "riscv64")]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::common::files;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

/// Only a hanging case takes so long.
const DEADLINE: Duration = Duration::from_secs(120);

/// A shell that leads a session on a new terminal.
struct Session {
    terminal: File,
    shell: Child,
    shown: String,
    deadline: Instant,
}

impl Session {
    /// Runs `script`. `$rvmm` and `$guest` in it are the files' names.
    fn start(guest: &str, script: &str) -> Self {
        let main = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudo-terminal");
        grantpt(&main).expect("grantpt");
        unlockpt(&main).expect("unlockpt");
        let name = ptsname(&main, Vec::new()).expect("ptsname");
        let no_control = OFlags::NOCTTY.bits().try_into().expect("a flag");
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(no_control);
        let other = || {
            options
                .open(name.to_str().expect("UTF-8"))
                .expect("open it")
        };
        let shell = Command::new("setsid")
            .args(["-c", "sh", "-c", script])
            .env("rvmm", files::rvmm())
            .env("guest", files::guest(guest))
            .stdin(other())
            .stdout(other())
            .stderr(other())
            .spawn()
            .expect("setsid");
        Self {
            terminal: main.into(),
            shell,
            shown: String::new(),
            deadline: Instant::now() + DEADLINE,
        }
    }

    /// Reads until the terminal shows `text`. Returns what came before it.
    fn wait_for(&mut self, text: &str) -> String {
        loop {
            if let Some((before, after)) = self.shown.split_once(text) {
                let (before, after) = (before.to_owned(), after.to_owned());
                self.shown = after;
                return before;
            }
            let tick = Timespec::try_from(Duration::from_secs(1)).expect("a second");
            let mut fds = [PollFd::new(&self.terminal, PollFlags::IN)];
            let came = poll(&mut fds, Some(&tick)).expect("poll");
            assert!(
                Instant::now() < self.deadline,
                "timed out waiting for {text:?}; there is {:?}",
                self.shown
            );
            if came > 0 {
                let mut bytes = [0; 4096];
                let count = self.terminal.read(&mut bytes).expect("read the terminal");
                self.shown
                    .push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        }
    }

    fn send(&mut self, text: &str) {
        self.terminal.write_all(text.as_bytes()).expect("type");
    }

    /// Whether the terminal is in raw mode.
    fn is_raw(&self) -> bool {
        let mode = tcgetattr(&self.terminal).expect("tcgetattr");
        !mode.local_modes.contains(LocalModes::ICANON)
    }

    fn wait_until_raw(&self) {
        while !self.is_raw() {
            assert!(Instant::now() < self.deadline, "the terminal is never raw");
            sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // When the leader of a session ends, the kernel sends SIGHUP to the rest of it.
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

#[test]
fn in_the_background_a_guest_runs_and_in_the_foreground_it_has_the_keys() {
    let script = r#"set -m; "$rvmm" --kernel "$guest" & read -r line; fg; echo "status $?""#;
    let mut session = Session::start("echo", script);
    session.wait_for("ready");
    assert!(!session.is_raw(), "in the background");
    session.send("\n");
    session.wait_until_raw();
    session.send("first\n");
    session.wait_for("got first");
    session.wait_for("uart ready");
    session.send("second\n");
    session.wait_for("uart got second");
    session.wait_for("status 0");
    assert!(!session.is_raw(), "restored");
}

#[test]
fn an_end_in_the_background_stops_nothing_and_leaves_the_terminal_alone() {
    // The shell is in the foreground when rvmm ends.
    let script = r#"set -m
        sh -c 'echo "pid $$."; exec "$rvmm" --kernel "$guest"'
        echo stopped
        bg
        kill %1
        wait %1
        echo "status $?""#;
    let mut session = Session::start("spin", script);
    session.wait_for("pid ");
    let pid = session.wait_for(".");
    session.wait_for("spinning");
    session.wait_until_raw();
    let kill = Command::new("kill").args(["-TSTP", &pid]).status();
    assert!(kill.expect("kill").success());
    session.wait_for("stopped");
    assert!(!session.is_raw(), "restored before it stopped");
    session.wait_for("status 143");
    assert!(!session.is_raw());
}

/// Ctrl-A R reports what the harts do, and the guest runs on.
#[test]
fn a_key_reports_what_the_guest_does() {
    let script = r#""$rvmm" --kernel "$guest"; echo "status $?""#;
    let mut session = Session::start("echo", script);
    session.wait_for("ready");
    session.wait_until_raw();
    session.send("\x01r");
    session.wait_for("hart 0: at 0x");
    session.wait_for("called from:");
    session.send("first\n");
    session.wait_for("got first");
    session.wait_for("uart ready");
    session.send("second\n");
    session.wait_for("status 0");
}
