//! An entropy source: virtio-rng (VIRTIO 1.2, section 5.4). The bytes are from the host's
//! getrandom(2).
//!
//! The rate is limited, so that a guest cannot keep a host's CPU busy.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::io::retry_on_intr;
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::device::{Activation, VirtioDevice};
use super::queue::{Broken, Virtq};
use super::stop::{Stop, StopFor};
use super::worker::{Worker, Workers, wait};
use crate::memory::Pieces;
use crate::util::poll::{borrow, wait_readable_for};
use crate::util::sync::lock;
use crate::util::thread::Kind;

const QUEUE_SIZE: u16 = 64;
/// Bytes per second, on average.
const RATE: u32 = 1 << 20;
/// The most bytes per request. The driver asks again for more.
const ANSWER_MAX: usize = 4096;

/// The least number of bytes that a request counts as, so that the rate of small requests is
/// limited too.
const LEAST: usize = 64;

/// An entropy source of the guest.
#[derive(Default)]
pub struct Rng {
    /// Kept through pauses and resets, so that the guest gains nothing by a reset. The serving
    /// thread works on it.
    budget: Arc<Mutex<Budget>>,
    workers: Workers,
}

impl VirtioDevice for Rng {
    fn kind(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> &str {
        "rng"
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn activate(&self, activation: Activation) -> io::Result<()> {
        let budget = Arc::clone(&self.budget);
        let serve = move |queues: &mut [Virtq], stop: &Stop| {
            serve(&mut queues[0], &mut lock(&budget), stop)
        };
        if !activation.queues.is_empty() {
            let worker = Worker::serve(Kind::Virtio, "rng", activation.queues, serve)?;
            self.workers.add(worker);
        }
        Ok(())
    }

    fn stop(&self, why: StopFor) {
        self.workers.stop(why);
    }

    fn deactivate(&self, _: StopFor) -> Vec<Virtq> {
        self.workers.take_back()
    }
}

fn serve(queue: &mut Virtq, budget: &mut Budget, stop: &Stop) -> Result<(), Broken> {
    let debt = budget.spend(0, Instant::now());
    pause(queue, stop, debt);
    while !stop.is_asked() {
        let Some(chain) = queue.pop()? else {
            queue.notify()?;
            if !queue.enable_notifications()? {
                wait(queue.kick());
            }
            continue;
        };
        let written = fill(&chain.writable);
        queue.push(chain.head, written)?;
        let debt = budget.spend(written.max(LEAST), Instant::now());
        if !debt.is_zero() {
            queue.notify()?;
            pause(queue, stop, debt);
        }
    }
    Ok(())
}

/// Waits for `time`, or until the worker must stop. Ignores the driver's notifications.
fn pause(queue: &Virtq, stop: &Stop, time: Duration) {
    let until = Instant::now() + time;
    while !stop.is_asked() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        if wait_readable_for(borrow(queue.kick()), left) {
            wait(queue.kick());
        }
    }
}

/// Fills the start of `room` with random bytes, and returns their number.
fn fill(room: &Pieces) -> usize {
    let mut bytes = [0; ANSWER_MAX];
    let wanted = room.len().min(ANSWER_MAX);
    // Does not block: the host's entropy pool was initialized long before a VM starts. A signal may
    // interrupt the call.
    let got = retry_on_intr(|| getrandom(&mut bytes[..wanted], GetRandomFlags::empty()));
    let got = got.unwrap_or(0);
    room.copy_from(&bytes[..got])
}

/// The number of bytes that the guest may take at once. It grows by [`RATE`] per second, up to a
/// tenth of that. Negative after a request that took more.
struct Budget {
    bytes: f64,
    at: Instant,
}

impl Default for Budget {
    fn default() -> Self {
        Self::new(Instant::now())
    }
}

impl Budget {
    const MOST: f64 = RATE as f64 / 10.0;

    fn new(now: Instant) -> Self {
        Self {
            bytes: Self::MOST,
            at: now,
        }
    }

    /// Takes `count` bytes, and returns how long to wait before the next request.
    fn spend(&mut self, count: usize, now: Instant) -> Duration {
        let grown = now.duration_since(self.at).as_secs_f64() * f64::from(RATE);
        self.at = now;
        self.bytes = (self.bytes + grown).min(Self::MOST) - count as f64;
        Duration::from_secs_f64((-self.bytes).max(0.0) / f64::from(RATE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn entropy_fills_the_room() {
        let mut driver = Driver::ready(Box::<Rng>::default());
        let take = |driver: &mut Driver, len| {
            driver.request(0, &[(BUFFERS, len, WRITE), (BUFFERS + 4096, 16, WRITE)])
        };
        assert_eq!(take(&mut driver, 48), 64);
        let read = |driver: &Driver| driver.ram.read_obj::<u64>(GuestAddress(BUFFERS)).unwrap();
        let first = read(&driver);
        assert_eq!(take(&mut driver, 48), 64);
        assert_ne!(read(&driver), first);
        assert_eq!(driver.request(0, &[(BUFFERS, 1 << 20, WRITE)]), 4096);
        assert_eq!(
            driver.request(0, &[(BUFFERS, 8, 0)]),
            0,
            "no room, no bytes"
        );
    }

    #[test]
    fn a_greedy_guest_waits() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        assert_eq!(budget.spend(100_000, start), Duration::ZERO);
        let wait = budget.spend(1 << 20, start);
        assert!(
            (Duration::from_millis(990)..Duration::from_secs(1)).contains(&wait),
            "{wait:?}"
        );
        let later = start + Duration::from_secs(100);
        assert_eq!(
            budget.spend(100_000, later),
            Duration::ZERO,
            "unused time gives one burst at most"
        );
        assert!(budget.spend(100_000, later) > Duration::ZERO);
    }

    /// Neither a pause nor a reset refills the budget.
    #[test]
    fn the_budget_stays() {
        let rng = Box::<Rng>::default();
        let budget = Arc::clone(&rng.budget);
        let mut driver = Driver::ready(rng);
        // As if the guest had taken so much that it has to wait for days.
        let empty = |budget: &mut Budget| budget.bytes = -1e12;
        driver.core.pause();
        empty(&mut lock(&budget));
        driver.core.resume();
        let buffers = [(BUFFERS, 8, WRITE)];
        driver.describe_chain(rings(0)[0], 0, &buffers);
        driver.offer(0, 0);
        driver.core.wait_settled();
        driver.core.pause();
        assert!(lock(&budget).bytes < 0.0);
        driver.restart();
        driver.core.pause();
        assert!(lock(&budget).bytes < 0.0);
        assert_eq!(driver.used(0), 0, "served in debt");
        *lock(&budget) = Budget::default();
        driver.core.resume();
        assert_eq!(driver.request(0, &buffers), 8);
    }

    /// The budget is full again in the next process, and no request is lost.
    #[test]
    fn a_request_is_answered_in_the_next_process() {
        let rng = Box::<Rng>::default();
        let budget = Arc::clone(&rng.budget);
        let mut driver = Driver::ready(rng);
        driver.core.pause();
        lock(&budget).bytes = -1e12;
        driver.core.resume();
        let buffers = [(BUFFERS, 8, WRITE)];
        driver.describe_chain(rings(0)[0], 0, &buffers);
        driver.offer(0, 0);
        driver.core.wait_settled();
        driver.core.pause();
        driver.replace(Box::<Rng>::default());
        assert_eq!(driver.used(0), 0);
        driver.core.resume();
        driver.wait_until("the bytes", |d| d.used(0) == 1);
        assert_eq!(driver.request(0, &buffers), 8);
    }

    #[test]
    fn a_guest_in_debt_can_be_reset() {
        let mut driver = Driver::ready(Box::<Rng>::default());
        for index in 0..SIZE {
            let (addr, len, flags, next) = (BUFFERS, 1 << 20, WRITE, 0);
            driver.describe(
                0,
                index,
                Desc {
                    addr,
                    len,
                    flags,
                    next,
                },
            );
        }
        for turn in 0..4 * SIZE {
            driver.offer(0, turn % SIZE);
            if turn % 5 == 0 {
                driver.restart();
            }
        }
        driver.restart();
        assert_eq!(driver.request(0, &[(BUFFERS, 8, WRITE)]), 8);
    }
}
