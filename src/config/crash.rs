//! The flag `--on-crash`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::keyvalue::{self, KeyValue};
use super::sigterm::Time;

/// What rvmm does when a guest cannot go on, and whether it looks for guests that hang.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CrashConfig {
    /// What rvmm does after it has printed a report.
    pub act: CrashAct,
    /// Whether and how often rvmm looks for harts that use CPU time and get nowhere: in a loop on
    /// one trap, or in their kernel's panic.
    #[serde(default, skip_serializing_if = "Watch::is_default")]
    pub watch: Watch,
}

/// The longest time between two looks for harts that get nowhere. None if rvmm does not look. It is
/// written as a time or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Watch(pub Option<Duration>);

impl Watch {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The default is 8 seconds.
impl Default for Watch {
    fn default() -> Self {
        Self(Some(Duration::from_secs(8)))
    }
}

impl fmt::Display for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(time) => Time(time).fmt(f),
            None => f.write_str("off"),
        }
    }
}

impl TryFrom<String> for Watch {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.as_str() {
            "off" => Ok(Self(None)),
            time => Ok(Self(Some(time.parse::<Time>()?.0))),
        }
    }
}

impl From<Watch> for String {
    fn from(watch: Watch) -> Self {
        watch.to_string()
    }
}

/// What rvmm does after it has printed a report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CrashAct {
    /// End, if KVM cannot continue the guest. A guest that hangs runs on.
    #[default]
    Report,
    /// Pause the machine.
    Pause,
    /// Restart the guest.
    Reset,
}

impl CrashConfig {
    /// Whether this is the default.
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl KeyValue for CrashConfig {
    const EXAMPLE: &'static str = "pause,watch=off";
    const MAIN_KEY: Option<&'static str> = Some("act");
}

impl FromStr for CrashConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        keyvalue::parse(text)
    }
}

/// The text that the flag accepts.
impl fmt::Display for CrashConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.act {
            CrashAct::Report => "report",
            CrashAct::Pause => "pause",
            CrashAct::Reset => "reset",
        })?;
        match self.watch.is_default() {
            true => Ok(()),
            false => write!(f, ",watch={}", self.watch),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flag_and_json_say_the_same() {
        for (text, act, watch) in [
            ("report", CrashAct::Report, Some(8000)),
            ("pause,watch=50ms", CrashAct::Pause, Some(50)),
            ("reset,watch=off", CrashAct::Reset, None),
        ] {
            let config: CrashConfig = text.parse().unwrap();
            let time = watch.map(Duration::from_millis);
            assert_eq!((config.act, config.watch), (act, Watch(time)), "{text}");
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<CrashConfig>(&json).unwrap(), config);
            assert_eq!(config.to_string().parse(), Ok(config));
        }
        assert!(CrashConfig::default().is_default());
    }

    #[test]
    fn errors_name_the_value() {
        for (text, part) in [
            ("stop", "`report`"),
            ("report,watch=maybe", "30s"),
            ("report,look=on", "`watch`"),
        ] {
            let error = text.parse::<CrashConfig>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
