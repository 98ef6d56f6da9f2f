//! Control of a running machine: commands and replies as plain values, and the socket of `--ctl`
//! that carries them.
//!
//! A client connects, sends a [`Command`] as one line of JSON, and gets a [`Reply`] as one line of
//! JSON. Then it may send the next command. [`server`] runs on rvmm's main loop, [`client`] is
//! `rvmm ctl`. This module only transports commands: `machine` carries them out.

pub mod client;
mod connection;
pub mod server;

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::util::{ByteSize, Hex, on_one_line};

/// A command for a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Report the state of the machine, with a [`Reply::Status`].
    Status,
    /// Pause all vCPUs and devices until [`Command::Resume`]. Does nothing if the machine is
    /// paused.
    Pause,
    /// Resume a paused machine. Does nothing if the machine runs. The guest's time goes on where
    /// it was.
    Resume,
    /// As [`Command::Resume`], but the guest's time jumps over the pause.
    ResumeAndJump,
    /// Write a snapshot of the machine, and report a [`Reply::Snapshot`]. A running guest is paused
    /// meanwhile.
    Snapshot(SnapshotOf),
    /// End the machine, as Ctrl-A X does.
    Stop,
    /// Restart the guest, as if power was off for a moment. A paused machine stays paused.
    Reset,
    /// Report the statistics so far, with a [`Reply::Stats`].
    Stats,
    /// Return the guest's device tree, with a [`Reply::DeviceTree`].
    DumpDtb,
    /// Explain what the guest's harts are doing, with a [`Reply::Report`].
    Report,
}

/// A line that a client sends.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    command: Command,
}

/// The reply to a [`Command`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// The command is done.
    Done,
    /// The command was refused, for this reason of one line.
    Refused(String),
    /// The state of the machine.
    Status(Status),
    /// The statistics so far, as `--stats=FILE` writes them. Times are in nanoseconds.
    Stats(Value),
    /// The flattened device tree, as hexadecimal digits.
    DeviceTree(Hex),
    /// Text for people: lines, each with a newline.
    Report(String),
    /// The snapshot is complete.
    Snapshot(Taken),
}

/// A snapshot to be taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SnapshotOf {
    /// The absolute path of its directory.
    pub dir: PathBuf,
    /// What it has of guest RAM.
    #[serde(default)]
    pub what: What,
    /// Copy most of RAM while the guest still runs.
    #[serde(default)]
    pub live: bool,
    /// Also copy the images of the disks that the guest can write to.
    #[serde(default)]
    pub disks: bool,
}

/// What a snapshot has of guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// All of it.
    #[default]
    All,
    /// All of it. From then on, changes are tracked for [`What::Diff`].
    Track,
    /// What has changed since the last snapshot that was taken with [`What::Track`] or
    /// [`What::Diff`].
    Diff,
}

/// A snapshot that was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Taken {
    /// How long the guest did not run for it, in microseconds.
    pub frozen_us: u64,
    /// Bytes of guest RAM that were written.
    pub memory: u64,
}

/// Text for people: a line.
impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (milliseconds, rest) = (self.frozen_us / 1000, self.frozen_us % 1000 / 100);
        let memory = ByteSize(self.memory);
        writeln!(
            f,
            "{memory} of memory written; the guest was frozen for {milliseconds}.{rest} ms"
        )
    }
}

/// The state of a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    /// Whether the guest runs.
    pub state: State,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Size of guest RAM in bytes.
    pub ram: u64,
    /// Number of resets of the guest so far.
    pub resets: u64,
    /// The state of each device, by its name. It is an object; its other keys depend on its `kind`.
    pub devices: serde_json::Map<String, Value>,
}

/// The status as text for people: lines, each with a newline.
impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} vCPUs, {} of RAM, {} resets",
            self.state,
            self.vcpus,
            ByteSize(self.ram),
            self.resets
        )?;
        for (name, state) in &self.devices {
            writeln!(f, "{name}: {state}")?;
        }
        Ok(())
    }
}

/// Whether a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Its vCPUs run or wait for interrupts.
    Running,
    /// Its vCPUs and devices are paused.
    Paused,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Running => "running",
            State::Paused => "paused",
        })
    }
}

/// Parses one line of a client.
///
/// # Errors
/// Fails if `line` is not a command. Returns the reason as one line.
pub fn parse(line: &[u8]) -> Result<Command, String> {
    let line = serde_json::from_slice(line).map(|Line { command }| command);
    line.map_err(|error| {
        // Leave out the parser's line and column: they do not help, because the text is one line.
        let reason = error.to_string();
        let reason = reason.split(" at line ").next().unwrap_or_default();
        let reason = on_one_line(reason);
        format!("not a command: {reason}: send a line such as {{\"command\":\"status\"}}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_lines_of_json() {
        for (line, command) in [
            (r#"{"command":"status"}"#, Command::Status),
            (r#" { "command" : "dump-dtb" } "#, Command::DumpDtb),
        ] {
            assert_eq!(parse(line.as_bytes()), Ok(command));
        }
        for line in ["", "status", "{}", r#"{"command":"fly"}"#, "\u{0}", "[[[["] {
            let reason = parse(line.as_bytes()).unwrap_err();
            assert!(reason.starts_with("not a command: "), "{line}: {reason}");
            assert!(!reason.contains('\n'), "{reason}");
        }
        // The message quotes what the client wrote, on one line and without terminal escape codes.
        let reason = parse(br#"{"command":"a\nb\u001b[2J"}"#).unwrap_err();
        assert!(reason.contains(r"`a\nb\u{1b}[2J`"), "{reason}");
        assert!(parse(br#"{"command":"stop","force":true}"#).is_err());
        assert!(parse(&[0xff; 8]).is_err());
    }

    #[test]
    fn replies_come_back_as_they_were_sent() {
        let status = Status {
            state: State::Paused,
            vcpus: 4,
            ram: 128 << 20,
            resets: 1,
            devices: serde_json::Map::new(),
        };
        for reply in [
            Reply::Done,
            Reply::Refused("no \"name\"\n".into()),
            Reply::Status(status),
            Reply::Stats(serde_json::json!({"run_ns": 5})),
            Reply::DeviceTree(Hex(vec![0xd0, 0x0d, 0xfe, 0xed])),
        ] {
            let line = serde_json::to_string(&reply).unwrap();
            assert!(!line.contains('\n'), "{line}");
            assert_eq!(serde_json::from_str::<Reply>(&line).unwrap(), reply);
        }
    }
}
