//! One run of rvmm.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_send_buffer_size;

use super::files;

/// The time limit for one process, emulated on a busy machine. Only a hanging case reaches it.
const DEADLINE: Duration = Duration::from_secs(180);
/// The interval for polling events without a notification, such as the end of a process or a full
/// pipe.
const POLL: Duration = Duration::from_millis(10);
/// The size of a standard output that is often full. The kernel takes at least 4 KiB.
const SMALL_BUFFER: usize = 4 << 10;

/// A command line of rvmm, and its standard streams.
pub(crate) struct Rvmm {
    args: Vec<OsString>,
    /// If true, its input is a pipe that stays open until the case closes it; else `/dev/null`.
    stdin_pipe: bool,
    stdout_blocks: bool,
    read_console: bool,
    /// Shell commands that the process runs before it executes rvmm.
    before: Option<&'static str>,
}

/// For every guest that should not restart. A guest that fails by a reset would never end.
const NO_REBOOT: &str = "--no-reboot";

impl Rvmm {
    /// rvmm with nothing on its command line.
    pub(crate) fn new() -> Self {
        // Every case passes here: no case may run on another kind of host than it was meant for.
        #[cfg(target_arch = "riscv64")]
        super::host::kind();
        Rvmm {
            args: Vec::new(),
            stdin_pipe: true,
            stdout_blocks: true,
            read_console: true,
            before: None,
        }
    }

    /// rvmm with one of our own guests (`resources/guests/NAME.S`), and with a log.
    pub(crate) fn guest(name: &str) -> Self {
        Rvmm::new()
            .arg("-v")
            .arg(NO_REBOOT)
            .arg("--kernel")
            .arg(files::guest(name))
    }

    /// rvmm with the Linux under test and our initramfs, and with a log.
    pub(crate) fn linux() -> Self {
        Rvmm::new()
            .arg("-v")
            .arg(NO_REBOOT)
            .arg("--kernel")
            .arg(files::kernel())
            .arg("--initrd")
            .arg(files::initramfs())
    }

    /// rvmm with the Linux under test and an initramfs that has the drivers for virtio, and with a
    /// log.
    pub(crate) fn virtio(cmdline: &str) -> Self {
        Rvmm::new()
            .arg("-v")
            .arg(NO_REBOOT)
            .arg("--kernel")
            .arg(files::kernel())
            .arg("--initrd")
            .arg(files::virtio_initramfs())
            .arg("--cmdline")
            .arg(cmdline)
    }

    /// Restarts the guest when it asks for a reset. Without this, a reset ends rvmm.
    pub(crate) fn reboots(mut self) -> Self {
        self.args.retain(|arg| arg != NO_REBOOT);
        self
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    pub(crate) fn args<I: IntoIterator<Item: AsRef<OsStr>>>(mut self, args: I) -> Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Gives it an input that ends at once.
    pub(crate) fn stdin_null(mut self) -> Self {
        self.stdin_pipe = false;
        self
    }

    /// Gives it no input: file descriptor 0 is closed.
    pub(crate) fn stdin_closed(self) -> Self {
        self.stdin_null().after("exec <&-")
    }

    /// Lets its process run these shell commands before it executes rvmm.
    pub(crate) fn after(mut self, commands: &'static str) -> Self {
        self.before = Some(commands);
        self
    }

    /// Gives it a non-blocking output, as another program may have left it, which is often full.
    pub(crate) fn stdout_nonblocking(mut self) -> Self {
        self.stdout_blocks = false;
        self
    }

    /// Does not read the console before [`Vm::read_console`] or [`Vm::close_console`].
    pub(crate) fn console_unread(mut self) -> Self {
        self.read_console = false;
        self
    }

    /// Starts it and waits for its end.
    pub(crate) fn run(self) -> Outcome {
        self.spawn().finish()
    }

    pub(crate) fn spawn(self) -> Vm {
        let bin = files::rvmm();
        let mut command = match self.before {
            Some(commands) => {
                let mut shell = Command::new("sh");
                let script = format!("{commands}; exec \"$0\" \"$@\"");
                shell.args(["-c", &script]).arg(&bin);
                shell
            }
            None => Command::new(&bin),
        };
        command.args(&self.args).stderr(Stdio::piped());
        command.stdin(if self.stdin_pipe {
            Stdio::piped()
        } else {
            Stdio::null()
        });
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        if self.stdout_blocks {
            command.stdout(Stdio::piped());
        } else {
            theirs.set_nonblocking(true).expect("O_NONBLOCK");
            // A write of more than this does not fit, however fast the console is read.
            set_socket_send_buffer_size(&theirs, SMALL_BUFFER).expect("SO_SNDBUF");
            command.stdout(OwnedFd::from(theirs));
        }
        let mut child = command
            .spawn()
            .unwrap_or_else(|e| panic!("cannot run {}: {e}", bin.display()));
        // Otherwise the command would keep the other end of its output open.
        let text = format!("{command:?}");
        drop(command);
        let stdout = match child.stdout.take() {
            Some(pipe) => OwnedFd::from(pipe),
            None => OwnedFd::from(ours),
        };
        let stderr = child.stderr.take().expect("stderr is a pipe");
        let mut vm = Vm {
            stdin: child.stdin.take(),
            child,
            stdout: Some(stdout.into()),
            console: Arc::default(),
            log: Capture::of(stderr),
            command: text,
            deadline: Instant::now() + DEADLINE,
        };
        if self.read_console {
            vm.read_console();
        }
        vm
    }
}

/// A running rvmm. Dropped, it is killed.
pub(crate) struct Vm {
    child: Child,
    stdin: Option<ChildStdin>,
    /// The console, until it is read.
    stdout: Option<File>,
    console: Arc<Capture>,
    log: Arc<Capture>,
    command: String,
    deadline: Instant,
}

impl Vm {
    /// Waits until the console shows `text`. Panics if the console ends without it.
    pub(crate) fn wait_for(&self, text: &str) {
        self.wait_for_times(text, 1);
    }

    /// Waits until the console shows `text` so many times.
    pub(crate) fn wait_for_times(&self, text: &str, times: usize) {
        let mut state = self.console.lock();
        while count(&state.bytes, text) < times {
            assert!(
                !state.ended,
                "the console ended without {text:?}, {times} times"
            );
            state = self.console.wait(state, self.deadline, text);
        }
    }

    /// Types `bytes`.
    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let stdin = self.stdin.as_mut().expect("stdin is open");
        stdin
            .write_all(bytes.as_ref())
            .and_then(|()| stdin.flush())
            .expect("write to rvmm's stdin");
    }

    /// Ends the input.
    pub(crate) fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Starts to read the console after [`Rvmm::console_unread`].
    pub(crate) fn read_console(&mut self) {
        self.console = Capture::of(self.stdout.take().expect("nobody reads the console yet"));
    }

    /// Closes the reading end of the console after [`Rvmm::console_unread`].
    pub(crate) fn close_console(&mut self) {
        drop(self.stdout.take().expect("nobody reads the console yet"));
        self.console.end();
    }

    /// Waits until the console's pipe (which holds 64 KiB) has at least `bytes` unread bytes.
    /// Panics if rvmm ends before.
    pub(crate) fn wait_for_unread(&mut self, bytes: u64) {
        let pipe = self.stdout.as_ref().expect("nobody reads the console yet");
        while rustix::io::ioctl_fionread(pipe).expect("FIONREAD") < bytes {
            let ended = self.child.try_wait().expect("ask for rvmm's end");
            assert_eq!(
                ended, None,
                "rvmm ended with less than {bytes} bytes on the console"
            );
            assert!(
                Instant::now() < self.deadline,
                "timed out waiting for {bytes} unread bytes"
            );
            thread::sleep(POLL);
        }
    }

    /// Allows it so many seconds more than other processes.
    pub(crate) fn allow_seconds(&mut self, seconds: u64) {
        self.deadline += Duration::from_secs(seconds);
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("ask for rvmm's end").is_some()
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        self.signal("TERM");
    }

    /// Waits until rvmm's messages contain `text`.
    pub(crate) fn wait_for_log(&self, text: &str) {
        self.wait_for_log_times(text, 1);
    }

    /// Waits until rvmm's messages contain `text` so many times.
    pub(crate) fn wait_for_log_times(&self, text: &str, times: usize) {
        let mut state = self.log.lock();
        while count(&state.bytes, text) < times {
            assert!(!state.ended, "rvmm ended without the message {text:?}");
            state = self.log.wait(state, self.deadline, text);
        }
    }

    /// The output of the guest so far.
    pub(crate) fn console(&self) -> String {
        self.console.text()
    }

    /// rvmm's messages so far.
    pub(crate) fn log(&self) -> String {
        self.log.text()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The peak resident memory so far, its own and the guest's, in KiB.
    pub(crate) fn peak_rss_kib(&self) -> u64 {
        self.status_kib("VmHWM:")
    }

    /// The resident memory now, its own and the guest's, in KiB.
    pub(crate) fn rss_kib(&self) -> u64 {
        self.status_kib("VmRSS:")
    }

    fn status_kib(&self, key: &str) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(&path).expect(&path);
        let line = status.lines().find_map(|line| line.strip_prefix(key));
        let number = line.and_then(|line| line.split_whitespace().next());
        number
            .and_then(|number| number.parse().ok())
            .unwrap_or_else(|| panic!("{key} is no number"))
    }

    /// Waits until a signal has stopped it: state T of `/proc/PID/stat`.
    pub(crate) fn wait_until_stopped(&self) {
        let path = format!("/proc/{}/stat", self.child.id());
        loop {
            let stat = std::fs::read_to_string(&path).expect(&path);
            let state = stat.rsplit(") ").next().expect("a state");
            if state.starts_with('T') {
                return;
            }
            assert!(
                Instant::now() < self.deadline,
                "timed out waiting for a stop"
            );
            thread::sleep(POLL);
        }
    }

    /// Sends the signal with this name, as `kill` spells it.
    pub(crate) fn signal(&self, name: &str) {
        // The shell's builtin, because std can only send SIGKILL.
        let kill = format!("kill -{name} {}", self.child.id());
        let status = Command::new("sh")
            .args(["-c", &kill])
            .status()
            .expect("run sh");
        assert!(status.success(), "{kill}: {status}");
    }

    /// Waits for the end of the process and of both its streams.
    pub(crate) fn finish(mut self) -> Outcome {
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait for rvmm") {
                break status;
            }
            assert!(
                Instant::now() < self.deadline,
                "timed out waiting for rvmm to end"
            );
            thread::sleep(POLL);
        };
        if self.stdout.take().is_some() {
            self.console.end();
        }
        for stream in [&self.console, &self.log] {
            let mut state = stream.lock();
            while !state.ended {
                state = stream.wait(state, self.deadline, "the end of the stream");
            }
        }
        Outcome {
            status,
            console: self.console.text(),
            log: self.log.text(),
            command: std::mem::take(&mut self.command),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // After finish() the child is reaped, and this fails without harm.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() && !self.command.is_empty() {
            report(
                &self.command,
                "killed",
                &self.console.text(),
                &self.log.text(),
            );
        }
    }
}

/// How a run ended.
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    /// The guest's output: rvmm's stdout.
    pub(crate) console: String,
    /// rvmm's own messages: its stderr.
    pub(crate) log: String,
    command: String,
}

impl Outcome {
    /// Checks the exit status. An end by a signal fails.
    #[track_caller]
    pub(crate) fn assert_status(&self, want: i32) {
        assert_eq!(
            self.status.code(),
            Some(want),
            "exit status: {}",
            self.status
        );
    }

    /// Checks the exit status, and that the console has exactly these lines.
    #[track_caller]
    pub(crate) fn assert_console(&self, want: i32, lines: &[&str]) {
        let console: Vec<&str> = self.console.lines().collect();
        assert_eq!(console, lines, "the guest's console");
        assert!(
            self.console.is_empty() || self.console.ends_with('\n'),
            "the console must end with a whole line"
        );
        self.assert_status(want);
    }

    /// Checks that rvmm failed with this status, before the guest wrote anything, and with one line
    /// that contains each of `words` in upper or lower case. Returns the line.
    #[track_caller]
    pub(crate) fn assert_refused(&self, status: i32, words: &[&str]) -> String {
        assert_eq!(self.console, "", "stdout must be empty");
        let mut errors = self.log.lines().filter(|line| line.starts_with("rvmm: "));
        let line = errors
            .next()
            .expect("a line that starts with \"rvmm: \"")
            .to_owned();
        assert_eq!(errors.next(), None, "there must be only one line");
        let lower = line.to_lowercase();
        for word in words {
            assert!(
                lower.contains(&word.to_lowercase()),
                "{line:?} does not name {word:?}"
            );
        }
        self.assert_status(status);
        line
    }

    /// The same, and that line is all of stderr (no `-v`).
    #[track_caller]
    pub(crate) fn assert_one_line(&self, status: i32, words: &[&str]) -> String {
        let line = self.assert_refused(status, words);
        assert_eq!(
            self.log,
            format!("{line}\n"),
            "stderr must be only that line"
        );
        line
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        if thread::panicking() {
            report(
                &self.command,
                &self.status.to_string(),
                &self.console,
                &self.log,
            );
        }
    }
}

/// Prints everything there is to see of a failed case. libtest shows it with the failure.
fn report(command: &str, end: &str, console: &str, log: &str) {
    let mut text = format!("---- {command}\n---- ended: {end}\n---- the guest's console:\n");
    for line in console.lines() {
        let _ = writeln!(text, "  | {}", line.escape_debug());
    }
    text.push_str("---- rvmm's messages:\n");
    for line in log.lines() {
        let _ = writeln!(text, "  | {line}");
    }
    eprint!("{text}");
}

/// Everything that has come out of a pipe so far.
#[derive(Default)]
struct Capture {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

impl Capture {
    /// Reads `pipe` to its end, on a thread of its own.
    fn of(mut pipe: impl Read + Send + 'static) -> Arc<Self> {
        let capture = Arc::new(Capture::default());
        let filled = Arc::clone(&capture);
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(n @ 1..) = pipe.read(&mut chunk) {
                filled.lock().bytes.extend_from_slice(&chunk[..n]);
                filled.changed.notify_all();
            }
            filled.end();
        });
        capture
    }

    fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// A panic of another thread does not matter: no change in there can be half done.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next bytes or the end. Panics at the deadline.
    fn wait<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        deadline: Instant,
        what: &str,
    ) -> MutexGuard<'a, State> {
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "timed out waiting for {what:?}");
        self.changed
            .wait_timeout(state, left)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }
}

/// How often `text` contains `part`.
fn count(text: &[u8], part: &str) -> usize {
    String::from_utf8_lossy(text).matches(part).count()
}
