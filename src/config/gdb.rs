//! The flag `--gdb`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::keyvalue::{self, KeyValue};

/// Where rvmm waits for GDB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GdbConfig {
    /// The address.
    pub at: GdbAddress,
    /// The guest does not run before GDB lets it go on.
    #[serde(
        default,
        deserialize_with = "keyvalue::switch",
        skip_serializing_if = "keyvalue::is_off"
    )]
    pub wait: bool,
}

/// An address that GDB connects to. It is written as `PORT` or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum GdbAddress {
    /// A TCP port of this host, which other hosts cannot reach. 0 is any free port.
    Port(u16),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

/// The address as GDB's `target remote` takes it.
impl fmt::Display for GdbAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => write!(f, "localhost:{port}"),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

impl TryFrom<String> for GdbAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => text.parse().map(Self::Port).map_err(|_| {
                format!("{text:?} is no address for GDB: give a PORT (0 to 65535) or unix:PATH")
            }),
        }
    }
}

impl From<GdbAddress> for String {
    fn from(address: GdbAddress) -> Self {
        match address {
            GdbAddress::Port(port) => port.to_string(),
            GdbAddress::Unix(path) => format!("unix:{}", path.display()),
        }
    }
}

impl KeyValue for GdbConfig {
    const EXAMPLE: &'static str = "1234,wait";
    const MAIN_KEY: Option<&'static str> = Some("at");
    const SWITCHES: &'static [&'static str] = &["wait"];
}

impl FromStr for GdbConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        keyvalue::parse(text)
    }
}

/// The text that the flag accepts.
impl fmt::Display for GdbConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&keyvalue::print(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gdb_has_an_address() {
        let gdb: GdbConfig = "1234".parse().unwrap();
        assert_eq!((gdb.at, gdb.wait), (GdbAddress::Port(1234), false));
        let gdb: GdbConfig = "unix:/tmp/gdb,wait".parse().unwrap();
        let path = GdbAddress::Unix("/tmp/gdb".into());
        assert_eq!((gdb.at.clone(), gdb.wait), (path, true));
        assert_eq!(gdb.to_string().parse(), Ok(gdb));
        for wrong in ["", "unix:", "65536", "localhost:1", "-1"] {
            let error = wrong.parse::<GdbConfig>().unwrap_err();
            assert!(error.contains("unix:PATH") || wrong.is_empty(), "{error}");
        }
    }
}
