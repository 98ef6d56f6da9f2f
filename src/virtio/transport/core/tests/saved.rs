//! Tests that a device goes on in another process, and what it makes of hostile state.

use serde_json::{Value, json};

use super::starts::slow;
use super::*;
use crate::snapshot::testing::survives_from;
use crate::snapshot::{Parts, Saved};

/// A device that its driver has set up, with some requests served, and paused. The driver has not
/// accepted feature 5.
fn paused() -> Driver {
    let mut driver = Driver::of(echo());
    driver.negotiate(!(1 << 5));
    (0..2).for_each(|queue| driver.set_up(queue, rings(queue)));
    driver.become_ready();
    works(&mut driver, 0);
    works(&mut driver, 0);
    works(&mut driver, 1);
    driver.core.registers().queue_select = 1;
    driver.core.pause();
    driver
}

#[test]
fn every_register_survives() {
    let driver = paused();
    let first = driver.core.save().unwrap();
    // The list of positions has one for each enabled queue.
    let fixed = ["/queues", "/live", "/enabled"];
    survives_from(&first, || Box::new(driver.another(echo())), &fixed);
}

#[test]
fn a_driver_that_is_not_ready_survives() {
    let mut driver = Driver::of(echo());
    driver.core.set_status(3);
    driver.core.registers().set_driver_features(1 << 5);
    driver.set_up(1, rings(1));
    let first = driver.core.save().unwrap();
    let fixed = ["/queues", "/life"];
    survives_from(&first, || Box::new(driver.another(echo())), &fixed);
    driver.replace(echo());
    driver.restart();
    works(&mut driver, 1);
}

/// Loads the state of `driver`'s device into another one, with the value at `path` replaced.
/// Returns the error's message.
fn load_with(driver: &Driver, path: &str, value: Value) -> Result<Core, String> {
    let mut saved = driver.core.save().unwrap();
    let mut state: Value = serde_json::from_slice(&saved[0].json).unwrap();
    *state.pointer_mut(path).expect(path) = value;
    saved[0].json = serde_json::to_vec(&state).unwrap();
    let core = driver.another(echo());
    let loaded = core.load(&mut Parts::new(saved));
    loaded.map(|()| core).map_err(|error| error.to_string())
}

#[test]
fn hostile_state_is_refused() {
    let driver = paused();
    let position = json!({"next_available": 1, "next_used": 1, "broken": false});
    let features = u64::from(u32::MAX) << 5;
    for (path, value, why) in [
        ("/status", json!(READY | 0x30), "has unknown bits: 0x30"),
        ("/status", json!(256), "cannot be read"),
        ("/status", json!(NEGOTIATED), "its driver is not ready"),
        ("/accepted", json!(1u64 << 40), "offer here: 40"),
        ("/accepted", json!(features), "offer here: 6, 7, 8, 9"),
        ("/offered", json!(0), "offer here: 28, 29, 32"),
        ("/queues", json!([]), "0 queues in the snapshot, and 2 now"),
        ("/queues/0/size", json!(0), "queue 0: 0 entries"),
        ("/queues/1/size", json!(12), "queue 1: 12 entries"),
        ("/queues/0/size", json!(2 * SIZE), "power of two up to 16"),
        ("/queues/0/descriptors", json!(0), "queue 0: its ring"),
        ("/queues/0/descriptors", json!(8), "queue 0: its ring"),
        ("/queues/1/driver", json!(RAM_END - 8), "queue 1: its ring"),
        ("/queues/1/device", json!(u64::MAX - 7), "is not in RAM"),
        ("/queues/1/device", json!(RAM + 2), "queue 1"),
        ("/queues/1/enabled", json!(false), "1 of its queues"),
        ("/life/live", json!([position]), "and 1 have positions"),
        ("/life/live", json!(vec![position.clone(); 9]), "and 9 have"),
        ("/life/live/0/next_used", json!(65536), "cannot be read"),
        ("/life", json!("failed"), "but it needs no reset"),
        ("/life", json!("stopping"), "unknown variant"),
    ] {
        let line = load_with(&driver, path, value.clone()).err();
        let line = line.unwrap_or_else(|| panic!("{path} {value} was taken"));
        assert!(line.contains(why), "{path} {value}: {line}");
    }
}

/// Wrong positions break a queue, or let the device serve old requests again. A driver could do
/// both by itself.
#[test]
fn hostile_positions_harm_only_the_queue() {
    for (field, value, breaks) in [
        ("next_available", 1000u16, true),
        ("next_available", 3, true),
        ("next_available", u16::MAX, false),
        ("next_used", 12345, false),
        ("next_used", u16::MAX, false),
    ] {
        let mut driver = paused();
        let path = format!("/life/live/0/{field}");
        driver.core = load_with(&driver, &path, json!(value)).unwrap();
        driver.core.resume();
        works(&mut driver, 1);
        if breaks {
            driver.wait_until("DEVICE_NEEDS_RESET", |d| d.status() & BROKEN != 0);
        }
        driver.restart();
        works(&mut driver, 0);
    }
}

/// A device that has been used is not a new one.
#[test]
fn a_device_is_loaded_only_once() {
    let driver = paused();
    let saved = driver.core.save().unwrap();
    let other = driver.another(echo());
    other.load(&mut Parts::new(saved.clone())).unwrap();
    let again = other.load(&mut Parts::new(saved)).unwrap_err().to_string();
    assert!(again.contains("already"), "{again}");
}

#[test]
fn without_the_bus_no_device_is_live() {
    let driver = paused();
    let saved = driver.core.save().unwrap();
    let other = driver.another(echo());
    other.set_bus_master(false);
    let line = other.load(&mut Parts::new(saved)).unwrap_err().to_string();
    assert!(line.contains("bus master enable is off"), "{line}");
}

/// A driver that was ready without the bus starts its device with the bus, also after a load.
#[test]
fn a_driver_that_waits_for_the_bus_waits_on() {
    let mut driver = Driver::of(echo());
    driver.core.set_bus_master(false);
    driver.negotiate(u64::MAX);
    (0..2).for_each(|queue| driver.set_up(queue, rings(queue)));
    driver.core.set_status(READY);
    let saved = driver.core.save().unwrap();
    let other = driver.another(echo());
    other.set_bus_master(false);
    other.load(&mut Parts::new(saved)).unwrap();
    other.resume();
    driver.core = other;
    assert_eq!(driver.status(), READY);
    driver.core.set_bus_master(true);
    works(&mut driver, 0);
}

/// The features that a driver finds do not change, even if rvmm offers more by now.
#[test]
fn a_driver_finds_the_same_features_again() {
    let driver = paused();
    let offered = 0x1_3000_0000u64;
    let core = load_with(&driver, "/offered", json!(offered)).unwrap();
    let mut registers = core.registers();
    registers.device_select = 0;
    assert_eq!(registers.device_features(), 0x3000_0000, "without bit 5");
    assert_eq!(registers.features(), offered);
}

/// The start of a device had failed. It needs a reset in the next process, too.
#[test]
fn a_start_that_failed_has_failed() {
    let (device, hand) = slow();
    let mut driver = Driver::of(device);
    drop(hand.start);
    super::starts::make_ready(&mut driver);
    driver.core.pause();
    let saved = driver.core.save().unwrap();
    let (device, hand) = slow();
    let other = driver.another(device);
    other.load(&mut Parts::new(saved)).unwrap();
    driver.core = other;
    for _ in 0..2 {
        driver.core.resume();
        driver.core.pause();
        driver.core.wait_settled();
    }
    assert_eq!(driver.status(), READY | BROKEN);
    assert_eq!(hand.done.try_iter().count(), 0, "never started");
    driver.core.registers().queue_select = 0;
    driver.core.registers().set_queue_size(2);
    assert_eq!(driver.core.registers().queue().unwrap().size, SIZE);
    driver.core.set_status(0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn a_broken_queue_stays_broken() {
    let mut driver = Driver::ready(echo());
    driver.set_avail(0, SIZE + 1);
    driver.core.registers().kick(0);
    driver.wait_until("DEVICE_NEEDS_RESET", |d| d.status() & BROKEN != 0);
    driver.core.pause();
    driver.replace(echo());
    // The next process could serve this queue, if it was not broken before.
    driver.set_avail(0, 1);
    driver.describe(0, 0, buffer(WRITE, 0));
    driver.core.resume();
    works(&mut driver, 1);
    driver.core.pause();
    assert_eq!((driver.status(), driver.used(0)), (READY | BROKEN, 0));
    driver.core.resume();
    driver.breaks_and_recovers(|d| works(d, 0));
}

#[test]
fn state_of_another_kind_is_refused() {
    let driver = paused();
    let mut saved = driver.core.save().unwrap();
    saved[0].kind = "uart".into();
    let missing = driver.another(echo()).load(&mut Parts::new(saved.clone()));
    assert_eq!(missing.unwrap_err().to_string(), "there is no virtio state");
    let version = 2;
    saved[0] = Saved {
        kind: "virtio".into(),
        version,
        ..saved[0].clone()
    };
    let newer = driver.another(echo()).load(&mut Parts::new(saved));
    assert!(newer.unwrap_err().to_string().contains("version 2"));
}
