//! Tests pauses of an interface: no packet is lost or duplicated, and no buffer is kept.

use super::*;

/// The available ring's index of the next buffer. Known only while the device is paused.
fn next_available(driver: &Driver, queue: usize) -> u16 {
    let described = driver.core.describe();
    let next = &described["queues"][queue]["next_available"];
    u16::try_from(next.as_u64().expect("the device is paused")).unwrap()
}

/// The guest has offered too few buffers for a packet of any size, so the receiver holds them and
/// waits for more.
#[test]
fn buffers_that_wait_for_a_packet_go_back() {
    let (device, peers) = net(1);
    let mut driver = driver(device, NO_SEGMENTS);
    offer(&mut driver, 0, 400);
    offer(&mut driver, 1, 400);
    for _ in 0..20 {
        driver.core.pause();
        assert_eq!(next_available(&driver, RECEIVE), 0);
        driver.core.resume();
    }
    driver.core.pause();
    let sent = packet(1000);
    peers[0].send(&sent).unwrap();
    offer(&mut driver, 2, 400);
    offer(&mut driver, 3, 400);
    assert_eq!(driver.used(RECEIVE), 0);
    driver.core.resume();
    driver.wait_until("the packet", |d| d.used(RECEIVE) == 3);
    let lengths: Vec<_> = (0..3).map(|n| driver.used_element(RECEIVE, n)).collect();
    assert_eq!(lengths, [(0, 400), (1, 400), (2, 212)]);
    assert_eq!(bytes(&driver, BUFFERS + 0x2000, 212), sent[800..]);
}

/// The same, but the test runs the receiver itself.
#[test]
fn a_receiver_gives_back_what_it_took_in_order() {
    let (device, peers) = net(1);
    let shared = Arc::clone(&device.shared);
    let (mut driver, mut queue) = taken(u64::MAX);
    for index in 0..4 {
        offer(&mut driver, index, 700);
    }
    let tap = &shared.pairs[0];
    let stop = Stop::default();
    peers[0].send(&packet(100)).unwrap();
    let mut receiver = receive::Receiver::new(&shared, tap, ROOM, &mut queue);
    receiver.serve(true, true, &stop).unwrap();
    receiver.give_back();
    assert_eq!(driver.used(RECEIVE), 1);
    for head in 1..4 {
        assert_eq!(queue.pop().unwrap().unwrap().head, head);
    }
    assert!(queue.pop().unwrap().is_none());
}

/// The start of a driver drops earlier packets. The end of a pause does not.
#[test]
fn packets_that_come_meanwhile_are_the_drivers() {
    let (device, peers) = net(1);
    let mut driver = driver(device, NO_SEGMENTS);
    for index in 0..SIZE {
        offer(&mut driver, index, 1600);
    }
    driver.core.pause();
    for len in [60, 61, 62] {
        peers[0].send(&packet(len)).unwrap();
    }
    assert_eq!(driver.used(RECEIVE), 0);
    driver.core.resume();
    driver.wait_until("all packets", |d| d.used(RECEIVE) == 3);
    let lengths = [0, 1, 2].map(|n| driver.used_element(RECEIVE, n).1);
    assert_eq!(lengths, [72, 73, 74]);
}

/// Sends numbered packets in both directions, while the machine pauses at any moment, and may be
/// restored.
#[test]
fn a_thousand_pauses_under_load() {
    for is_restored in [false, true] {
        pauses_under_load(is_restored);
    }
}

fn pauses_under_load(is_restored: bool) {
    let (tap, peer) = tap();
    let device = || net_on(vec![Arc::clone(&tap)], None);
    let mut driver = driver(device(), NO_SEGMENTS);
    let number_at = |driver: &Driver, addr: u64| {
        let number: u16 = driver.ram.read_obj(GuestAddress(addr)).unwrap();
        number
    };
    let buffer = |number: u16| BUFFERS + 0x1000 * u64::from(number % SIZE);
    for number in 0..SIZE - 2 {
        offer(&mut driver, number, 1600);
    }
    for round in 0..1000u16 {
        let out = BUFFERS + 0x10_0000;
        let sent = packet(100);
        driver.ram.write_slice(&sent, GuestAddress(out)).unwrap();
        let payload = GuestAddress(out + HEADER as u64);
        driver.ram.write_obj(round, payload).unwrap();
        driver.describe_chain(rings(TRANSMIT)[0], 0, &[(out, 112, 0)]);
        driver.offer(TRANSMIT, 0);
        let send = || {
            for part in 0..2 {
                let mut bytes = packet(60);
                let number = (2 * round + part).to_le_bytes();
                bytes[HEADER..HEADER + 2].copy_from_slice(&number);
                peer.send(&bytes).unwrap();
            }
        };
        if !is_restored {
            send();
        }
        driver.core.pause();
        let used = [RECEIVE, TRANSMIT].map(|queue| driver.used(queue));
        assert_eq!([0, 1].map(|queue| next_available(&driver, queue)), used);
        if is_restored {
            driver.replace(device());
        }
        driver.core.resume();
        if is_restored {
            // What the new tap has before that is not for the guest.
            driver.core.wait_settled();
            send();
        }
        driver.wait_until("both", |d| d.used(RECEIVE) == 2 * round + 2);
        for number in 2 * round..2 * round + 2 {
            let head = u32::from(number % SIZE);
            assert_eq!(driver.used_element(RECEIVE, number), (head, 72));
            let payload = buffer(number) + HEADER as u64;
            assert_eq!(number_at(&driver, payload), number);
            offer(&mut driver, (number + SIZE - 2) % SIZE, 1600);
        }
        driver.wait_until("the one sent", |d| d.used(TRANSMIT) == round + 1);
        let mut received = [0; 200];
        assert_eq!(peer.recv(&mut received).unwrap(), 112);
        assert_eq!(received[HEADER..HEADER + 2], round.to_le_bytes());
    }
    peer.set_nonblocking(true).unwrap();
    assert!(peer.recv(&mut [0; 200]).is_err(), "duplicate packet");
}

/// A queue that the driver broke stays broken, whatever the driver offers during the pause.
#[test]
fn a_broken_receive_queue_does_not_come_back() {
    let (device, peers) = net(1);
    let mut driver = driver(device, NO_SEGMENTS);
    offer(&mut driver, 0, 0);
    driver.wait_until("DEVICE_NEEDS_RESET", |d| d.status() & BROKEN != 0);
    driver.core.pause();
    offer(&mut driver, 1, 1600);
    driver.core.resume();
    peers[0].send(&packet(60)).unwrap();
    driver.core.pause();
    assert_eq!(driver.used(RECEIVE), 0);
    let configs = driver.interrupts.configs.load(Ordering::Acquire);
    assert_eq!(configs, 1);
}
