//! The flag `--on-sigterm`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::keyvalue::{self, KeyValue};

/// What SIGTERM does to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SigtermConfig {
    /// What the first SIGTERM does at once.
    pub act: SigtermAct,
    /// The time that the guest has to power off. After it, rvmm ends the machine. Only for
    /// [`SigtermAct::Poweroff`]; the default is 30 seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Time>,
}

/// What the first SIGTERM does at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SigtermAct {
    /// End the machine, as a power cut would.
    #[default]
    Kill,
    /// Ask the guest to power off: by a power key, or by SysRq on its UART if it has no driver for
    /// the key.
    Poweroff,
}

/// A time above zero, written as `30s`, `5m` or `1h 30m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Time(pub Duration);

impl SigtermConfig {
    /// The time that the guest has to power off. `None` if SIGTERM ends the machine at once.
    pub fn patience(self) -> Option<Duration> {
        const DEFAULT: Duration = Duration::from_secs(30);
        let time = self.timeout.map_or(DEFAULT, |time| time.0);
        (self.act == SigtermAct::Poweroff).then_some(time)
    }

    /// Whether there is a timeout that has no use, because SIGTERM ends the machine at once. The
    /// flag's parser refuses that, the JSON's does not.
    pub(super) fn has_idle_timeout(&self) -> bool {
        self.act == SigtermAct::Kill && self.timeout.is_some()
    }

    /// Whether this is the default.
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The default is [`SigtermAct::Kill`].
impl Default for SigtermConfig {
    fn default() -> Self {
        Self {
            act: SigtermAct::default(),
            timeout: None,
        }
    }
}

impl KeyValue for SigtermConfig {
    const EXAMPLE: &'static str = "poweroff,timeout=30s";
    const MAIN_KEY: Option<&'static str> = Some("act");
}

impl FromStr for SigtermConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let config: Self = keyvalue::parse(text)?;
        match config.has_idle_timeout() {
            true => Err("kill takes no timeout: only poweroff does".into()),
            false => Ok(config),
        }
    }
}

/// The text that the flag accepts.
impl fmt::Display for SigtermConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.act {
            SigtermAct::Kill => "kill",
            SigtermAct::Poweroff => "poweroff",
        })?;
        match self.timeout {
            Some(time) => write!(f, ",timeout={time}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match humantime::parse_duration(text) {
            Ok(Duration::ZERO) => Err("a time has to be longer than zero".into()),
            Ok(time) => Ok(Self(time)),
            Err(error) => Err(format!("{error}; write it as 30s, 5m or 1h 30m")),
        }
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl TryFrom<String> for Time {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Time> for String {
    fn from(time: Time) -> Self {
        time.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flag_and_json_say_the_same() {
        let seconds = |text: &str| {
            let config: SigtermConfig = text.parse().unwrap();
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(
                serde_json::from_str::<SigtermConfig>(&json).unwrap(),
                config
            );
            assert_eq!(config.to_string().parse(), Ok(config));
            config.patience().map(|time| time.as_secs())
        };
        assert_eq!(seconds("kill"), None);
        assert_eq!(seconds("poweroff"), Some(30));
        assert_eq!(seconds("poweroff,timeout=1m 30s"), Some(90));
        assert!(SigtermConfig::default().is_default());
    }

    #[test]
    fn errors_name_the_value() {
        for (text, part) in [
            ("stop", "`poweroff`"),
            ("poweroff,timeout=0s", "longer than zero"),
            ("poweroff,timeout=soon", "30s"),
            ("poweroff,after=3s", "`timeout`"),
            ("kill,timeout=3s", "only poweroff"),
        ] {
            let error = text.parse::<SigtermConfig>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
