//! Control of a machine that runs: commands and replies as plain values, and the socket of `--ctl` that they
//! come and go through.
//!
//! A client connects, sends one line of JSON, a [`Command`], and gets one line back, a [`Reply`]. It may send
//! more lines, each after the reply to the last one. [`server`] is on rvmm's main loop, [`client`] is `rvmm ctl`.
//! The machine carries commands out, and does not know who sent them.

pub mod client;
mod connection;
pub mod server;
mod socket;

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::util::{ByteSize, on_one_line};

/// What a machine can be asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Say what the machine is doing. [`Reply::Status`].
    Status,
    /// Stop all vCPUs and devices until [`Command::Resume`]. A machine that is paused stays so.
    Pause,
    /// Go on. A machine that runs goes on running.
    Resume,
    /// End the machine, as Ctrl-A X does.
    Stop,
    /// Restart the guest, as after power was off for a moment. A paused machine stays paused.
    Reset,
    /// Count what the machine did. [`Reply::Stats`].
    Stats,
    /// Give the guest's device tree. [`Reply::DeviceTree`].
    DumpDtb,
}

/// A client's line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    command: Command,
}

/// The answer to a [`Command`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It is done.
    Done,
    /// It is not done, for this reason: one line.
    Refused(String),
    /// What the machine is doing.
    Status(Status),
    /// What `--stats=FILE` writes, as far as it is counted; times are in nanoseconds.
    Stats(Value),
    /// The flattened device tree, in hexadecimal digits.
    DeviceTree(Hex),
}

/// What a machine is doing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    /// Whether the guest runs.
    pub state: State,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Bytes of guest RAM.
    pub ram: u64,
    /// Restarts of the guest so far.
    pub resets: u64,
    /// Each device by its name, and its state: an object whose `kind` says what else is in it.
    pub devices: serde_json::Map<String, Value>,
}

/// For people: lines, each with its end.
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
    /// Its vCPUs run, or wait for interrupts.
    Running,
    /// Its vCPUs and devices stand still.
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

/// Bytes, as text of two digits each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hex(pub Vec<u8>);

impl From<Hex> for String {
    fn from(Hex(bytes): Hex) -> Self {
        let mut text = String::with_capacity(2 * bytes.len());
        for byte in bytes {
            let digits = [byte >> 4, byte & 0xf].map(u32::from);
            text.extend(
                digits
                    .into_iter()
                    .filter_map(|digit| char::from_digit(digit, 16)),
            );
        }
        text
    }
}

impl TryFrom<String> for Hex {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digits = text.as_bytes().chunks(2);
        let byte = |pair: &[u8]| {
            let pair = std::str::from_utf8(pair)
                .ok()
                .filter(|pair| pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit()))?;
            u8::from_str_radix(pair, 16).ok()
        };
        let bytes = digits.map(byte).collect::<Option<_>>();
        bytes
            .map(Hex)
            .ok_or_else(|| "not bytes in hexadecimal digits".into())
    }
}

/// Reads one line of a client's.
///
/// # Errors
/// Why it is no command: one line.
pub fn parse(line: &[u8]) -> Result<Command, String> {
    let line = serde_json::from_slice(line).map(|Line { command }| command);
    line.map_err(|error| {
        // A line has one line only, and the parser's place in it helps nobody.
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
        // What a client wrote is told, on one line and without a terminal's codes.
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
        assert!(Hex::try_from("abc".to_owned()).is_err());
        assert!(Hex::try_from("+f".to_owned()).is_err());
        assert!(Hex::try_from("é".to_owned()).is_err());
    }
}
