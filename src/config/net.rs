//! Network interfaces.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::keyvalue::{self, KeyValue};

/// A network interface of the guest, connected to a tap interface of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The name of the tap, which has to exist. The guest's interface gets the tap's MTU.
    pub tap: String,
    /// The MAC address of the guest's interface. The default is computed from the host and the
    /// tap's name, so it is the same at each start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// Let the host's kernel move the packets (vhost-net), not rvmm.
    #[serde(
        default,
        deserialize_with = "keyvalue::switch",
        skip_serializing_if = "keyvalue::is_off"
    )]
    pub vhost: bool,
}

/// A unicast Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let byte = |part: &str| match part.len() {
            2 if part.bytes().all(|b| b.is_ascii_hexdigit()) => u8::from_str_radix(part, 16).ok(),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        match bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) {
            None => Err(format!(
                "{text:?} is not a MAC address: write it as 52:54:00:12:34:56"
            )),
            Some(bytes) if bytes[0] & 1 != 0 => Err(format!(
                "{text:?} is a multicast address: an interface needs a unicast address"
            )),
            Some([0, 0, 0, 0, 0, 0]) => Err(format!("no interface can have the address {text:?}")),
            Some(bytes) => Ok(Self(bytes)),
        }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0;
        write!(f, "{first:02x}")?;
        rest.iter().try_for_each(|byte| write!(f, ":{byte:02x}"))
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl KeyValue for NetConfig {
    const EXAMPLE: &'static str = "tap=tap0";
    const SWITCHES: &'static [&'static str] = &["vhost"];
}

impl FromStr for NetConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        keyvalue::parse(text)
    }
}

/// The text that the flag accepts.
impl fmt::Display for NetConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&keyvalue::print(self))
    }
}

/// The longest name of an interface in bytes (IFNAMSIZ, without the NUL).
const NAME_MAX: usize = 15;

/// Checks everything that does not depend on the host.
pub(super) fn validate(interfaces: &[NetConfig]) -> Result<(), ConfigError> {
    for (index, interface) in interfaces.iter().enumerate() {
        let tap = &interface.tap;
        let has_room = (1..=NAME_MAX).contains(&tap.len());
        if !has_room || tap.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()) {
            return Err(ConfigError::TapName(tap.clone()));
        }
        let before = &interfaces[..index];
        if before.iter().any(|other| other.tap == *tap) {
            return Err(ConfigError::TapTwice(tap.clone()));
        }
        if let Some(mac) = interface.mac {
            if before.iter().any(|other| other.mac == Some(mac)) {
                return Err(ConfigError::MacTwice(mac));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flag_and_json_say_the_same() {
        let net: NetConfig = "tap=tap0,mac=52:54:00:AB:cd:01,vhost=on".parse().unwrap();
        assert_eq!(net.mac, Some(Mac([0x52, 0x54, 0, 0xab, 0xcd, 1])));
        let json = serde_json::to_string(&net).unwrap();
        assert_eq!(
            json,
            r#"{"tap":"tap0","mac":"52:54:00:ab:cd:01","vhost":true}"#
        );
        assert_eq!(serde_json::from_str::<NetConfig>(&json).unwrap(), net);
        assert_eq!(net.to_string().parse(), Ok(net));
    }

    #[test]
    fn names_are_an_interfaces() {
        let is_well = |tap: &str| {
            let net: NetConfig = format!("tap={tap}").parse().unwrap();
            validate(&[net]).is_ok()
        };
        assert!(is_well("fifteen-letters"));
        for none in ["", "sixteen-letters!", "a/b", "a b", "a:b"] {
            assert!(!is_well(none), "{none:?}");
        }
    }

    #[test]
    fn an_address_is_one_interfaces() {
        let nets = |macs: [&str; 2]| {
            let net = |(number, mac)| format!("tap=t{number}{mac}").parse().unwrap();
            let nets: Vec<NetConfig> = macs.into_iter().enumerate().map(net).collect();
            validate(&nets)
        };
        let (one, other) = (",mac=52:54:00:12:34:56", ",mac=52:54:00:12:34:57");
        assert_eq!(nets([one, other]), Ok(()));
        assert_eq!(nets(["", ""]), Ok(()));
        assert!(matches!(nets([one, one]), Err(ConfigError::MacTwice(_))));
    }

    #[test]
    fn errors_name_the_value() {
        for (text, part) in [
            ("mac=52:54:00:12:34:56", "`tap`"),
            ("user", "unknown key `user`, expected one of `tap`"),
            ("tap=a,mac=52:54:00:12:34", "52:54:00:12:34:56"),
            ("tap=a,mac=52:54:00:12:34:5", "not a MAC"),
            ("tap=a,mac=+2:54:00:12:34:56", "not a MAC"),
            ("tap=a,mac=53:54:00:12:34:56", "multicast"),
            ("tap=a,mac=00:00:00:00:00:00", "no interface"),
            ("tap=a,vhost=yes", "on or off"),
        ] {
            let error = text.parse::<NetConfig>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
