//! The goldfish RTC: a clock of nanoseconds since 1970 with an alarm
//! (`drivers/rtc/rtc-goldfish.c`; `hw/rtc/goldfish_rtc.c` of QEMU).
//!
//! `Clock` is the chip, pure: it is told the host's time. [`GoldfishRtc`] attaches it to the bus, to
//! a wire, and, once a guest sets an alarm, to a thread that waits for it.

use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::bus::{Device, FdtError, FdtWriter, IrqLine, MmioDevice};
use crate::util::sync::lock;
use crate::util::thread::{Kind, spawn};
use crate::util::{Half, RateLimit, guest_warn};

/// The range on the bus, as QEMU's virt machine has it.
pub const SIZE: u64 = 0x1000;

/// Registers by offset, 32 bits each.
mod reg {
    pub(super) const TIME_LOW: u64 = 0x00;
    pub(super) const TIME_HIGH: u64 = 0x04;
    pub(super) const ALARM_LOW: u64 = 0x08;
    pub(super) const ALARM_HIGH: u64 = 0x0c;
    pub(super) const IRQ_ENABLED: u64 = 0x10;
    pub(super) const CLEAR_ALARM: u64 = 0x14;
    pub(super) const ALARM_STATUS: u64 = 0x18;
    pub(super) const CLEAR_INTERRUPT: u64 = 0x1c;
}

/// The host's clock may be set while an alarm is awaited: it is looked at this often at least.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The chip. Every method takes the host's time, in nanoseconds since 1970.
#[derive(Debug, Default)]
struct Clock {
    /// What the guest set its clock to, less the host's time then.
    offset: u64,
    /// The upper half that a read of TIME_LOW keeps for TIME_HIGH.
    time_high: u32,
    /// What was stored to ALARM_HIGH and TIME_HIGH, until the lower half follows.
    alarm_high: u32,
    set_high: u32,
    /// When the alarm rings, in the guest's time.
    alarm: Option<u64>,
    enabled: bool,
    pending: bool,
}

impl Clock {
    fn read(&mut self, offset: u64, host: u64) -> u32 {
        self.tick(host);
        match offset {
            reg::TIME_LOW => {
                let now = self.now(host);
                self.time_high = Half::High.of(now);
                Half::Low.of(now)
            }
            reg::TIME_HIGH => self.time_high,
            reg::ALARM_LOW => Half::Low.of(self.alarm.unwrap_or(0)),
            reg::ALARM_HIGH => Half::High.of(self.alarm.unwrap_or(0)),
            reg::IRQ_ENABLED => self.enabled.into(),
            reg::ALARM_STATUS => self.alarm.is_some().into(),
            _ => 0,
        }
    }

    fn write(&mut self, offset: u64, value: u32, host: u64) {
        match offset {
            reg::TIME_LOW => self.offset = join(self.set_high, value).wrapping_sub(host),
            reg::TIME_HIGH => self.set_high = value,
            reg::ALARM_LOW => self.alarm = Some(join(self.alarm_high, value)),
            reg::ALARM_HIGH => self.alarm_high = value,
            reg::IRQ_ENABLED => self.enabled = value & 1 != 0,
            reg::CLEAR_ALARM => self.alarm = None,
            reg::CLEAR_INTERRUPT => self.pending = false,
            _ => {}
        }
        self.tick(host);
    }

    /// Rings the alarm if its time has come.
    fn tick(&mut self, host: u64) {
        if self.alarm.is_some_and(|alarm| alarm <= self.now(host)) {
            self.alarm = None;
            self.pending = true;
        }
    }

    /// The level of the chip's interrupt output.
    fn interrupt(&self) -> bool {
        self.enabled && self.pending
    }

    /// Time until the alarm rings.
    fn wait(&self, host: u64) -> Option<Duration> {
        let left = self.alarm?.saturating_sub(self.now(host));
        Some(Duration::from_nanos(left))
    }

    fn now(&self, host: u64) -> u64 {
        host.wrapping_add(self.offset)
    }
}

fn join(high: u32, low: u32) -> u64 {
    Half::High.set(low.into(), high)
}

/// The host's time.
fn host_time() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

/// The RTC on the bus.
pub struct GoldfishRtc {
    shared: Arc<Shared>,
    base: u64,
    failures: RateLimit,
}

struct Shared {
    state: Mutex<State>,
    /// The alarm was set or cleared, or the RTC is gone.
    changed: Condvar,
    line: IrqLine,
}

#[derive(Default)]
struct State {
    clock: Clock,
    /// The level the wire has now.
    level: bool,
    /// The thread that waits for alarms.
    waits: Option<JoinHandle<()>>,
    gone: bool,
}

impl Shared {
    /// Accesses the chip, then moves the wire if its level has changed.
    fn with_clock<T>(&self, state: &mut State, access: impl FnOnce(&mut Clock) -> T) -> T {
        let result = access(&mut state.clock);
        let level = state.clock.interrupt();
        if level != state.level {
            state.level = level;
            self.line.set_level(level);
        }
        result
    }
}

impl GoldfishRtc {
    /// An RTC at guest-physical address `base`, on `line`, that shows the host's time.
    pub fn new(base: u64, line: IrqLine) -> Self {
        Self {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                changed: Condvar::new(),
                line,
            }),
            base,
            failures: RateLimit::named("RTC"),
        }
    }

    /// Most guests never set an alarm: the thread starts with the first.
    fn await_alarm(&self, state: &mut State) {
        if state.clock.alarm.is_none() || state.waits.is_some() {
            return;
        }
        let shared = Arc::downgrade(&self.shared);
        match spawn(Kind::Rtc, "alarm", move || wait_for_alarms(&shared)) {
            Ok(thread) => state.waits = Some(thread),
            Err(error) => guest_warn!(self.failures, "Failed to start the RTC's alarm: {error}"),
        }
    }
}

fn wait_for_alarms(shared: &Weak<Shared>) {
    while let Some(shared) = shared.upgrade() {
        let mut state = lock(&shared.state);
        if state.gone {
            return;
        }
        let host = host_time();
        shared.with_clock(&mut state, |clock| clock.tick(host));
        let Some(wait) = state.clock.wait(host) else {
            let woken = shared.changed.wait(state);
            drop(woken.unwrap_or_else(PoisonError::into_inner));
            continue;
        };
        let woken = shared.changed.wait_timeout(state, wait.min(LOOK_AGAIN));
        drop(woken.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Waits for the thread, which holds the wire to a controller of this machine's.
impl Drop for GoldfishRtc {
    fn drop(&mut self) {
        let thread = {
            let mut state = lock(&self.shared.state);
            state.gone = true;
            state.waits.take()
        };
        self.shared.changed.notify_all();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

/// Only whole registers are served, as the driver accesses them.
impl MmioDevice for GoldfishRtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            let mut state = lock(&self.shared.state);
            let read = |clock: &mut Clock| clock.read(offset, host_time());
            *data = self.shared.with_clock(&mut state, read).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let mut state = lock(&self.shared.state);
        let write = |clock: &mut Clock| clock.write(offset, u32::from_le_bytes(data), host_time());
        self.shared.with_clock(&mut state, write);
        self.await_alarm(&mut state);
        if state.waits.is_some() {
            self.shared.changed.notify_all();
        }
    }
}

impl Device for GoldfishRtc {
    fn id(&self) -> &str {
        "rtc"
    }

    fn describe(&self) -> Value {
        let state = lock(&self.shared.state);
        json!({
            "kind": "goldfish_rtc",
            "registers": self.base,
            "alarm_ns": state.clock.alarm,
            "interrupt": state.level,
        })
    }

    fn fdt_node(&self, fdt: &mut FdtWriter) -> Result<(), FdtError> {
        let node = fdt.begin_node(&format!("rtc@{:x}", self.base))?;
        fdt.property_string("compatible", "google,goldfish-rtc")?;
        fdt.property_array_u64("reg", &[self.base, SIZE])?;
        let line = &self.shared.line;
        fdt.property_array_u32("interrupts-extended", &line.fdt_interrupt())?;
        fdt.end_node(node)
    }
}

#[cfg(test)]
mod tests;
