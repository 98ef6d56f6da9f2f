//! A client for a machine's control socket, which takes and sends lines of JSON.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// The time limit for a command, on a busy emulated host.
const PATIENCE: Duration = Duration::from_secs(120);

/// One connection.
pub(crate) struct Ctl(BufReader<UnixStream>);

impl Ctl {
    /// Connects to the socket at `path`, which must exist.
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).expect("connect to the control socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Ctl(BufReader::new(stream))
    }

    /// Sends a command, and waits for the reply.
    pub(crate) fn ask(&mut self, command: &str) -> Value {
        let line = format!("{{\"command\":\"{command}\"}}\n");
        let mut stream = self.0.get_ref();
        stream.write_all(line.as_bytes()).expect("send a command");
        let mut reply = String::new();
        self.0.read_line(&mut reply).expect("read a reply");
        serde_json::from_str(&reply).unwrap_or_else(|error| panic!("{reply:?}: {error}"))
    }

    /// Sends a command whose only reply is `done`.
    #[track_caller]
    pub(crate) fn done(&mut self, command: &str) {
        assert_eq!(self.ask(command), "done", "{command}");
    }

    /// The reply to `status`.
    pub(crate) fn status(&mut self) -> Value {
        self.ask("status")["status"].take()
    }
}
