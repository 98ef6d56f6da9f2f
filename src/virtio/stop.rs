//! Why a device stops, and how its threads learn of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Why a device stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StopFor {
    /// The machine pauses, and the device goes on later: what was begun is finished, and nothing is lost.
    Pause = 1,
    /// The driver's work is void: what was begun may be cancelled, as when the power goes.
    Reset = 2,
}

/// Says whether a worker is to end; its own thread has it.
#[derive(Clone, Default)]
pub struct Stop(Arc<AtomicU8>);

impl Stop {
    /// Whether the worker is to end. It begins nothing then.
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Acquire) != 0
    }

    /// Whether it need not finish what it has begun either.
    pub fn cancels(&self) -> bool {
        self.0.load(Ordering::Acquire) == StopFor::Reset as u8
    }

    /// Asks for the end. A reset may come behind a pause, and not the other way round.
    pub(super) fn ask(&self, why: StopFor) {
        self.0.fetch_max(why as u8, Ordering::AcqRel);
    }
}
