//! The flag `--on-crash`.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What rvmm does when a guest cannot go on. It always prints a report first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnCrash {
    /// End with status 122
    #[default]
    Report,
    /// Pause the machine; rvmm ctl can look at it, reset it or end it
    Pause,
    /// Restart the guest
    Reset,
}

impl OnCrash {
    /// Whether this is the default.
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}
