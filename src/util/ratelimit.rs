//! A limit for what a guest can make rvmm log.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::sync::lock;

/// Lines allowed in one period.
pub(crate) const BURST: u32 = 10;
/// Length of a period.
pub(crate) const PERIOD: Duration = Duration::from_secs(5);

/// Every limit of the process, by name. It outlives what logs: a guest that resets the machine, or a
/// driver its device, gets no fresh limit.
static WINDOWS: Mutex<BTreeMap<String, Arc<Mutex<Window>>>> = Mutex::new(BTreeMap::new());

/// Lets through ten events in five seconds and counts the rest. All limits of one name are one.
///
/// ```
/// let limit = rvmm::util::RateLimit::named("bus");
/// if let Some(dropped) = limit.admit() {
///     eprintln!("the guest read an unmapped address ({dropped} such lines left out)");
/// }
/// ```
#[derive(Clone, Debug)]
pub struct RateLimit {
    window: Arc<Mutex<Window>>,
    burst: u32,
}

#[derive(Debug, Default)]
struct Window {
    start: Option<Instant>,
    admitted: u32,
    dropped: u64,
}

impl RateLimit {
    /// The limit of that name: one for each kind of line, of each device where there are several.
    /// It is kept for ever, so a name must not be the guest's to choose.
    pub fn named(name: impl Into<String>) -> Self {
        Self::with_burst(name, BURST)
    }

    /// The same with `burst` events in five seconds, the same number for all limits of that name.
    pub fn with_burst(name: impl Into<String>, burst: u32) -> Self {
        let mut windows = lock(&WINDOWS);
        let window = Arc::clone(windows.entry(name.into()).or_default());
        Self { window, burst }
    }

    /// `Some(n)` when the event may be logged, `n` being how many were dropped since the last one
    /// that was; `None` when it must be dropped.
    pub fn admit(&self) -> Option<u64> {
        lock(&self.window).admit_at(Instant::now(), self.burst)
    }
}

impl Window {
    fn admit_at(&mut self, now: Instant, burst: u32) -> Option<u64> {
        let over = self.start.is_none_or(|start| now - start >= PERIOD);
        if over {
            self.start = Some(now);
            self.admitted = 0;
        }
        if self.admitted == burst {
            self.dropped += 1;
            return None;
        }
        self.admitted += 1;
        Some(std::mem::take(&mut self.dropped))
    }
}

/// Logs a line that a guest can cause, at a [`log::Level`], within a [`RateLimit`].
macro_rules! guest_log {
    ($level:expr, $limit:expr, $($arg:tt)+) => {
        // What nobody sees takes nothing from the limit of what is seen.
        match log::log_enabled!($level).then(|| $limit.admit()).flatten() {
            Some(0) => log::log!($level, $($arg)+),
            Some(dropped) => log::log!(
                $level,
                "{} ({dropped} like it left out)",
                format_args!($($arg)+)
            ),
            None => {}
        }
    };
}

/// [`guest_log`] as a warning.
macro_rules! guest_warn {
    ($limit:expr, $($arg:tt)+) => {
        $crate::util::guest_log!(log::Level::Warn, $limit, $($arg)+)
    };
}

/// [`guest_log`] for what `-v` tells of each life of the guest.
macro_rules! guest_info {
    ($limit:expr, $($arg:tt)+) => {
        $crate::util::guest_log!(log::Level::Info, $limit, $($arg)+)
    };
}

/// [`guest_log`] for what `-vv` tells.
macro_rules! guest_debug {
    ($limit:expr, $($arg:tt)+) => {
        $crate::util::guest_log!(log::Level::Debug, $limit, $($arg)+)
    };
}

pub(crate) use {guest_debug, guest_info, guest_log, guest_warn};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_the_rest_is_counted() {
        let mut window = Window::default();
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(window.admit_at(start, BURST), Some(0));
        }
        for _ in 0..7 {
            assert_eq!(window.admit_at(start + PERIOD / 2, BURST), None);
        }
        assert_eq!(window.admit_at(start + PERIOD, BURST), Some(7));
        assert_eq!(window.admit_at(start + PERIOD, BURST), Some(0));
    }

    #[test]
    fn a_limit_is_its_names() {
        let one = RateLimit::named("test one");
        for _ in 0..BURST {
            one.admit();
        }
        drop(one);
        let admitted = |name: &str| lock(&RateLimit::named(name).window).admitted;
        assert_eq!(admitted("test one"), BURST);
        assert_eq!(admitted("test other"), 0);
    }
}
