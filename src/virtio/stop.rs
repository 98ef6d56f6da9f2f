//! Why a device stops, and how its threads learn that they must.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Why a device stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StopFor {
    /// The machine pauses and the device goes on later. Requests that have begun are completed;
    /// nothing is lost.
    Pause = 1,
    /// The driver gives its requests up. Requests that have begun may be cancelled, as in a power
    /// failure.
    Reset = 2,
}

/// A worker's thread reads this to find out whether it must end.
#[derive(Clone, Default)]
pub struct Stop(Arc<AtomicU8>);

impl Stop {
    /// Whether the worker must end. It must not begin another request then.
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Acquire) != 0
    }

    /// Whether the worker may also cancel the requests that it has begun.
    pub fn cancels(&self) -> bool {
        self.0.load(Ordering::Acquire) == StopFor::Reset as u8
    }

    /// Asks the worker to end. A reset may follow a pause; a pause after a reset changes nothing.
    pub(super) fn ask(&self, why: StopFor) {
        self.0.fetch_max(why as u8, Ordering::AcqRel);
    }
}
