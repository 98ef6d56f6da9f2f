//! Tests that a paused device goes on where it stopped.

use std::sync::mpsc;
use std::thread;

use super::starts::{make_ready, slow};
use super::*;
use crate::util::thread::Kind;
use crate::virtio::queue::Virtq;
use crate::virtio::worker::{Worker, wait};

/// Returns what the driver sees of its device: used indices of both queues, and interrupt counts.
fn seen(driver: &Driver) -> (u16, u16, u32, u32) {
    let interrupts = &driver.interrupts;
    (
        driver.used(0),
        driver.used(1),
        interrupts.queues.load(Ordering::Acquire),
        interrupts.configs.load(Ordering::Acquire),
    )
}

/// Offers the next buffer on queue 0.
fn offer(driver: &mut Driver) {
    let head = driver.next_offer(0) % SIZE;
    driver.describe(0, head, buffer(WRITE, 0));
    driver.offer(0, head);
}

/// Number of requests that the device has not returned yet.
fn outstanding(driver: &Driver) -> u16 {
    driver.next_offer(0).wrapping_sub(driver.used(0))
}

/// The driver offers as many requests as it may, and the machine pauses at any moment. It may also
/// be saved then, and go on in another process.
#[test]
fn a_thousand_pauses_lose_no_request() {
    for is_restored in [false, true] {
        a_thousand_pauses(is_restored);
    }
}

fn a_thousand_pauses(is_restored: bool) {
    let mut driver = Driver::ready(echo());
    for round in 0u16..1000 {
        for _ in 0..=round % 7 {
            if outstanding(&driver) < SIZE {
                offer(&mut driver);
            }
        }
        driver.core.pause();
        let stands = seen(&driver);
        let described = driver.core.describe();
        assert_eq!(described["paused"], true);
        let next = &described["queues"][0]["next_available"];
        assert_eq!(*next, stands.0, "all requests taken were returned");
        if is_restored {
            driver.replace(echo());
        }
        if outstanding(&driver) < SIZE {
            offer(&mut driver);
        }
        assert_eq!(seen(&driver), stands, "served while paused");
        driver.core.resume();
    }
    driver.wait_until("all of them", |d| outstanding(d) == 0);
    let last = driver.used(0);
    for number in (1..=SIZE).map(|back| last.wrapping_sub(back)) {
        let element = ((number % SIZE).into(), 4);
        assert_eq!(driver.used_element(0, number), element);
    }
}

/// The interrupt for buffers that were used before a pause comes before it ends, not after it.
#[test]
fn an_interrupt_is_not_left_for_later() {
    // Without the event index, each batch has an interrupt. Here each batch is one buffer.
    let mut driver = Driver::of(echo());
    driver.negotiate(!(1 << 29));
    driver.set_up(0, rings(0));
    driver.become_ready();
    for number in 0..100 {
        offer(&mut driver);
        driver.wait_until("a used buffer", |d| d.used(0) == number + 1);
        driver.core.pause();
        assert_eq!(seen(&driver).2, u32::from(number) + 1);
        driver.core.resume();
    }
}

/// The thread is stopped after it has returned a buffer and before it has interrupted the driver.
#[test]
fn what_a_worker_pushed_is_told_at_its_end() {
    let (mut driver, queue) = taken(!(1 << 29));
    offer(&mut driver);
    let (pushed, is_pushed) = mpsc::channel();
    let serve = move |queues: &mut [Virtq], stop: &Stop| {
        let chain = queues[0].pop()?.unwrap();
        queues[0].push(chain.head, 4)?;
        pushed.send(()).unwrap();
        while !stop.is_asked() {
            wait(queues[0].kick());
        }
        Ok(())
    };
    let worker = Worker::serve(Kind::Virtio, "test", vec![queue], serve).unwrap();
    is_pushed.recv().unwrap();
    assert_eq!(seen(&driver).2, 0);
    assert_eq!(worker.stop().unwrap().len(), 1);
    assert_eq!(seen(&driver).2, 1);
}

/// A device that was not started has nothing to pause, whatever its driver has set up.
#[test]
fn a_device_at_rest_pauses_and_stays_at_rest() {
    let mut driver = Driver::of(echo());
    for status in [0, 1, 3] {
        driver.core.set_status(status);
        driver.core.pause();
        assert_eq!(driver.core.describe()["paused"], false);
        driver.core.resume();
        assert_eq!(driver.status(), status);
    }
    // The driver is ready without bus master enable: the device starts once that is set.
    driver.core.set_bus_master(false);
    driver.negotiate(u64::MAX);
    (0..2).for_each(|queue| driver.set_up(queue, rings(queue)));
    driver.core.set_status(READY);
    driver.core.pause();
    driver.core.resume();
    offer(&mut driver);
    driver.core.wait_settled();
    assert_eq!(driver.used(0), 0);
    driver.core.set_bus_master(true);
    driver.wait_until("the request", |d| d.used(0) == 1);
}

#[test]
fn a_reset_and_the_bus_work_right_after_a_pause() {
    let mut driver = Driver::ready(echo());
    for round in 0..300 {
        offer(&mut driver);
        driver.core.pause();
        match round % 3 {
            0 => driver.core.resume(),
            1 => {}
            _ => {
                driver.core.resume();
                driver.core.set_bus_master(false);
                assert_eq!(driver.status(), READY | BROKEN);
                driver.core.set_bus_master(true);
            }
        }
        driver.restart();
        assert_eq!(driver.used(0), 0);
        works(&mut driver, 1);
    }
}

/// The broken queue stays broken, with one interrupt for that. The other queue goes on.
#[test]
fn a_broken_device_is_as_broken_after_a_pause() {
    let mut driver = Driver::ready(echo());
    driver.set_avail(0, SIZE + 1);
    driver.core.registers().kick(0);
    driver.wait_until("DEVICE_NEEDS_RESET", |d| d.status() & BROKEN != 0);
    driver.wait_until("its interrupt", |d| seen(d).3 == 1);
    for _ in 0..3 {
        driver.core.pause();
        driver.core.resume();
        works(&mut driver, 1);
        driver.core.registers().kick(0);
    }
    driver.core.pause();
    assert_eq!((driver.status(), seen(&driver).3), (READY | BROKEN, 1));
    driver.core.resume();
    driver.breaks_and_recovers(|d| works(d, 0));
}

/// A device that failed to start needs a reset before and after a pause.
#[test]
fn a_start_that_fails_has_nothing_to_pause() {
    let (device, hand) = slow();
    let mut driver = Driver::of(device);
    drop(hand.start);
    make_ready(&mut driver);
    driver.core.pause();
    assert_eq!(driver.core.describe()["paused"], false);
    driver.core.resume();
    driver.core.wait_settled();
    assert_eq!(driver.status(), READY | BROKEN);
    let done: Vec<_> = hand.done.try_iter().collect();
    assert_eq!(done, ["starts", "started"]);
    driver.core.set_status(0);
    assert_eq!(driver.status(), 0);
}

/// The devices thread is still busy with the start.
#[test]
fn a_pause_waits_for_a_start_that_is_under_way() {
    let (device, hand) = slow();
    let mut driver = Driver::of(device);
    make_ready(&mut driver);
    assert_eq!(hand.done.recv().unwrap(), "starts");
    thread::scope(|scope| {
        let core = &driver.core;
        let pause = scope.spawn(|| core.pause());
        hand.start.send(()).unwrap();
        hand.stop.send(()).unwrap();
        pause.join().unwrap();
    });
    let done: Vec<_> = hand.done.try_iter().collect();
    assert_eq!(done, ["started", "pauses", "stopped"]);
    hand.start.send(()).unwrap();
    driver.core.resume();
    driver.core.wait_settled();
    assert_eq!(driver.status(), READY);
    drop(hand);
}

#[test]
fn a_device_describes_itself() {
    let mut driver = Driver::ready(echo());
    works(&mut driver, 1);
    let described = driver.core.describe();
    assert_eq!(described["kind"], "virtio-42");
    assert_eq!(described["status"], READY);
    let queues = described["queues"].as_array().unwrap();
    assert_eq!(queues.len(), 2);
    assert_eq!(queues[1]["used"], 1);
    assert_eq!(queues[1]["size"], SIZE);
    assert!(
        queues[1]["next_available"].is_null(),
        "only its thread knows"
    );
    driver.core.pause();
    let described = driver.core.describe();
    assert_eq!(described["queues"][1]["next_available"], 1);
    assert_eq!(described["queues"][0]["next_available"], 0);
    driver.core.set_status(0);
    let described = driver.core.describe();
    assert_eq!(described["queues"][1]["enabled"], false);
    assert!(described["queues"][1]["used"].is_null());
}
