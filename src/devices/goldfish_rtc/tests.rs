//! Tests of the chip as its driver uses it, and of the interrupt line.

use std::os::fd::AsRawFd;
use std::sync::{Arc, mpsc};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::*;
use crate::bus::IrqSink;
use crate::snapshot::testing;

const SECOND: u64 = 1_000_000_000;

#[test]
fn it_shows_the_hosts_time_in_two_halves() {
    let mut clock = Clock::default();
    let now = 0x0123_4567_89ab_cdef;
    assert_eq!(clock.read(reg::TIME_LOW, now), 0x89ab_cdef);
    // The upper half belongs to the lower half that was read before, whatever the time is now.
    assert_eq!(clock.read(reg::TIME_HIGH, now + (1 << 40)), 0x0123_4567);
}

#[test]
fn it_can_be_set() {
    let mut clock = Clock::default();
    clock.write(reg::TIME_HIGH, 1, 500);
    clock.write(reg::TIME_LOW, 7, 500);
    assert_eq!(clock.now(500 + SECOND), (1 << 32) + 7 + SECOND);
}

fn set_alarm(clock: &mut Clock, at: u64, host: u64) {
    clock.write(reg::ALARM_HIGH, Half::High.of(at), host);
    clock.write(reg::ALARM_LOW, Half::Low.of(at), host);
}

#[test]
fn an_alarm_rings_once_until_it_is_cleared() {
    let mut clock = Clock::default();
    clock.write(reg::IRQ_ENABLED, 1, 0);
    set_alarm(&mut clock, 5 * SECOND, 0);
    assert_eq!(clock.read(reg::ALARM_STATUS, 0), 1);
    assert_eq!(clock.wait(SECOND), Some(Duration::from_secs(4)));
    clock.tick(5 * SECOND - 1);
    assert!(!clock.interrupt());
    clock.tick(5 * SECOND);
    assert!(clock.interrupt());
    assert_eq!(clock.read(reg::ALARM_STATUS, 5 * SECOND), 0);
    clock.write(reg::CLEAR_INTERRUPT, 1, 6 * SECOND);
    assert!(!clock.interrupt());
    clock.tick(9 * SECOND);
    assert!(!clock.interrupt());
}

#[test]
fn an_alarm_of_the_past_rings_at_once_and_disabled_it_is_silent() {
    let mut clock = Clock::default();
    set_alarm(&mut clock, SECOND, 2 * SECOND);
    assert!(clock.pending && !clock.interrupt());
    clock.write(reg::IRQ_ENABLED, 1, 2 * SECOND);
    assert!(clock.interrupt());
    clock.write(reg::CLEAR_INTERRUPT, 1, 2 * SECOND);
    set_alarm(&mut clock, 9 * SECOND, 2 * SECOND);
    clock.write(reg::CLEAR_ALARM, 1, 2 * SECOND);
    clock.tick(u64::MAX);
    assert!(!clock.interrupt());
}

struct Levels(Mutex<mpsc::Sender<bool>>);

impl IrqSink for Levels {
    fn set_level(&self, _: u32, high: bool) {
        // Some tests do not look at the levels.
        let _ = lock(&self.0).send(high);
    }
    fn fdt_interrupt(&self, _: u32) -> Vec<u32> {
        Vec::new()
    }
}

fn rtc() -> (GoldfishRtc, mpsc::Receiver<bool>) {
    let (sender, levels) = mpsc::channel();
    let line = IrqLine::new(Arc::new(Levels(Mutex::new(sender))), 11);
    (GoldfishRtc::new(0x10_1000, line).unwrap(), levels)
}

/// Sets an alarm that fires in 20 ms.
fn set_soon(rtc: &GoldfishRtc) {
    let store = |offset, value: u32| rtc.write(offset, &value.to_le_bytes());
    let soon = host_time() + SECOND / 50;
    store(reg::IRQ_ENABLED, 1);
    store(reg::ALARM_HIGH, Half::High.of(soon));
    store(reg::ALARM_LOW, Half::Low.of(soon));
}

/// Whether the timer expires within `milliseconds`.
fn is_over(rtc: &GoldfishRtc, milliseconds: i32) -> bool {
    let epoll = Epoll::new().unwrap();
    let timer = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, rtc.as_raw_fd(), timer)
        .unwrap();
    epoll.wait(milliseconds, &mut [timer]).unwrap() > 0
}

fn wait_for_timer(rtc: &GoldfishRtc) {
    assert!(is_over(rtc, 60_000), "the timer does not expire");
    rtc.timer_is_over();
}

#[test]
fn the_timer_raises_the_wire() {
    let (rtc, levels) = rtc();
    assert!(!is_over(&rtc, 0));
    set_soon(&rtc);
    while levels.try_recv().is_err() {
        wait_for_timer(&rtc);
    }
    rtc.write(reg::CLEAR_INTERRUPT, &1u32.to_le_bytes());
    assert!(!levels.recv().unwrap());
    // The alarm has fired once, and does not fire again.
    rtc.timer_is_over();
    assert!(levels.try_recv().is_err());
    assert!(!is_over(&rtc, 0));
}

#[test]
fn an_alarm_of_a_pause_rings_after_it() {
    let (rtc, levels) = rtc();
    rtc.pause();
    set_soon(&rtc);
    while host_time() < rtc.state.lock().unwrap().clock.alarm.unwrap() {
        std::thread::yield_now();
    }
    assert!(!is_over(&rtc, 0));
    rtc.timer_is_over();
    assert!(levels.try_recv().is_err());
    rtc.resume();
    assert!(levels.recv().unwrap());
}

#[test]
fn odd_accesses_do_nothing() {
    let (rtc, _levels) = rtc();
    for size in [1, 2, 8] {
        let mut data = vec![0; size];
        rtc.read(reg::TIME_LOW, &mut data);
        assert!(data.iter().all(|byte| *byte == 0));
        rtc.write(reg::IRQ_ENABLED, &vec![0xff; size]);
    }
    let mut enabled = [9; 4];
    rtc.read(reg::IRQ_ENABLED, &mut enabled);
    assert_eq!(enabled, [0; 4]);
}

/// A paused clock whose registers all differ from their values after a reset.
fn set_up() -> GoldfishRtc {
    let (rtc, _) = rtc();
    rtc.pause();
    lock(&rtc.state).clock = Clock {
        offset: u64::MAX - 5,
        time_high: 1,
        alarm_high: 2,
        set_high: 3,
        alarm: Some(4),
        enabled: true,
        pending: true,
    };
    rtc
}

#[test]
fn its_state_survives() {
    testing::survives(|| Box::new(set_up()), &[]);
}

/// A clock that goes on where `rtc` was, and its wire.
fn moved(rtc: &GoldfishRtc) -> (GoldfishRtc, mpsc::Receiver<bool>) {
    let (other, levels) = self::rtc();
    other.pause();
    let mut parts = Parts::new(rtc.save().unwrap());
    other.load(&mut parts).unwrap();
    parts.finish().unwrap();
    (other, levels)
}

#[test]
fn a_restored_clock_shows_the_hosts_time_plus_the_offset() {
    let (rtc, _levels) = rtc();
    let hour = 3600 * SECOND;
    let ahead = host_time() + hour;
    rtc.write(reg::TIME_HIGH, &Half::High.of(ahead).to_le_bytes());
    rtc.write(reg::TIME_LOW, &Half::Low.of(ahead).to_le_bytes());
    rtc.pause();
    let before = host_time();
    let (rtc, levels) = moved(&rtc);
    let offset = lock(&rtc.state).clock.now(before) - before;
    assert!(offset <= hour && hour - offset < 60 * SECOND, "{offset}");
    assert!(!levels.try_recv().unwrap(), "the wire has its level again");
}

/// A paused clock whose alarm fires in 20 ms.
fn paused_with_alarm() -> GoldfishRtc {
    let rtc = set_up();
    lock(&rtc.state).clock = Clock {
        alarm: Some(host_time() + SECOND / 50),
        enabled: true,
        ..Clock::default()
    };
    rtc
}

#[test]
fn an_alarm_that_is_due_rings_when_the_restored_machine_goes_on() {
    let (rtc, levels) = moved(&paused_with_alarm());
    assert!(!levels.try_recv().unwrap());
    while host_time() < lock(&rtc.state).clock.alarm.unwrap() {
        std::thread::yield_now();
    }
    assert!(levels.try_recv().is_err());
    rtc.resume();
    assert!(levels.try_recv().unwrap());
    rtc.pause();
    let (rtc, levels) = moved(&rtc);
    assert!(levels.try_recv().unwrap(), "it rings until it is cleared");
    rtc.resume();
    assert!(levels.try_recv().is_err());
}

#[test]
fn an_alarm_of_the_future_sets_the_timer_of_the_restored_machine() {
    let (rtc, levels) = moved(&paused_with_alarm());
    assert!(!levels.try_recv().unwrap());
    rtc.resume();
    while levels.try_recv().is_err() {
        wait_for_timer(&rtc);
    }
}

#[test]
fn no_field_may_be_missing() {
    let mut saved = set_up().save().unwrap();
    let state: Value = serde_json::from_slice(&saved[0].json).unwrap();
    for field in state.as_object().unwrap().keys() {
        let mut less = state.clone();
        less.as_object_mut().unwrap().remove(field);
        saved[0].json = serde_json::to_vec(&less).unwrap();
        let error = set_up().load(&mut Parts::new(saved.clone())).unwrap_err();
        let wanted = format!("missing field `{field}`");
        assert!(error.to_string().contains(&wanted), "{error}");
    }
}
