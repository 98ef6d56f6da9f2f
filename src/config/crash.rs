//! The flag `--on-crash`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::keyvalue::{self, KeyValue};

/// What rvmm does when a guest cannot go on, and whether it looks for guests that hang.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CrashConfig {
    /// What rvmm does after it has printed a report.
    pub act: CrashAct,
    /// Whether rvmm looks for harts that use CPU time and get nowhere: in a loop on one trap, or in
    /// their kernel's panic. The default is true.
    #[serde(
        default = "on",
        deserialize_with = "keyvalue::switch",
        skip_serializing_if = "is_on"
    )]
    pub watch: bool,
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

fn on() -> bool {
    true
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature.
fn is_on(switch: &bool) -> bool {
    *switch
}

impl CrashConfig {
    /// Whether this is the default.
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The default is [`CrashAct::Report`].
impl Default for CrashConfig {
    fn default() -> Self {
        Self {
            act: CrashAct::default(),
            watch: true,
        }
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
        match self.watch {
            true => Ok(()),
            false => f.write_str(",watch=off"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flag_and_json_say_the_same() {
        for (text, act, watch) in [
            ("report", CrashAct::Report, true),
            ("pause,watch=on", CrashAct::Pause, true),
            ("reset,watch=off", CrashAct::Reset, false),
        ] {
            let config: CrashConfig = text.parse().unwrap();
            assert_eq!((config.act, config.watch), (act, watch), "{text}");
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
            ("report,watch=maybe", "maybe"),
            ("report,look=on", "`watch`"),
        ] {
            let error = text.parse::<CrashConfig>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
