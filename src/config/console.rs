//! The flags `--console` and `--virtio-console`: where the guest's consoles go.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The host's end of the guest's console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ConsoleConfig {
    /// Standard input and output. rvmm puts a terminal into raw mode.
    #[default]
    Stdio,
    /// No console: output is dropped, and there is no input.
    None,
    /// A new pseudo-terminal. rvmm prints its name.
    Pty,
    /// Output to the end of a file; no input.
    File(PathBuf),
    /// A Unix socket that takes one client at a time. Without a client, output is dropped.
    Socket(PathBuf),
}

/// The error for a text that names no console.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("no such console: write stdio, none, pty, file=PATH or socket=PATH")]
pub struct NoSuchConsole;

impl FromStr for ConsoleConfig {
    type Err = NoSuchConsole;

    fn from_str(text: &str) -> Result<Self, NoSuchConsole> {
        match text.split_once('=') {
            Some((_, "")) => Err(NoSuchConsole),
            Some(("file", path)) => Ok(Self::File(path.into())),
            Some(("socket", path)) => Ok(Self::Socket(path.into())),
            Some(_) => Err(NoSuchConsole),
            None => match text {
                "stdio" => Ok(Self::Stdio),
                "none" => Ok(Self::None),
                "pty" => Ok(Self::Pty),
                _ => Err(NoSuchConsole),
            },
        }
    }
}

impl fmt::Display for ConsoleConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::None => f.write_str("none"),
            Self::Pty => f.write_str("pty"),
            Self::File(path) => write!(f, "file={}", path.display()),
            Self::Socket(path) => write!(f, "socket={}", path.display()),
        }
    }
}

impl From<ConsoleConfig> for String {
    fn from(console: ConsoleConfig) -> Self {
        console.to_string()
    }
}

impl TryFrom<String> for ConsoleConfig {
    type Error = NoSuchConsole;

    fn try_from(text: String) -> Result<Self, NoSuchConsole> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consoles_by_name() {
        for text in ["stdio", "none", "pty", "file=/tmp/a=b", "socket=s"] {
            assert_eq!(text.parse::<ConsoleConfig>().unwrap().to_string(), text);
        }
        for text in ["", "tty", "file", "file=", "socket=", "pipe=x"] {
            assert_eq!(text.parse::<ConsoleConfig>(), Err(NoSuchConsole), "{text}");
        }
    }
}
