//! The driver's side of a device, for unit tests: rings in guest RAM, and registers set up as a
//! guest does it. A test can also do any of this wrongly.

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
use crate::snapshot::testing::Part;
use crate::snapshot::{LoadError, Parts, SaveError, Saved};
use crate::util::thread::Kind;
use crate::util::{ByteSize, Half};

/// Start of guest RAM, which has 4 MiB.
pub(crate) const RAM: u64 = 0x8000_0000;
/// Number of entries of every test queue.
pub(crate) const SIZE: u16 = 16;
/// Descriptor flag: the buffer is device-writable.
pub(crate) const WRITE: u16 = word(VRING_DESC_F_WRITE);
/// Descriptor flag: another descriptor follows.
pub(crate) const NEXT: u16 = word(VRING_DESC_F_NEXT);
/// Descriptor flag: the buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = word(VRING_DESC_F_INDIRECT);
/// Status bits ACKNOWLEDGE, DRIVER, FEATURES_OK.
pub(crate) const NEGOTIATED: u8 = 1 | 2 | 8;
/// [`NEGOTIATED`] and DRIVER_OK.
pub(crate) const READY: u8 = NEGOTIATED | 4;
/// Status bit DEVICE_NEEDS_RESET.
pub(crate) const BROKEN: u8 = 64;

/// How long a test waits for a device's thread. Only a failing test waits that long.
const PATIENCE: Duration = Duration::from_secs(20);

/// Counts the device's interrupts.
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

/// A device that fills the writable part of each request.
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

/// The device for tests of the core and the transports: two queues, feature 5, and a configuration
/// space of "abcdefgh".
pub(crate) fn echo() -> Box<Echo> {
    Box::new(Echo {
        config: *b"abcdefgh",
        ..Echo::default()
    })
}

/// A device that hands its queues to the test.
pub(crate) struct Taker(mpsc::Sender<Vec<Virtq>>);

impl Taker {
    /// Returns the device, and a channel that gets its queues when it is activated.
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

/// Returns a driver that accepted `features`, and its live queue for the test to serve.
pub(crate) fn taken(features: u64) -> (Driver, Virtq) {
    let (device, taken) = Taker::new();
    let mut driver = Driver::of(device);
    driver.negotiate(features);
    driver.set_up(0, rings(0));
    driver.become_ready();
    (driver, taken.recv().unwrap().remove(0))
}

/// The fields of a descriptor.
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

/// A device under test, with the driver's memory.
pub(crate) struct Driver {
    pub(crate) core: Core,
    pub(crate) ram: Arc<GuestMemory>,
    pub(crate) interrupts: Arc<Counter>,
    avail: Vec<u16>,
    starter: Arc<Starter>,
}

/// Lets tests save and load a device with its registers.
impl Part for Core {
    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        Core::save(self)
    }

    fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        Core::load(self, parts)
    }
}

impl Driver {
    /// Returns the device after power-on.
    pub(crate) fn of(device: Box<dyn VirtioDevice>) -> Self {
        Self::with(device, &Starter::new().unwrap())
    }

    /// Like [`Driver::of`], but `starter` starts and stops the device.
    pub(crate) fn with(device: Box<dyn VirtioDevice>, starter: &Arc<Starter>) -> Self {
        let ram = memory::create(
            GuestAddress(RAM),
            MemConfig::new(ByteSize::mib(4)),
            memory::Backing::Private,
        )
        .unwrap();
        let interrupts = Arc::new(Counter::default());
        let interrupt = Arc::clone(&interrupts) as _;
        let core = Core::new(device, Arc::clone(&ram), interrupt, starter).unwrap();
        let avail = vec![0; core.registers().queues().len()];
        Self {
            core,
            ram,
            interrupts,
            avail,
            starter: Arc::clone(starter),
        }
    }

    /// Returns `device` after power-on, over the same RAM, with the same interrupts.
    pub(crate) fn another(&self, device: Box<dyn VirtioDevice>) -> Core {
        let interrupt = Arc::clone(&self.interrupts) as _;
        Core::new(device, Arc::clone(&self.ram), interrupt, &self.starter).unwrap()
    }

    /// Replaces the device, which must be paused, by `device`, as if the machine was saved and
    /// restored. The new device is paused, too, and the driver does not notice.
    pub(crate) fn replace(&mut self, device: Box<dyn VirtioDevice>) {
        let saved = self.core.save().unwrap();
        let core = self.another(device);
        let mut parts = Parts::new(saved.clone());
        core.load(&mut parts).unwrap();
        parts.finish().unwrap();
        assert_eq!(core.save().unwrap(), saved);
        self.core = core;
    }

    /// Returns the device with its driver ready: every feature accepted, every queue set up.
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

    /// Sets DRIVER_OK, and returns when the device has started or failed to start.
    pub(crate) fn become_ready(&self) {
        self.core.set_status(READY);
        self.core.wait_settled();
    }

    /// The device status.
    pub(crate) fn status(&self) -> u8 {
        self.core.registers().status()
    }

    /// Accepts those of `features` that the device offers.
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

    /// Sets up a queue. Its parts are at the addresses `rings`: descriptors, available ring, used
    /// ring.
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
        // A driver's freshly allocated memory is zeroed.
        for address in rings {
            let _ = self.ram.write_slice(&[0; 512], GuestAddress(address));
        }
    }

    /// Writes descriptor `index` of `queue`'s table.
    pub(crate) fn describe(&self, queue: usize, index: u16, desc: Desc) {
        self.describe_at(rings(queue)[0], index, desc);
    }

    /// Writes descriptor `index` of the table at address `table`.
    pub(crate) fn describe_at(&self, table: u64, index: u16, desc: Desc) {
        let at = GuestAddress(table + 16 * u64::from(index));
        self.ram.write_slice(&desc.bytes(), at).unwrap();
    }

    /// Writes a chain of `buffers` (address, length, flags without NEXT) to the table at `table`,
    /// starting at descriptor `first`.
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

    /// Makes the chain with head `head` available, and notifies the device.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let next = self.avail[queue];
        let slot = rings(queue)[1] + 4 + 2 * u64::from(next % SIZE);
        self.ram.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_avail(queue, next.wrapping_add(1));
        self.core.registers().kick(u16::try_from(queue).unwrap());
    }

    /// The available ring's index, which counts the chains offered so far.
    pub(crate) fn next_offer(&self, queue: usize) -> u16 {
        self.avail[queue]
    }

    /// Writes the available ring's index. The ring's entries stay as they are.
    pub(crate) fn set_avail(&mut self, queue: usize, index: u16) {
        self.avail[queue] = index;
        let at = GuestAddress(rings(queue)[1] + 2);
        self.ram.store(index, at, Ordering::Release).unwrap();
    }

    /// Reads the used ring's index.
    pub(crate) fn used(&self, queue: usize) -> u16 {
        let at = GuestAddress(rings(queue)[2] + 2);
        self.ram.load(at, Ordering::Acquire).unwrap()
    }

    /// Reads used element `index`: the chain's head, and the number of bytes written.
    pub(crate) fn used_element(&self, queue: usize, index: u16) -> (u32, u32) {
        let at = rings(queue)[2] + 4 + 8 * u64::from(index % SIZE);
        let read = |at| self.ram.read_obj(GuestAddress(at)).unwrap();
        (read(at), read(at + 4))
    }

    /// Offers a chain of `buffers` (address, length, flags) from descriptor 0 on, waits until the
    /// device returns it, and returns the number of bytes written.
    pub(crate) fn request(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) -> u32 {
        self.describe_chain(rings(queue)[0], 0, buffers);
        let before = self.used(queue);
        self.offer(queue, 0);
        self.wait_until("a used buffer", |d| d.used(queue) != before);
        let (head, written) = self.used_element(queue, before);
        assert_eq!(head, 0, "head of the returned chain");
        written
    }

    /// Waits until `done`, which depends on a device's thread.
    #[track_caller]
    pub(crate) fn wait_until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < deadline, "timed out waiting for {what}");
            std::thread::yield_now();
        }
    }

    /// Waits until the device sets DEVICE_NEEDS_RESET and interrupts the driver. Then resets it,
    /// and checks with `works` that it works again.
    #[track_caller]
    pub(crate) fn breaks_and_recovers(&mut self, works: impl FnOnce(&mut Self)) {
        self.wait_until("DEVICE_NEEDS_RESET", |d| d.status() & BROKEN != 0);
        self.wait_until("its interrupt", |d| {
            d.interrupts.configs.load(Ordering::Acquire) > 0
        });
        self.restart();
        works(self);
    }

    /// Resets the device, and sets everything up again.
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

/// Addresses of a queue's parts as [`Driver::ready`] places them.
pub(crate) fn rings(queue: usize) -> [u64; 3] {
    let base = RAM + 0x1000 * queue as u64;
    [base, base + 0x400, base + 0x800]
}

/// Start of the RAM for buffers.
pub(crate) const BUFFERS: u64 = RAM + (1 << 20);
/// The first address after RAM.
pub(crate) const RAM_END: u64 = RAM + (4 << 20);
