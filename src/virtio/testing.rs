//! The driver's side of a device, for unit tests: rings in guest RAM, registers set up as a guest
//! does it, and the freedom to do all of it wrong.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::bits::word;
use super::device::{Activation, VirtioDevice, read_bytes};
use super::notify::Interrupt;
use super::queue::Virtq;
use super::stop::StopFor;
use super::transport::core::{Core, Ring};
use super::transport::starter::Starter;
use super::worker::{Worker, Workers, wait};
use crate::config::MemConfig;
use crate::memory::{self, GuestMemory};
use crate::util::thread::Kind;
use crate::util::{ByteSize, Half};

/// Guest RAM starts here, 4 MiB of it.
pub(crate) const RAM: u64 = 0x8000_0000;
/// Entries of every test queue.
pub(crate) const SIZE: u16 = 16;
/// Device-writable.
pub(crate) const WRITE: u16 = word(VRING_DESC_F_WRITE);
/// Another descriptor follows.
pub(crate) const NEXT: u16 = word(VRING_DESC_F_NEXT);
/// A table of descriptors.
pub(crate) const INDIRECT: u16 = word(VRING_DESC_F_INDIRECT);
/// ACKNOWLEDGE, DRIVER, FEATURES_OK.
pub(crate) const NEGOTIATED: u8 = 1 | 2 | 8;
/// The same, and DRIVER_OK.
pub(crate) const READY: u8 = NEGOTIATED | 4;
/// DEVICE_NEEDS_RESET.
pub(crate) const BROKEN: u8 = 64;

/// How long a device's thread may take. Only a failing test gets there.
const PATIENCE: Duration = Duration::from_secs(20);

/// Counts interrupts.
#[derive(Default)]
pub(crate) struct Counter {
    pub(crate) queues: AtomicU32,
    pub(crate) configs: AtomicU32,
}

impl Interrupt for Counter {
    fn queue(&self, _: u16) {
        self.queues.fetch_add(1, Ordering::AcqRel);
    }
    fn config(&self) {
        self.configs.fetch_add(1, Ordering::AcqRel);
    }
    fn queue_fd(&self, _: u16) -> Option<EventFd> {
        None
    }
    fn reset(&self) {}
}

/// Answers each request with as many bytes as it has room for.
#[derive(Default)]
pub(crate) struct Echo {
    workers: Workers,
    config: [u8; 8],
}

impl VirtioDevice for Echo {
    fn kind(&self) -> u32 {
        42
    }
    fn name(&self) -> &str {
        "echo"
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![SIZE; 2]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config, offset, data);
    }
    fn activate(&self, activation: Activation) -> io::Result<()> {
        for queue in activation.queues {
            let worker = Worker::serve(Kind::Virtio, "echo", vec![queue], |queues, stop| {
                while !stop.is_asked() {
                    queues[0].drain(stop, |chain| {
                        let bytes = vec![0xee; chain.writable.len()];
                        Ok(chain.writable.copy_from(&bytes))
                    })?;
                    wait(queues[0].kick());
                }
                Ok(())
            })?;
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

/// The device that the tests of cores and transports drive: two queues, feature 5, and "abcdefgh".
pub(crate) fn echo() -> Box<Echo> {
    Box::new(Echo {
        config: *b"abcdefgh",
        ..Echo::default()
    })
}

/// Hands its one queue to the test.
pub(crate) struct Taker(mpsc::Sender<Vec<Virtq>>);

impl Taker {
    /// With where its queues come when it is activated.
    pub(crate) fn new() -> (Box<Self>, mpsc::Receiver<Vec<Virtq>>) {
        let (sender, taken) = mpsc::channel();
        (Box::new(Self(sender)), taken)
    }
}

impl VirtioDevice for Taker {
    fn kind(&self) -> u32 {
        42
    }
    fn name(&self) -> &str {
        "taker"
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![SIZE]
    }
    fn read_config(&self, _: u64, _: &mut [u8]) {}
    fn activate(&self, activation: Activation) -> io::Result<()> {
        self.0.send(activation.queues).map_err(io::Error::other)
    }
    fn stop(&self, _: StopFor) {}
    fn deactivate(&self, _: StopFor) -> Vec<Virtq> {
        Vec::new()
    }
}

/// A live queue in the test's own hands, and its driver that accepted `features`.
pub(crate) fn taken(features: u64) -> (Driver, Virtq) {
    let (device, taken) = Taker::new();
    let mut driver = Driver::of(device);
    driver.negotiate(features);
    driver.set_up(0, rings(0));
    driver.become_ready();
    (driver, taken.recv().unwrap().remove(0))
}

/// A descriptor as it lies in RAM.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Desc {
    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A device under test, with its driver's memory.
pub(crate) struct Driver {
    pub(crate) core: Core,
    pub(crate) ram: Arc<GuestMemory>,
    pub(crate) interrupts: Arc<Counter>,
    avail: Vec<u16>,
}

impl Driver {
    /// The device after power-on.
    pub(crate) fn of(device: Box<dyn VirtioDevice>) -> Self {
        Self::with(device, &Starter::new().unwrap())
    }

    /// The same, started and stopped by this thread.
    pub(crate) fn with(device: Box<dyn VirtioDevice>, starter: &Arc<Starter>) -> Self {
        let ram = memory::create(
            GuestAddress(RAM),
            MemConfig::new(ByteSize::mib(4)),
            memory::Backing::Private,
        )
        .unwrap();
        let interrupts = Arc::new(Counter::default());
        let told = Arc::clone(&interrupts) as _;
        let core = Core::new(device, Arc::clone(&ram), told, starter).unwrap();
        let avail = vec![0; core.registers().queues().len()];
        Self {
            core,
            ram,
            interrupts,
            avail,
        }
    }

    /// The device with its driver ready: every feature accepted, every queue set up.
    pub(crate) fn ready(device: Box<dyn VirtioDevice>) -> Self {
        let mut driver = Self::of(device);
        driver.negotiate(u64::MAX);
        for queue in 0..driver.avail.len() {
            driver.set_up(queue, rings(queue));
        }
        driver.become_ready();
        assert_eq!(driver.status(), READY);
        driver
    }

    /// Sets DRIVER_OK, and returns when the device has started, or could not.
    pub(crate) fn become_ready(&self) {
        self.core.set_status(READY);
        self.core.wait_settled();
    }

    /// The device status.
    pub(crate) fn status(&self) -> u8 {
        self.core.registers().status()
    }

    /// Accepts what is offered of `features`.
    pub(crate) fn negotiate(&mut self, features: u64) {
        self.core.set_status(3);
        for (select, half) in [(0, Half::Low), (1, Half::High)] {
            let mut registers = self.core.registers();
            registers.device_select = select;
            registers.driver_select = select;
            let accepted = registers.device_features() & half.of(features);
            registers.set_driver_features(accepted);
        }
        self.core.set_status(NEGOTIATED);
    }

    /// Sets up a queue with its parts at these addresses.
    pub(crate) fn set_up(&mut self, queue: usize, rings: [u64; 3]) {
        let mut registers = self.core.registers();
        registers.queue_select = u16::try_from(queue).unwrap();
        registers.set_queue_size(SIZE);
        for (ring, address) in [Ring::Descriptors, Ring::Driver, Ring::Device]
            .into_iter()
            .zip(rings)
        {
            for half in [Half::Low, Half::High] {
                registers.set_ring(ring, half, half.of(address));
            }
        }
        registers.enable_queue();
        drop(registers);
        self.avail[queue] = 0;
        // As memory is after a driver's allocation.
        for address in rings {
            let _ = self.ram.write_slice(&[0; 512], GuestAddress(address));
        }
    }

    /// Writes descriptor `index` of `queue`.
    pub(crate) fn describe(&self, queue: usize, index: u16, desc: Desc) {
        self.describe_at(rings(queue)[0], index, desc);
    }

    /// Writes descriptor `index` of the table at `table`.
    pub(crate) fn describe_at(&self, table: u64, index: u16, desc: Desc) {
        let at = GuestAddress(table + 16 * u64::from(index));
        self.ram.write_slice(&desc.bytes(), at).unwrap();
    }

    /// Writes a chain of these buffers (address, length, flags but NEXT) to the table at `table`, from
    /// descriptor `first` on.
    pub(crate) fn describe_chain(&self, table: u64, first: u16, buffers: &[(u64, u32, u16)]) {
        let last = buffers.len() - 1;
        for (place, (addr, len, flags)) in buffers.iter().copied().enumerate() {
            let index = first + u16::try_from(place).unwrap();
            let flags = flags | if place == last { 0 } else { NEXT };
            let next = index + 1;
            let desc = Desc {
                addr,
                len,
                flags,
                next,
            };
            self.describe_at(table, index, desc);
        }
    }

    /// Makes the chain that starts at `head` available, and notifies the device.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let next = self.avail[queue];
        let slot = rings(queue)[1] + 4 + 2 * u64::from(next % SIZE);
        self.ram.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_avail(queue, next.wrapping_add(1));
        self.core.registers().kick(u16::try_from(queue).unwrap());
    }

    /// The available ring's index: the number of the next chain that is offered.
    pub(crate) fn next_offer(&self, queue: usize) -> u16 {
        self.avail[queue]
    }

    /// Writes the available ring's index, whatever is in the ring.
    pub(crate) fn set_avail(&mut self, queue: usize, index: u16) {
        self.avail[queue] = index;
        let at = GuestAddress(rings(queue)[1] + 2);
        self.ram.store(index, at, Ordering::Release).unwrap();
    }

    /// The used ring's index.
    pub(crate) fn used(&self, queue: usize) -> u16 {
        let at = GuestAddress(rings(queue)[2] + 2);
        self.ram.load(at, Ordering::Acquire).unwrap()
    }

    /// Used element `index`: the chain's head and the bytes written.
    pub(crate) fn used_element(&self, queue: usize, index: u16) -> (u32, u32) {
        let at = rings(queue)[2] + 4 + 8 * u64::from(index % SIZE);
        let read = |at| self.ram.read_obj(GuestAddress(at)).unwrap();
        (read(at), read(at + 4))
    }

    /// Offers a chain of these buffers (address, length, flags) from descriptor 0 on, waits for it,
    /// and returns the bytes written.
    pub(crate) fn request(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) -> u32 {
        self.describe_chain(rings(queue)[0], 0, buffers);
        let before = self.used(queue);
        self.offer(queue, 0);
        self.wait_until("a used buffer", |d| d.used(queue) != before);
        let (head, written) = self.used_element(queue, before);
        assert_eq!(head, 0, "the chain's head comes back");
        written
    }

    /// Waits for what a device's thread does.
    #[track_caller]
    pub(crate) fn wait_until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < deadline, "timed out waiting for {what}");
            std::thread::yield_now();
        }
    }

    /// The device finds that it needs a reset, tells so, takes the reset, and works again when
    /// `works` says so.
    #[track_caller]
    pub(crate) fn breaks_and_recovers(&mut self, works: impl FnOnce(&mut Self)) {
        self.wait_until("DEVICE_NEEDS_RESET", |d| d.status() & BROKEN != 0);
        self.wait_until("its interrupt", |d| {
            d.interrupts.configs.load(Ordering::Acquire) > 0
        });
        self.restart();
        works(self);
    }

    /// A reset, and everything set up again.
    pub(crate) fn restart(&mut self) {
        self.core.set_status(0);
        assert_eq!(self.status(), 0);
        self.negotiate(u64::MAX);
        for queue in 0..self.avail.len() {
            self.set_up(queue, rings(queue));
        }
        self.become_ready();
        assert_eq!(self.status(), READY);
    }
}

/// Where [`Driver::ready`] puts a queue's parts.
pub(crate) fn rings(queue: usize) -> [u64; 3] {
    let base = RAM + 0x1000 * queue as u64;
    [base, base + 0x400, base + 0x800]
}

/// RAM for buffers.
pub(crate) const BUFFERS: u64 = RAM + (1 << 20);
/// The first address behind RAM.
pub(crate) const RAM_END: u64 = RAM + (4 << 20);
