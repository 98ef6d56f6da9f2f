//! The goldfish RTC: a clock that counts nanoseconds since 1970, with an alarm
//! (`drivers/rtc/rtc-goldfish.c`; `hw/rtc/goldfish_rtc.c` of QEMU).
//!
//! `Clock` models the chip, without side effects: it gets the host's time as an argument.
//! [`GoldfishRtc`] connects it to the bus, to an interrupt line, and to a timer of the host that
//! the machine's main loop waits for.

mod saved;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use vmm_sys_util::timerfd::TimerFd;

use self::saved::RtcState;
use crate::bus::{Device, FdtError, FdtWriter, IrqLine, MmioDevice};
use crate::snapshot::{LoadError, Parts, SaveError, Saved};
use crate::util::sync::lock;
use crate::util::{Half, RateLimit, guest_warn};

/// Size of the register range, as on QEMU's virt machine.
pub const SIZE: u64 = 0x1000;

/// Offsets of the registers, of 32 bits each.
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

/// The longest time between two checks of an alarm that has not fired. Somebody may set the host's
/// clock meanwhile, and the timer does not notice that.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The chip. The argument `host` of its methods is the host's time, in nanoseconds since 1970.
#[derive(Debug, Default)]
struct Clock {
    /// The guest's time minus the host's time, modulo 2^64.
    offset: u64,
    /// The value of TIME_HIGH: the upper half of the time at the last read of TIME_LOW.
    time_high: u32,
    /// The value last written to ALARM_HIGH. It takes effect when the guest writes ALARM_LOW.
    alarm_high: u32,
    /// The value last written to TIME_HIGH. It takes effect when the guest writes TIME_LOW.
    set_high: u32,
    /// When the alarm fires, in the guest's time. None if no alarm is set, or if it has fired.
    alarm: Option<u64>,
    /// Whether the interrupt is enabled.
    enabled: bool,
    /// Whether an alarm has fired, and the guest has not cleared its interrupt.
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

    /// Fires the alarm if its time has come.
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

    /// The time until the alarm fires, if one is set.
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

/// The host's time, in nanoseconds since 1970.
fn host_time() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

/// The RTC on the bus.
pub struct GoldfishRtc {
    state: Mutex<State>,
    line: IrqLine,
    base: u64,
    failures: RateLimit,
    /// The descriptor of `State::timer`, which lives as long as this struct.
    timer: RawFd,
}

struct State {
    clock: Clock,
    /// The current level of the interrupt line.
    level: bool,
    /// Expires when the alarm fires, or before that to check the host's clock ([`LOOK_AGAIN`]).
    timer: TimerFd,
    is_paused: bool,
}

impl GoldfishRtc {
    /// Creates an RTC at guest-physical address `base` with interrupt line `line`. It shows the
    /// host's time until the guest sets it.
    ///
    /// # Errors
    /// Fails if the host cannot create a timer.
    pub fn new(base: u64, line: IrqLine) -> io::Result<Self> {
        let timer = TimerFd::new().map_err(io::Error::from)?;
        Ok(Self {
            timer: timer.as_raw_fd(),
            state: Mutex::new(State {
                clock: Clock::default(),
                level: false,
                timer,
                is_paused: false,
            }),
            line,
            base,
            failures: RateLimit::named("RTC"),
        })
    }

    /// Must be called when the timer has expired. Fires the alarm if its time has come, and then
    /// sets the timer again if there is still an alarm.
    pub fn timer_is_over(&self) {
        let mut state = lock(&self.state);
        if !state.is_paused {
            self.with_clock(&mut state, |clock| clock.tick(host_time()));
        }
        self.set_timer(&mut state);
    }

    /// Accesses the chip, then sets the interrupt line if its level has changed.
    fn with_clock<T>(&self, state: &mut State, access: impl FnOnce(&mut Clock) -> T) -> T {
        let result = access(&mut state.clock);
        let level = state.clock.interrupt();
        if level != state.level {
            state.level = level;
            self.line.set_level(level);
        }
        result
    }

    /// Sets the timer for the alarm, or turns it off if no alarm is set or the machine is paused.
    /// Either also clears an expired timer, so nobody has to read from it.
    fn set_timer(&self, state: &mut State) {
        let wait = state.clock.wait(host_time()).filter(|_| !state.is_paused);
        let set = match wait {
            // Zero would turn the timer off.
            Some(wait) => {
                let wait = wait.clamp(Duration::from_nanos(1), LOOK_AGAIN);
                state.timer.reset(wait, None)
            }
            None => state.timer.clear(),
        };
        if let Err(error) = set {
            guest_warn!(self.failures, "Failed to set the RTC's timer: {error}");
        }
    }
}

/// The timer's descriptor. When it is readable, [`GoldfishRtc::timer_is_over`] must be called.
impl AsRawFd for GoldfishRtc {
    fn as_raw_fd(&self) -> RawFd {
        self.timer
    }
}

/// Only 4-byte accesses have an effect. Drivers make no others: all registers have 32 bits.
impl MmioDevice for GoldfishRtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            let mut state = lock(&self.state);
            let read = |clock: &mut Clock| clock.read(offset, host_time());
            *data = self.with_clock(&mut state, read).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let mut state = lock(&self.state);
        let had_alarm = state.clock.alarm.is_some();
        let write = |clock: &mut Clock| clock.write(offset, u32::from_le_bytes(data), host_time());
        self.with_clock(&mut state, write);
        if had_alarm || state.clock.alarm.is_some() {
            self.set_timer(&mut state);
        }
    }
}

impl Device for GoldfishRtc {
    fn id(&self) -> &str {
        "rtc"
    }

    fn describe(&self) -> Value {
        let state = lock(&self.state);
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
        fdt.property_array_u32("interrupts-extended", &self.line.fdt_interrupt())?;
        fdt.end_node(node)
    }

    /// An alarm whose time comes while the machine is paused fires when the machine is resumed.
    fn pause(&self) {
        let mut state = lock(&self.state);
        state.is_paused = true;
        self.set_timer(&mut state);
    }

    fn resume(&self) {
        let mut state = lock(&self.state);
        state.is_paused = false;
        self.with_clock(&mut state, |clock| clock.tick(host_time()));
        self.set_timer(&mut state);
    }

    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        let clock = RtcState::of(&lock(&self.state).clock);
        Ok(vec![Saved::of(&clock)?])
    }

    /// The clock shows the time of this host plus the guest's offset. An alarm that is due fires
    /// when the machine is resumed.
    fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        let saved: RtcState = parts.take()?;
        let mut state = lock(&self.state);
        state.clock = saved.into();
        state.level = state.clock.interrupt();
        self.line.set_level(state.level);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
