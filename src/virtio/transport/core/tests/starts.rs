//! Tests when a device starts and stops, and which threads wait for that.

use std::sync::mpsc;
use std::thread;

use super::*;
use crate::virtio::queue::Virtq;

/// Controls a [`Slow`] device, and records its calls.
struct Script {
    /// Each start waits for a message on `start`, each stop for one on `stop`.
    start: mpsc::Receiver<()>,
    stop: mpsc::Receiver<()>,
    done: mpsc::Sender<&'static str>,
}

/// A device that starts and stops only when the test lets it.
pub(super) struct Slow(Mutex<Script>);

/// The test's side of a [`Slow`] device.
pub(super) struct Hand {
    pub(super) start: mpsc::Sender<()>,
    pub(super) stop: mpsc::Sender<()>,
    pub(super) done: mpsc::Receiver<&'static str>,
}

pub(super) fn slow() -> (Box<Slow>, Hand) {
    let (start, may_start) = mpsc::channel();
    let (stop, may_stop) = mpsc::channel();
    let (sender, done) = mpsc::channel();
    let script = Script {
        start: may_start,
        stop: may_stop,
        done: sender,
    };
    let hand = Hand { start, stop, done };
    (Box::new(Slow(Mutex::new(script))), hand)
}

impl VirtioDevice for Slow {
    fn kind(&self) -> u32 {
        42
    }
    fn name(&self) -> &str {
        "slow"
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![SIZE]
    }
    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(7);
    }
    fn activate(&self, _: Activation) -> io::Result<()> {
        let script = lock(&self.0);
        let _ = script.done.send("starts");
        let may = script.start.recv();
        let _ = script.done.send("started");
        may.map_err(io::Error::other)
    }
    fn stop(&self, why: StopFor) {
        let script = lock(&self.0);
        let _ = script.done.send(match why {
            StopFor::Reset => "stops",
            StopFor::Pause => "pauses",
        });
        let _ = script.stop.recv();
    }
    fn deactivate(&self, _: StopFor) -> Vec<Virtq> {
        let _ = lock(&self.0).done.send("stopped");
        Vec::new()
    }
}

pub(super) fn make_ready(driver: &mut Driver) {
    driver.negotiate(u64::MAX);
    driver.set_up(0, rings(0));
    driver.core.set_status(READY);
}

/// DRIVER_OK does not wait for the start. A reset right after it waits for the start and the stop.
#[test]
fn a_reset_behind_driver_ok_starts_and_stops_in_order() {
    let (device, hand) = slow();
    let mut driver = Driver::of(device);
    make_ready(&mut driver);
    assert_eq!(driver.status(), READY, "DRIVER_OK reads back at once");
    assert_eq!(hand.done.recv().unwrap(), "starts");
    thread::scope(|scope| {
        let core = &driver.core;
        let reset = scope.spawn(|| core.set_status(0));
        assert_eq!(driver.status(), READY);
        hand.start.send(()).unwrap();
        hand.stop.send(()).unwrap();
        reset.join().unwrap();
        assert_eq!(driver.status(), 0);
    });
    make_ready(&mut driver);
    hand.start.send(()).unwrap();
    driver.core.wait_settled();
    let done: Vec<_> = hand.done.try_iter().collect();
    assert_eq!(done, ["started", "stops", "stopped", "starts", "started"]);
    drop(hand);
}

/// While one vCPU waits for a reset, others can read. Their writes have no effect.
#[test]
fn hostile_registers_while_a_device_stops() {
    let (device, hand) = slow();
    let mut driver = Driver::of(device);
    hand.start.send(()).unwrap();
    make_ready(&mut driver);
    driver.core.wait_settled();
    thread::scope(|scope| {
        let core = &driver.core;
        let resets = [(); 2].map(|()| scope.spawn(|| core.set_status(0)));
        while hand.done.recv().unwrap() != "stops" {}
        for status in [READY, READY | 128, NEGOTIATED] {
            core.set_status(status);
            assert_eq!(driver.status(), READY, "until the device has stopped");
        }
        let mut registers = core.registers();
        registers.queue_select = 0;
        registers.disable_queue();
        registers.set_ring(Ring::Device, Half::Low, 0);
        assert!(registers.queue().is_some_and(|queue| queue.enabled));
        drop(registers);
        let mut config = [0; 2];
        core.read_config(0, &mut config);
        assert_eq!(config, [7; 2]);
        // This waits until the device has stopped.
        let bus = scope.spawn(|| core.set_bus_master(false));
        hand.stop.send(()).unwrap();
        resets.into_iter().for_each(|reset| reset.join().unwrap());
        bus.join().unwrap();
        assert_eq!(driver.status() & !BROKEN, 0);
    });
    let done: Vec<_> = hand.done.try_iter().collect();
    assert_eq!(done, ["stopped"], "stopped once");
}

#[test]
fn a_start_that_fails_is_told() {
    let (device, hand) = slow();
    let mut driver = Driver::of(device);
    make_ready(&mut driver);
    assert_eq!(hand.done.recv().unwrap(), "starts");
    let Hand { start, stop, done } = hand;
    drop(start);
    driver.core.wait_settled();
    assert_eq!(driver.status(), READY | BROKEN);
    assert_eq!(driver.interrupts.configs.load(Ordering::Acquire), 1);
    // A reset has nothing to stop.
    driver.core.set_status(0);
    assert_eq!(driver.status(), 0);
    assert_eq!(done.try_iter().collect::<Vec<_>>(), ["started"]);
    drop(stop);
}

/// A device that stops slowly does not delay the start of another.
#[test]
fn a_device_that_drains_delays_no_other() {
    let (device, hand) = slow();
    let starter = Starter::new().unwrap();
    let mut slow = Driver::with(device, &starter);
    hand.start.send(()).unwrap();
    make_ready(&mut slow);
    thread::scope(|scope| {
        let core = &slow.core;
        let reset = scope.spawn(|| core.set_status(0));
        while hand.done.recv().unwrap() != "stops" {}
        let mut other = Driver::with(echo(), &starter);
        other.restart();
        works(&mut other, 0);
        hand.stop.send(()).unwrap();
        reset.join().unwrap();
    });
}
