//! A limit for what a guest can make rvmm log.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::sync::lock;

/// Lines allowed in one period.
const BURST: u32 = 10;
/// Length of a period.
const PERIOD: Duration = Duration::from_secs(5);

/// Lets through ten events in five seconds and counts the rest.
///
/// ```
/// let limit = rvmm::util::RateLimit::default();
/// if let Some(dropped) = limit.admit() {
///     eprintln!("the guest read an unmapped address ({dropped} such lines left out)");
/// }
/// ```
#[derive(Debug, Default)]
pub struct RateLimit {
    window: Mutex<Window>,
}

#[derive(Debug, Default)]
struct Window {
    start: Option<Instant>,
    admitted: u32,
    dropped: u64,
}

impl RateLimit {
    /// `Some(n)` when the event may be logged, `n` being how many were dropped since the last one
    /// that was; `None` when it must be dropped.
    pub fn admit(&self) -> Option<u64> {
        lock(&self.window).admit_at(Instant::now())
    }
}

impl Window {
    fn admit_at(&mut self, now: Instant) -> Option<u64> {
        let over = self.start.is_none_or(|start| now - start >= PERIOD);
        if over {
            self.start = Some(now);
            self.admitted = 0;
        }
        if self.admitted == BURST {
            self.dropped += 1;
            return None;
        }
        self.admitted += 1;
        Some(std::mem::take(&mut self.dropped))
    }
}

/// Logs a line that a guest can cause, as a warning, within the limit given first.
macro_rules! guest_warn {
    ($limit:expr, $($arg:tt)+) => {
        match $limit.admit() {
            Some(0) => log::warn!($($arg)+),
            Some(dropped) => log::warn!("{} ({dropped} like it left out)", format_args!($($arg)+)),
            None => {}
        }
    };
}

pub(crate) use guest_warn;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_the_rest_is_counted() {
        let mut window = Window::default();
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(window.admit_at(start), Some(0));
        }
        for _ in 0..7 {
            assert_eq!(window.admit_at(start + PERIOD / 2), None);
        }
        assert_eq!(window.admit_at(start + PERIOD), Some(7));
        assert_eq!(window.admit_at(start + PERIOD), Some(0));
    }
}
