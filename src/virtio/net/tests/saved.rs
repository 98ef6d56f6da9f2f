//! Tests that an interface goes on with another tap.

use super::*;
use crate::snapshot::Parts;

/// Packets that the new tap has from before are not for the guest. Later ones are.
#[test]
fn a_new_tap_is_prepared() {
    let (device, _peers) = net(1);
    let mut driver = driver(device, NO_SEGMENTS);
    offer(&mut driver, 0, 1600);
    driver.core.pause();
    let (device, peers) = net(1);
    peers[0].send(&packet(50)).unwrap();
    driver.replace(device);
    driver.core.resume();
    driver.core.wait_settled();
    peers[0].send(&packet(60)).unwrap();
    driver.wait_until("a packet", |d| d.used(RECEIVE) == 1);
    assert_eq!(driver.used_element(RECEIVE, 0), (0, 72));
    // The next pause is an ordinary one.
    driver.core.pause();
    peers[0].send(&packet(70)).unwrap();
    offer(&mut driver, 1, 1600);
    driver.core.resume();
    driver.wait_until("the next", |d| d.used(RECEIVE) == 2);
    assert_eq!(driver.used_element(RECEIVE, 1), (1, 82));
}

#[test]
fn as_many_pairs_are_in_use() {
    let (device, _peers) = net(3);
    let mut driver = driver(device, u64::MAX);
    assert_eq!(command(&mut driver, 6, &[4, 0, 2, 0]), 0);
    driver.core.pause();
    let (device, _peers) = net(3);
    let shared = Arc::clone(&device.shared);
    driver.replace(device);
    driver.core.resume();
    driver.core.wait_settled();
    assert_eq!(shared.pairs_in_use.load(Ordering::Acquire), 2);
    assert_eq!(command(&mut driver, 6, &[4, 0, 3, 0]), 0);
    assert_eq!(shared.pairs_in_use.load(Ordering::Acquire), 3);
    driver.restart();
    assert_eq!(shared.pairs_in_use.load(Ordering::Acquire), 1);
}

/// The guest keeps the MTU that it has seen, whatever that of the new tap is.
#[test]
fn the_mtu_is_the_guests() {
    for (before, now) in [(9000, Some(1500)), (1500, None), (1300, Some(9000))] {
        let mut driver = driver(net_on(vec![tap().0], Some(before)), NO_SEGMENTS);
        driver.core.pause();
        driver.replace(net_on(vec![tap().0], now));
        let mut space = [0; 2];
        driver.core.read_config(10, &mut space);
        assert_eq!(u16::from_le_bytes(space), before);
        driver.core.registers().device_select = 0;
        let offered = u64::from(driver.core.registers().device_features());
        assert_ne!(offered & (1 << VIRTIO_NET_F_MTU), 0);
    }
}

/// The tap was deleted before the snapshot. The new one exists.
#[test]
fn a_link_that_was_lost_is_back() {
    let (device, _peers) = net(1);
    let shared = Arc::clone(&device.shared);
    let mut driver = driver(device, NO_SEGMENTS);
    shared.lose_link(&io::Error::from_raw_os_error(libc::EBADFD));
    let configs = |driver: &Driver| driver.interrupts.configs.load(Ordering::Acquire);
    assert_eq!(configs(&driver), 1);
    driver.core.pause();
    let (device, peers) = net(1);
    driver.replace(device);
    let link = |driver: &Driver| {
        let mut space = [0; 2];
        driver.core.read_config(6, &mut space);
        u16::from_le_bytes(space)
    };
    assert_eq!((link(&driver), configs(&driver)), (0, 1));
    driver.core.resume();
    driver.core.wait_settled();
    assert_eq!((link(&driver), configs(&driver)), (1, 2));
    driver.request(TRANSMIT, &[(BUFFERS, 100, 0)]);
    assert_eq!(peers[0].recv(&mut [0; 200]).unwrap(), 100);
}

#[test]
fn hostile_another_interface_is_refused() {
    let (device, _peers) = net(3);
    let driver = driver(device, u64::MAX);
    driver.core.pause();
    let saved = driver.core.save().unwrap();
    let (other, _peers) = net(2);
    let refused = driver.another(other).load(&mut Parts::new(saved.clone()));
    assert_eq!(
        refused.unwrap_err().to_string(),
        "it has 3 pairs of queues in the snapshot, and 2 with tap \"tap0\" now"
    );
    for pairs in ["0", "4", "65535", "65536"] {
        let mut saved = saved.clone();
        let json = String::from_utf8(saved[1].json.clone()).unwrap();
        let json = json.replace("_in_use\":1", &format!("_in_use\":{pairs}"));
        saved[1].json = json.into();
        let (other, _peers) = net(3);
        let refused = driver.another(other).load(&mut Parts::new(saved));
        assert!(refused.is_err(), "{pairs}");
    }
}

/// The snapshot's driver uses the MTU's feature, but the state has no MTU.
#[test]
fn hostile_features_that_are_not_there() {
    let mut driver = Driver::of(net_on(vec![tap().0], Some(1500)));
    driver.negotiate(u64::MAX);
    let mut saved = driver.core.save().unwrap();
    let json = String::from_utf8(saved[1].json.clone()).unwrap();
    saved[1].json = json.replace("1500", "0").into();
    let (other, _peers) = net(1);
    let refused = driver.another(other).load(&mut Parts::new(saved));
    let line = refused.unwrap_err().to_string();
    assert!(line.ends_with("does not offer here: 3"), "{line}");
}
