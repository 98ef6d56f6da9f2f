//! Limits for the log lines that a guest can cause.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::sync::lock;

/// Lines allowed in one period.
pub(crate) const BURST: u32 = 10;
/// Length of a period.
pub(crate) const PERIOD: Duration = Duration::from_secs(5);

/// All limits of the process, by name. They outlive the devices that log: a guest does not get a
/// fresh limit when it resets the machine, or when a driver resets its device.
static WINDOWS: Mutex<BTreeMap<String, Arc<Mutex<Window>>>> = Mutex::new(BTreeMap::new());

/// Admits ten events in five seconds, and counts the others. All limits with the same name share
/// one count.
///
/// ```
/// let limit = rvmm::util::RateLimit::named("bus");
/// if let Some(dropped) = limit.admit() {
///     eprintln!("the guest read an unmapped address ({dropped} similar lines were dropped)");
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
    /// The limit with this name. Each kind of log line has its own name; where a machine can have
    /// several devices of a kind, each device has. Limits are never freed, so a guest must not be
    /// able to choose a name.
    pub fn named(name: impl Into<String>) -> Self {
        Self::with_burst(name, BURST)
    }

    /// A limit that admits `burst` events in five seconds. All limits with this name have to be
    /// given the same number.
    pub fn with_burst(name: impl Into<String>, burst: u32) -> Self {
        let mut windows = lock(&WINDOWS);
        let window = Arc::clone(windows.entry(name.into()).or_default());
        Self { window, burst }
    }

    /// `None` if the event must be dropped. `Some(n)` if it may be logged; `n` is the number of
    /// events that were dropped since the last one that was logged.
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
        // A line below the log's level is not counted.
        match log::log_enabled!($level).then(|| $limit.admit()).flatten() {
            Some(0) => log::log!($level, $($arg)+),
            Some(dropped) => log::log!(
                $level,
                "{} ({dropped} similar lines were dropped)",
                format_args!($($arg)+)
            ),
            None => {}
        }
    };
}

/// [`guest_log`] at level warn.
macro_rules! guest_warn {
    ($limit:expr, $($arg:tt)+) => {
        $crate::util::guest_log!(log::Level::Warn, $limit, $($arg)+)
    };
}

/// [`guest_log`] at level info (`-v`), for lines that come again with each reset of the guest.
macro_rules! guest_info {
    ($limit:expr, $($arg:tt)+) => {
        $crate::util::guest_log!(log::Level::Info, $limit, $($arg)+)
    };
}

/// [`guest_log`] at level debug (`-vv`).
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
