//! Queues that the host's kernel serves (vhost), driven without a guest. The kind of host makes no
//! difference.
#![cfg(target_arch = "riscv64")]

use std::sync::{Arc, mpsc};
use std::time::Duration;

use crate::common::net::Tap;
use rvmm::config::{Mac, MemConfig};
use rvmm::memory;
use rvmm::util::{ByteSize, Half};
use rvmm::virtio::net::Net;
use rvmm::virtio::net::tap::TapQueue;
use rvmm::virtio::notify::Interrupt;
use rvmm::virtio::transport::core::{Core, Ring};
use rvmm::virtio::transport::starter::Starter;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const RAM: u64 = 0x8000_0000;
/// Entries of each queue.
const SIZE: u16 = 16;
/// ACKNOWLEDGE, DRIVER, FEATURES_OK; DRIVER_OK; DEVICE_NEEDS_RESET.
const NEGOTIATED: u8 = 1 | 2 | 8;
const READY: u8 = NEGOTIATED | 4;
const BROKEN: u8 = 64;
/// Only a failing case waits so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// Sends a message when the configuration or DEVICE_NEEDS_RESET changes.
struct Told(mpsc::SyncSender<()>);

impl Interrupt for Told {
    fn queue(&self, _: u16) {}
    fn config(&self) {
        let _ = self.0.try_send(());
    }
    fn queue_fd(&self, _: u16) -> Option<EventFd> {
        None
    }
    fn reset(&self) {}
}

/// The parts of a queue, in RAM.
fn rings(queue: u16) -> [u64; 3] {
    let base = RAM + 0x1000 * u64::from(queue);
    [base, base + 0x400, base + 0x800]
}

/// A driver that accepts only VERSION_1, and sets up both queues.
fn make_ready(core: &Core) {
    core.set_status(3);
    let mut registers = core.registers();
    registers.driver_select = 1;
    registers.set_driver_features(1);
    drop(registers);
    core.set_status(NEGOTIATED);
    for queue in [0, 1] {
        let mut registers = core.registers();
        registers.queue_select = queue;
        registers.set_queue_size(SIZE);
        let parts = [Ring::Descriptors, Ring::Driver, Ring::Device];
        for (ring, address) in parts.into_iter().zip(rings(queue)) {
            for half in [Half::Low, Half::High] {
                registers.set_ring(ring, half, half.of(address));
            }
        }
        registers.enable_queue();
    }
    core.set_status(READY);
    core.wait_settled();
    assert_eq!(core.registers().status(), READY);
}

/// Whether this process has vhost-net open. If vhost refuses queues, rvmm serves them without it.
fn uses_vhost() -> bool {
    let fds = std::fs::read_dir("/proc/self/fd").expect("/proc/self/fd");
    let mut links = fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok());
    links.any(|link| link.ends_with("vhost-net"))
}

/// An available index that jumps breaks a queue, and the driver sees that its device needs a reset.
#[test]
fn hostile_a_queue_that_vhost_gives_up() {
    let tap = Tap::new(false);
    let ram = memory::create(
        GuestAddress(RAM),
        MemConfig::new(ByteSize::mib(4)),
        memory::Backing::Private,
    )
    .expect("RAM");
    let queues = TapQueue::open(&tap.name, 1).expect("the tap");
    let queues = queues.into_iter().map(Arc::new).collect();
    let mac = Mac([0x52, 0x54, 0, 1, 2, 3]);
    let net = Net::new("net0", &tap.name, queues, mac, None, true);
    let (sender, changes) = mpsc::sync_channel(1);
    let interrupt = Arc::new(Told(sender));
    let starter = Starter::new().expect("a thread");
    let core = Core::new(Box::new(net), Arc::clone(&ram), interrupt, &starter).expect("a device");
    let index = GuestAddress(rings(1)[1] + 2);
    for _ in 0..2 {
        make_ready(&core);
        assert!(uses_vhost());
        core.pause();
        assert!(
            !uses_vhost(),
            "the kernel must not have the queues during a pause"
        );
        core.resume();
        core.wait_settled();
        assert!(uses_vhost());
        ram.write_obj(SIZE + 1, index).expect("RAM");
        core.registers().kick(1);
        changes.recv_timeout(PATIENCE).expect("DEVICE_NEEDS_RESET");
        assert_eq!(core.registers().status(), READY | BROKEN);
        core.set_status(0);
        assert!(!uses_vhost());
        ram.write_obj(0u16, index).expect("RAM");
    }
}
