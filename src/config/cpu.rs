//! The harts: their ISA and SBI extensions, and their vendor, architecture and implementation ids.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::keyvalue::{self, KeyValue};

/// How the guest's harts differ from the host's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuConfig {
    /// `mvendorid`, the vendor's JEDEC id, in place of the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mvendorid: Option<Hex>,
    /// `marchid`, the microarchitecture's id, in place of the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub marchid: Option<Hex>,
    /// `mimpid`, the version of the microarchitecture, in place of the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mimpid: Option<Hex>,
    /// ISA extensions that the guest does not get, by name.
    #[serde(flatten)]
    pub extensions: BTreeMap<String, IsaSwitch>,
}

/// How rvmm keeps an ISA extension of the host from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IsaSwitch {
    /// KVM disables the extension, and the device tree does not list it. Its instructions are
    /// illegal in the guest.
    Off,
    /// The device tree does not list the extension, but its instructions still work.
    Hidden,
}

/// The SBI extensions that the guest does not get.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SbiConfig {
    /// SBI extensions by name.
    #[serde(flatten)]
    pub extensions: BTreeMap<String, SbiSwitch>,
}

/// How rvmm keeps an SBI extension from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SbiSwitch {
    /// Its calls return SBI_ERR_NOT_SUPPORTED.
    Off,
}

/// A number, written in decimal (`31`) or hexadecimal (`0x1f`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hex(pub u64);

impl TryFrom<String> for Hex {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let number = match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => text.parse(),
        };
        number
            .map(Hex)
            .map_err(|_| format!("{text:?} is not a number: write it as 31 or 0x1f"))
    }
}

impl From<Hex> for String {
    fn from(number: Hex) -> Self {
        format!("{:#x}", number.0)
    }
}

impl KeyValue for CpuConfig {
    const EXAMPLE: &'static str = "v=off,zbb=hidden,mvendorid=0x31";
}
impl KeyValue for SbiConfig {
    const EXAMPLE: &'static str = "pmu=off";
}

impl FromStr for CpuConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        keyvalue::parse(text)
    }
}

impl FromStr for SbiConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        keyvalue::parse(text)
    }
}

/// The text that the flag accepts.
impl fmt::Display for CpuConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&keyvalue::print(self))
    }
}

/// The text that the flag accepts.
impl fmt::Display for SbiConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&keyvalue::print(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flag_and_json_say_the_same() {
        let text = "mvendorid=0x489,marchid=7,v=off,zbb=hidden";
        let cpu: CpuConfig = text.parse().unwrap();
        assert_eq!(cpu.mvendorid, Some(Hex(0x489)));
        assert_eq!(cpu.extensions["v"], IsaSwitch::Off);
        assert_eq!(cpu.extensions["zbb"], IsaSwitch::Hidden);
        let json = serde_json::to_string(&cpu).unwrap();
        assert_eq!(serde_json::from_str::<CpuConfig>(&json).unwrap(), cpu);
        assert_eq!(cpu.to_string().parse(), Ok(cpu));
        let sbi: SbiConfig = "pmu=off,sta=off".parse().unwrap();
        assert_eq!(sbi.to_string(), "pmu=off,sta=off");
    }

    #[test]
    fn errors_name_what_is_wrong() {
        let cpu = |text: &str| text.parse::<CpuConfig>().unwrap_err();
        assert!(cpu("v=on").contains("`on`"), "{}", cpu("v=on"));
        assert!(cpu("mimpid=x").contains("0x1f"), "{}", cpu("mimpid=x"));
        assert!(cpu("v").contains("v=VALUE"), "{}", cpu("v"));
        assert!("dbcn=hidden".parse::<SbiConfig>().is_err());
    }
}
