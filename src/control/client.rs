//! The client of the control socket: `rvmm ctl`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use super::{Command, Line, Reply};

/// How long the client waits for a reply. A command may take long, because disks may have much to
/// write.
const PATIENCE: Duration = Duration::from_secs(120);

/// The longest reply that the client accepts, in bytes.
const REPLY_MAX: u64 = 16 << 20;

/// Sends `command` to the machine whose control socket is at `path`, and waits for the reply.
///
/// # Errors
/// Fails if no machine listens there, if it ends or does not answer in time, or if it refuses the
/// command. The message has one line.
pub fn ask(path: &Path, command: Command) -> Result<Reply> {
    let mut stream = UnixStream::connect(path).map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::ConnectionRefused => ": the machine has ended",
            std::io::ErrorKind::NotFound => ": give the PATH that a running machine got with --ctl",
            _ => "",
        };
        anyhow!("Failed to connect to control socket {path:?}: {error}{hint}")
    })?;
    let failed = || format!("Failed to ask the machine at {path:?}");
    stream
        .set_read_timeout(Some(PATIENCE))
        .with_context(failed)?;
    let line = serde_json::to_string(&Line { command })? + "\n";
    stream.write_all(line.as_bytes()).with_context(failed)?;
    let mut reply = Vec::new();
    let mut reader = BufReader::new(stream).take(REPLY_MAX);
    reader
        .read_until(b'\n', &mut reply)
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::WouldBlock => {
                anyhow!(
                    "the machine at {path:?} has not answered for {} s",
                    PATIENCE.as_secs()
                )
            }
            _ => anyhow!(error).context(failed()),
        })?;
    if reply.last() != Some(&b'\n') {
        bail!("the machine at {path:?} ended before it answered");
    }
    match serde_json::from_slice(&reply).context("Failed to parse the machine's answer")? {
        Reply::Refused(reason) => bail!("{reason}"),
        reply => Ok(reply),
    }
}
