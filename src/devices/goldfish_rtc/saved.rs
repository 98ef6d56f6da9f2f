//! The clock's saved state. The level of the interrupt line follows from it.

use serde::{Deserialize, Serialize};

use super::Clock;
use crate::snapshot::State;

/// What [`Clock`] saves. Times are in nanoseconds.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RtcState {
    offset: u64,
    time_high: u32,
    alarm_high: u32,
    set_high: u32,
    /// Null if no alarm is set. The attribute makes serde refuse a state without this field.
    #[serde(deserialize_with = "Option::deserialize")]
    alarm: Option<u64>,
    enabled: bool,
    pending: bool,
}

impl State for RtcState {
    const KIND: &'static str = "goldfish_rtc";
    const VERSION: u32 = 1;
}

impl RtcState {
    pub(super) fn of(clock: &Clock) -> Self {
        Self {
            offset: clock.offset,
            time_high: clock.time_high,
            alarm_high: clock.alarm_high,
            set_high: clock.set_high,
            alarm: clock.alarm,
            enabled: clock.enabled,
            pending: clock.pending,
        }
    }
}

impl From<RtcState> for Clock {
    fn from(state: RtcState) -> Self {
        Self {
            offset: state.offset,
            time_high: state.time_high,
            alarm_high: state.alarm_high,
            set_high: state.set_high,
            alarm: state.alarm,
            enabled: state.enabled,
            pending: state.pending,
        }
    }
}
