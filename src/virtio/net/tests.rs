//! Tests interfaces through their queues. A pair of sockets takes the place of the tap.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::util::Half;
use crate::virtio::testing::*;

mod pause;
mod saved;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const HEADER: usize = tap::HEADER;

fn tap() -> (Arc<TapQueue>, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let file = File::from(OwnedFd::from(ours));
    (Arc::new(TapQueue::of(file)), theirs)
}

fn net(pairs: usize) -> (Box<Net>, Vec<UnixDatagram>) {
    let (taps, peers) = (0..pairs).map(|_| tap()).unzip();
    (net_on(taps, None), peers)
}

fn net_on(taps: Vec<Arc<TapQueue>>, mtu: Option<u16>) -> Box<Net> {
    let mac = Mac([0x52, 0x54, 0, 1, 2, 3]);
    Box::new(Net::new("net0", "tap0", taps, mac, mtu, false))
}

/// Returns a driver that accepts those of `features` that are offered, and sets up all queues.
fn driver(device: Box<Net>, features: u64) -> Driver {
    let mut driver = Driver::of(device);
    driver.negotiate(features);
    let queues = driver.core.registers().queues().len();
    for queue in 0..queues {
        driver.set_up(queue, rings(queue));
    }
    driver.become_ready();
    driver
}

const NO_SEGMENTS: u64 = !((1 << VIRTIO_NET_F_GUEST_TSO4) | (1 << VIRTIO_NET_F_GUEST_TSO6));
const NOT_MERGEABLE: u64 = NO_SEGMENTS & !(1 << VIRTIO_NET_F_MRG_RXBUF);

/// Offers a receive buffer of `len` bytes.
fn offer(driver: &mut Driver, index: u16, len: u32) {
    let addr = BUFFERS + 0x1000 * u64::from(index);
    let (flags, next) = (WRITE, 0);
    driver.describe(
        RECEIVE,
        index,
        Desc {
            addr,
            len,
            flags,
            next,
        },
    );
    driver.offer(RECEIVE, index);
}

fn bytes(driver: &Driver, addr: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    driver
        .ram
        .read_slice(&mut bytes, GuestAddress(addr))
        .unwrap();
    bytes
}

fn packet(len: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend((0..len).map(|n| n.to_le_bytes()[0]));
    packet
}

#[test]
fn a_packet_goes_out_whole() {
    let (device, peers) = net(1);
    let mut driver = driver(device, u64::MAX);
    let sent = packet(200);
    driver
        .ram
        .write_slice(&sent, GuestAddress(BUFFERS))
        .unwrap();
    let buffers = [
        (BUFFERS, 12, 0),
        (BUFFERS + 12, 100, 0),
        (BUFFERS + 112, 100, 0),
    ];
    assert_eq!(driver.request(TRANSMIT, &buffers), 0);
    let mut received = [0; 300];
    let count = peers[0].recv(&mut received).unwrap();
    assert_eq!(received[..count], sent);
    // Packets that are too short for a header, or larger than any tap takes, are dropped. The next
    // one is sent.
    driver.request(TRANSMIT, &[(BUFFERS, 11, 0)]);
    driver.request(TRANSMIT, &[(BUFFERS, 70_000, 0)]);
    driver.request(TRANSMIT, &buffers);
    assert_eq!(peers[0].recv(&mut received).unwrap(), sent.len());
}

/// A driver older than VIRTIO 1.0 has a header of 10 bytes, unless it accepts mergeable buffers.
#[test]
fn without_version_1_the_header_is_shorter() {
    const OLD: u64 = !(1 << VIRTIO_F_VERSION_1);
    const SHORT: usize = tap::HEADER_SHORT;
    for (features, header) in [(OLD & NOT_MERGEABLE, SHORT), (OLD & NO_SEGMENTS, HEADER)] {
        let (device, peers) = net(1);
        let mut driver = driver(device, features);
        for index in 0..4 {
            offer(&mut driver, index, 1600);
        }
        let sent = vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 8, 9, 10];
        peers[0].send(&sent).unwrap();
        driver.wait_until("a packet", |d| d.used(RECEIVE) == 1);
        let counted = if header == SHORT { [7, 8] } else { [1, 0] };
        assert_eq!(
            bytes(&driver, BUFFERS + 10, 4),
            [&counted[..], &[9, 10]].concat()
        );
        driver.request(TRANSMIT, &[(BUFFERS, 10, 0)]);
        driver.request(TRANSMIT, &[(BUFFERS, 13, 0)]);
        let mut received = [0; 300];
        let count = peers[0].recv(&mut received).unwrap();
        assert_eq!(count, if header == SHORT { 10 } else { 13 });
    }
}

#[test]
fn a_packet_lies_in_as_many_buffers_as_it_takes() {
    let (device, peers) = net(1);
    let mut driver = driver(device, NO_SEGMENTS);
    for index in 0..8 {
        offer(&mut driver, index, 400);
    }
    let sent = packet(1000);
    peers[0].send(&sent).unwrap();
    driver.wait_until("a packet", |d| d.used(RECEIVE) == 3);
    let lengths: Vec<_> = (0..3).map(|n| driver.used_element(RECEIVE, n)).collect();
    assert_eq!(lengths, [(0, 400), (1, 400), (2, 212)]);
    assert_eq!(bytes(&driver, BUFFERS + 10, 2), [3, 0], "num_buffers");
    assert_eq!(bytes(&driver, BUFFERS + 12, 388), sent[12..400]);
    assert_eq!(bytes(&driver, BUFFERS + 0x2000, 212), sent[800..]);
    peers[0].send(&packet(10)).unwrap();
    driver.wait_until("the next", |d| d.used(RECEIVE) == 4);
    assert_eq!(driver.used_element(RECEIVE, 3), (3, 22));
}

#[test]
fn without_merging_a_packet_has_one_buffer() {
    let (device, peers) = net(1);
    let mut driver = driver(device, NOT_MERGEABLE);
    offer(&mut driver, 0, 1600);
    offer(&mut driver, 1, 1600);
    for len in [100, 1500] {
        peers[0].send(&packet(len)).unwrap();
    }
    driver.wait_until("both", |d| d.used(RECEIVE) == 2);
    assert_eq!(driver.used_element(RECEIVE, 0), (0, 112));
    assert_eq!(driver.used_element(RECEIVE, 1), (1, 1512));
    assert_eq!(bytes(&driver, BUFFERS + 10, 2), [1, 0]);
}

/// A packet that fills the buffer to its last byte is received. A larger one is dropped.
#[test]
fn a_packet_that_does_not_fit_is_dropped() {
    for features in [NO_SEGMENTS, NOT_MERGEABLE] {
        let (device, peers) = net(1);
        let mut driver = driver(device, features);
        for len in [101, 100, 1000, 90] {
            peers[0].send(&packet(len)).unwrap();
        }
        offer(&mut driver, 0, 112);
        driver.wait_until("the one that fits", |d| d.used(RECEIVE) == 1);
        assert_eq!(driver.used_element(RECEIVE, 0), (0, 112));
        offer(&mut driver, 1, 112);
        driver.wait_until("the next that fits", |d| d.used(RECEIVE) == 2);
        assert_eq!(driver.used_element(RECEIVE, 1), (1, 102));
    }
}

#[test]
fn packets_are_as_large_as_the_tap_lets_them_be() {
    let (tap, peer) = tap();
    let mut driver = driver(net_on(vec![tap], Some(9000)), NO_SEGMENTS);
    for index in 0..SIZE {
        offer(&mut driver, index, 1600);
    }
    peer.send(&packet(9014)).unwrap();
    driver.wait_until("a packet", |d| d.used(RECEIVE) > 0);
    let lengths: Vec<_> = (0..6).map(|n| driver.used_element(RECEIVE, n).1).collect();
    assert_eq!(lengths, [1600, 1600, 1600, 1600, 1600, 1026]);
}

#[test]
fn the_taps_mtu_is_the_guests() {
    for (mtu, offered) in [
        (None, false),
        (Some(1279), false),
        (Some(1280), true),
        (Some(9000), true),
    ] {
        let (tap, _peer) = tap();
        let driver = Driver::of(net_on(vec![tap], mtu));
        let features = u64::from(driver.core.registers().device_features());
        assert_eq!(features & (1 << VIRTIO_NET_F_MTU) != 0, offered, "{mtu:?}");
        let mut space = [0; 2];
        driver.core.read_config(10, &mut space);
        let mtu = mtu.filter(|_| offered).unwrap_or(0);
        assert_eq!(u16::from_le_bytes(space), mtu);
    }
}

/// Such packets may use offloads that this driver has not agreed to.
#[test]
fn packets_from_before_the_driver_are_not_its_own() {
    let (device, peers) = net(1);
    peers[0].send(&packet(50)).unwrap();
    let mut driver = driver(device, NO_SEGMENTS);
    for round in 0..2 {
        peers[0].send(&packet(60)).unwrap();
        offer(&mut driver, 0, 1600);
        driver.wait_until("a packet", |d| d.used(RECEIVE) == 1);
        assert_eq!(driver.used_element(RECEIVE, 0), (0, 72), "round {round}");
        driver.core.set_status(0);
        peers[0].send(&packet(50)).unwrap();
        driver.negotiate(NO_SEGMENTS);
        driver.set_up(RECEIVE, rings(RECEIVE));
        driver.become_ready();
    }
}

#[test]
fn hostile_receive_buffers() {
    // Buffers without room, and buffers so small that a packet never fits.
    for len in [0, 1] {
        let (device, peers) = net(1);
        let mut driver = driver(device, NO_SEGMENTS);
        for round in 0..200u16 {
            offer(&mut driver, round % SIZE, len);
            let _ = peers[0].send(&packet(60));
        }
        driver.core.set_status(0);
        assert_eq!(driver.status(), 0);
    }
}

/// A message shorter than a header is dropped. The next packet gets its buffer.
#[test]
fn a_message_without_a_header_is_no_packet() {
    let (device, peers) = net(1);
    let mut driver = driver(device, NO_SEGMENTS);
    for index in 0..4 {
        offer(&mut driver, index, 1600);
    }
    peers[0].send(&[1; HEADER - 1]).unwrap();
    peers[0].send(&packet(10)).unwrap();
    driver.wait_until("a packet", |d| d.used(RECEIVE) > 0);
    assert_eq!(driver.used_element(RECEIVE, 0), (0, 22));
}

/// When the tap's queue is full, packets are lost, as on a wire. Nothing waits.
#[test]
fn a_full_tap_holds_nobody_up() {
    let (device, peers) = net(1);
    let mut driver = driver(device, u64::MAX);
    // A pair of sockets holds far fewer packets than this.
    for _ in 0..2_000 {
        driver.request(TRANSMIT, &[(BUFFERS, 1000, 0)]);
    }
    peers[0].set_nonblocking(true).unwrap();
    let kept = (0..).take_while(|_| peers[0].recv(&mut [0; 2000]).is_ok());
    assert!((1..1_999).contains(&kept.count()));
}

/// A driver may enable only one queue of a pair.
#[test]
fn half_a_pair_works() {
    for only in [RECEIVE, TRANSMIT] {
        let (device, peers) = net(1);
        let mut driver = Driver::of(device);
        driver.negotiate(NO_SEGMENTS);
        for _ in 0..2 {
            driver.set_up(only, rings(only));
            driver.become_ready();
            if only == RECEIVE {
                offer(&mut driver, 0, 1600);
                peers[0].send(&packet(60)).unwrap();
                driver.wait_until("a packet", |d| d.used(RECEIVE) == 1);
            } else {
                driver.request(TRANSMIT, &[(BUFFERS, 100, 0)]);
                assert_eq!(peers[0].recv(&mut [0; 200]).unwrap(), 100);
            }
            driver.core.set_status(0);
            driver.negotiate(NO_SEGMENTS);
        }
    }
}

/// The device serves packets that were offered before DRIVER_OK without a notification.
#[test]
fn a_packet_that_was_there_before_goes_out() {
    let (device, peers) = net(1);
    let mut driver = Driver::of(device);
    driver.negotiate(u64::MAX);
    driver.set_up(TRANSMIT, rings(TRANSMIT));
    let (addr, len, flags, next) = (BUFFERS, 100, 0, 0);
    let buffer = Desc {
        addr,
        len,
        flags,
        next,
    };
    driver.describe(TRANSMIT, 0, buffer);
    driver.set_avail(TRANSMIT, 1);
    driver.become_ready();
    driver.wait_until("it", |d| d.used(TRANSMIT) == 1);
    assert_eq!(peers[0].recv(&mut [0; 200]).unwrap(), 100);
}

/// What most drivers are prepared for, without offloads.
const ROOM: Room = Room {
    header: HEADER,
    offloads: Offloads {
        checksum: false,
        tso4: false,
        tso6: false,
        ecn: false,
    },
    mergeable: true,
    packet: 1530,
};

/// A packet that was made for the previous driver's offloads may arrive late. It is dropped.
#[test]
fn packets_are_as_the_driver_agreed() {
    let (checksum, tso4, tso6, ecn) = (true, true, true, true);
    let none = Offloads::default();
    let some = Offloads {
        checksum,
        tso4,
        ..none
    };
    let all = Offloads { tso6, ecn, ..some };
    for (header, offloads, passes) in [
        ([0, 0], none, true),
        ([1, 0], none, false),
        ([1, 0], some, true),
        ([1, 1], none, false),
        ([1, 1], some, true),
        ([1, 4], some, false),
        ([1, 0x81], some, false),
        ([1, 0x84], all, true),
        ([1, 3], all, false),
        ([1, 5], all, false),
    ] {
        let (device, peers) = net(1);
        let shared = Arc::clone(&device.shared);
        let (mut driver, mut queue) = taken(u64::MAX);
        offer(&mut driver, 0, 2000);
        let mut bytes = packet(100);
        bytes[..2].copy_from_slice(&header);
        peers[0].send(&bytes).unwrap();
        let room = Room { offloads, ..ROOM };
        let tap = &shared.pairs[0];
        let mut receiver = receive::Receiver::new(&shared, tap, room, &mut queue);
        receiver.serve(true, true, &Stop::default()).unwrap();
        assert_eq!(driver.used(RECEIVE) == 1, passes, "{header:?} {offloads:?}");
    }
}

/// The driver may look at the used ring at any time. It must not find only a part of a packet.
#[test]
fn the_buffers_of_a_packet_are_shown_together() {
    let (device, peers) = net(1);
    let shared = Arc::clone(&device.shared);
    let (mut driver, mut queue) = taken(u64::MAX);
    for index in 0..SIZE {
        offer(&mut driver, index, 200);
    }
    let tap = &shared.pairs[0];
    let mut receiver = receive::Receiver::new(&shared, tap, ROOM, &mut queue);
    for len in [1000, 100] {
        peers[0].send(&packet(len)).unwrap();
        receiver.serve(true, true, &Stop::default()).unwrap();
    }
    assert_eq!(queue.shown(), [6, 7], "one index update per packet");
}

/// All buffers together are too small, and the driver offers more of them than its queue has
/// entries.
#[test]
fn hostile_more_buffers_than_entries() {
    let (device, peers) = net(1);
    let shared = Arc::clone(&device.shared);
    let (mut driver, mut queue) = taken(u64::MAX);
    for index in 0..SIZE {
        offer(&mut driver, index, 4);
    }
    let tap = &shared.pairs[0];
    let mut receiver = receive::Receiver::new(&shared, tap, ROOM, &mut queue);
    receiver.serve(true, true, &Stop::default()).unwrap();
    assert!(receiver.wants_tap() && receiver.patience().is_none());
    for index in 0..SIZE {
        offer(&mut driver, index, 4);
    }
    peers[0].send(&packet(53)).unwrap();
    peers[0].send(&packet(10)).unwrap();
    receiver.serve(true, true, &Stop::default()).unwrap();
    assert_eq!(driver.used(RECEIVE), 6, "22 bytes fit, 65 do not");
}

/// However much the driver has offered, a reset waits for one packet at most.
#[test]
fn hostile_a_full_queue_does_not_delay_the_stop() {
    let (device, peers) = net(1);
    let shared = Arc::clone(&device.shared);
    peers[0].set_nonblocking(true).unwrap();
    let (stop, tap) = (Stop::default(), &shared.pairs[0]);
    stop.ask(StopFor::Reset);
    let (mut driver, mut queue) = taken(u64::MAX);
    for index in 0..SIZE {
        offer(&mut driver, index, 2000);
    }
    peers[0].send(&packet(100)).unwrap();
    let mut receiver = receive::Receiver::new(&shared, tap, ROOM, &mut queue);
    receiver.serve(true, true, &stop).unwrap();
    assert_eq!(driver.used(0), 0, "received a packet");
    let (mut driver, mut queue) = taken(u64::MAX);
    for index in 0..SIZE {
        let (addr, len, flags, next) = (BUFFERS, 100, 0, 0);
        let buffer = Desc {
            addr,
            len,
            flags,
            next,
        };
        driver.describe(0, index, buffer);
        driver.offer(0, index);
    }
    shared.transmit(tap, HEADER, &mut queue, &stop).unwrap();
    assert_eq!(driver.used(0), 0, "sent a packet");
    assert!(peers[0].recv(&mut [0; 200]).is_err());
}

/// epoll refuses this file, as it may refuse a tap when the host is out of resources.
#[test]
fn a_tap_that_cannot_be_polled_needs_a_reset() {
    let unpollable = TapQueue::of(File::open("/dev/zero").unwrap());
    let driver = driver(net_on(vec![Arc::new(unpollable)], None), NO_SEGMENTS);
    driver.wait_until("DEVICE_NEEDS_RESET", |d| d.status() & BROKEN != 0);
}

/// vhost signals an error of the second of two queues.
#[test]
fn a_queue_that_vhost_gives_up_is_told_once() {
    let (device, _peers) = net(1);
    let (status, counter) = (Arc::default(), Arc::new(Counter::default()));
    let fault = Fault::new("net0", &status, Arc::clone(&counter) as _);
    status.status.store(READY, Ordering::Release);
    let errors = [4, 5].map(|queue| (queue, EventFd::new(0).unwrap()));
    let second = errors[1].1.try_clone().unwrap();
    let watch = watch::watch(&device.shared, fault, errors.into()).unwrap();
    second.write(1).unwrap();
    let raised = || counter.configs.load(Ordering::Acquire);
    while raised() == 0 {
        std::thread::yield_now();
    }
    assert_eq!(status.status.load(Ordering::Acquire), READY | BROKEN);
    second.write(1).unwrap();
    drop(watch);
    assert_eq!(raised(), 1);
}

/// Sends a command to the control queue, and returns the answer.
fn command(driver: &mut Driver, queue: usize, bytes: &[u8]) -> u8 {
    driver
        .ram
        .write_slice(bytes, GuestAddress(BUFFERS))
        .unwrap();
    let len = u32::try_from(bytes.len()).unwrap();
    assert_eq!(
        driver.request(queue, &[(BUFFERS, len, 0), (BUFFERS + 64, 1, WRITE)]),
        1
    );
    driver.ram.read_obj(GuestAddress(BUFFERS + 64)).unwrap()
}

#[test]
fn pairs_are_chosen_by_command() {
    let (device, _peers) = net(2);
    let mut two = driver(device, u64::MAX);
    assert_eq!(command(&mut two, 4, &[4, 0, 2, 0]), 0);
    for wrong in [
        &[4, 0, 0, 0][..],
        &[4, 0, 3, 0],
        &[4, 0, 255, 255],
        &[4, 1, 1, 0],
        &[1, 0, 1, 0],
        &[4, 0, 1],
    ] {
        assert_eq!(command(&mut two, 4, wrong), 1, "{wrong:?}");
    }
    // The answer is one byte, or none if there is no room for it.
    assert_eq!(two.request(4, &[(BUFFERS, 4, 0), (BUFFERS, 9, WRITE)]), 1);
    assert_eq!(two.request(4, &[(BUFFERS, 4, 0)]), 0);
    // Without VIRTIO_NET_F_MQ, the control queue follows the first pair.
    let (device, _peers) = net(2);
    let mut one = driver(device, !(1 << VIRTIO_NET_F_MQ));
    assert_eq!(command(&mut one, 2, &[1, 0, 1]), 1);
}

#[test]
fn the_configuration_tells_address_link_and_pairs() {
    let (device, _peers) = net(3);
    let shared = Arc::clone(&device.shared);
    let driver = driver(device, u64::MAX);
    let mut space = [0; 12];
    driver.core.read_config(0, &mut space);
    assert_eq!(space, [0x52, 0x54, 0, 1, 2, 3, 1, 0, 3, 0, 0, 0]);
    shared.lose_link(&io::Error::from_raw_os_error(libc::EBADFD));
    shared.lose_link(&io::Error::from_raw_os_error(libc::EBADFD));
    assert_eq!(
        driver.interrupts.configs.load(Ordering::Acquire),
        1,
        "one interrupt"
    );
    driver.core.read_config(0, &mut space);
    assert_eq!(space[6], 0);
    assert_ne!(Half::Low.of(driver.core.config_generation().into()), 0);
}
