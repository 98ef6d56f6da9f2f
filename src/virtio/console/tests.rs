//! Tests the console through its queues.

use super::*;
use crate::virtio::testing::*;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, GuestAddress};

fn device(console: &Arc<Console>, window: &Arc<Mutex<[u16; 2]>>) -> Box<ConsolePort> {
    let seen = Arc::clone(window);
    let size: Size = Arc::new(move || Some(*lock(&seen)));
    Box::new(ConsolePort::new(Arc::clone(console), size))
}

fn port() -> (Driver, Arc<Console>, Arc<Mutex<[u16; 2]>>) {
    let console = Arc::new(Console::default());
    let window = Arc::new(Mutex::new([80, 24]));
    (Driver::ready(device(&console, &window)), console, window)
}

#[test]
fn bytes_go_both_ways() {
    let (mut driver, console, _) = port();
    driver
        .ram
        .write_slice(b"hello", GuestAddress(BUFFERS))
        .unwrap();
    assert_eq!(
        driver.request(1, &[(BUFFERS, 2, 0), (BUFFERS + 2, 3, 0)]),
        0
    );
    let mut output = Vec::new();
    console.take_output(&mut output);
    assert_eq!(output, b"hello");
    console.type_input(b"typed");
    assert_eq!(driver.request(0, &[(BUFFERS, 64, WRITE)]), 5);
    let mut typed = [0; 5];
    driver
        .ram
        .read_slice(&mut typed, GuestAddress(BUFFERS))
        .unwrap();
    assert_eq!(&typed, b"typed");
}

#[test]
fn a_slow_reader_holds_the_guest_back() {
    let (mut driver, console, _) = port();
    let len = u32::try_from(OUTPUT_CAPACITY).unwrap() + 100;
    let (addr, flags, next) = (BUFFERS, 0, 0);
    driver.describe(
        1,
        0,
        Desc {
            addr,
            len,
            flags,
            next,
        },
    );
    driver.offer(1, 0);
    driver.wait_until("a full console", |_| console.output_room() == 0);
    assert_eq!(driver.used(1), 0);
    let (mut output, mut all) = (Vec::new(), 0);
    while all < OUTPUT_CAPACITY + 100 {
        console.take_output(&mut output);
        all += output.len();
    }
    driver.wait_until("the rest", |d| d.used(1) == 1);
}

/// The machine pauses while the console has a part of a chain, and may be saved and restored then.
/// The rest follows once, after the pause.
#[test]
fn a_chain_half_sent_goes_on_after_a_pause() {
    for is_restored in [false, true] {
        pauses_in_a_chain(is_restored);
    }
}

fn pauses_in_a_chain(is_restored: bool) {
    let (mut driver, console, window) = port();
    let pause = |driver: &mut Driver| {
        driver.core.pause();
        if is_restored {
            driver.replace(device(&console, &window));
        }
    };
    let count = OUTPUT_CAPACITY + 100;
    let sent: Vec<u8> = (0..count).map(|at| (at % 251).to_le_bytes()[0]).collect();
    driver
        .ram
        .write_slice(&sent, GuestAddress(BUFFERS))
        .unwrap();
    let len = u32::try_from(count).unwrap();
    driver.describe_chain(rings(1)[0], 0, &[(BUFFERS, len, 0)]);
    driver.offer(1, 0);
    driver.wait_until("a full console", |_| console.output_room() == 0);
    let (mut output, mut all) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        pause(&mut driver);
        console.type_input(b"typed");
        assert_eq!((driver.used(0), driver.used(1)), (0, 0));
        driver.core.resume();
    }
    pause(&mut driver);
    console.take_output(&mut output);
    all.extend_from_slice(&output);
    *lock(&window) = [100, 40];
    console.resized();
    let interrupts = Arc::clone(&driver.interrupts);
    let configs = || interrupts.configs.load(Ordering::Acquire);
    assert_eq!((console.output_room(), configs()), (0, 0));
    driver.core.resume();
    driver.wait_until("the window's size", |_| configs() == 1);
    while all.len() < count {
        console.take_output(&mut output);
        all.extend_from_slice(&output);
    }
    assert!(all == sent);
    driver.wait_until("its end", |d| d.used(1) == 1);
    let typed = driver.request(0, &[(BUFFERS, 64, WRITE)]);
    assert_eq!(typed, 15, "the input from during the pauses");
    pause(&mut driver);
    driver.core.resume();
    pause(&mut driver);
    assert_eq!(configs(), 1, "one interrupt per change");
}

/// The console of the next process has no window. The driver, which relies on a size, keeps the one
/// that it knows.
#[test]
fn a_size_that_is_unknown_now_stays() {
    let (mut driver, console, window) = port();
    *lock(&window) = [132, 50];
    console.resized();
    let interrupts = Arc::clone(&driver.interrupts);
    let configs = || interrupts.configs.load(Ordering::Acquire);
    driver.wait_until("an interrupt", |_| configs() == 1);
    driver.core.pause();
    let nowhere = ConsolePort::new(Arc::clone(&console), Arc::new(|| None));
    driver.replace(Box::new(nowhere));
    driver.core.resume();
    console.type_input(b"typed");
    assert_eq!(driver.request(0, &[(BUFFERS, 64, WRITE)]), 5);
    let mut space = [0; 4];
    driver.core.read_config(0, &mut space);
    assert_eq!(space, [132, 0, 50, 0]);
    driver.core.pause();
    assert_eq!(configs(), 1, "nothing has changed");
}

/// The saved number of bytes may be any.
#[test]
fn hostile_more_was_sent_than_there_is() {
    let (mut driver, console, window) = port();
    for skip in [5, 6, usize::MAX] {
        driver.core.pause();
        let known_size = Some([80, 24]);
        let mut saved = driver.core.save().unwrap();
        saved[1] = Saved::of(&SavedConsole { known_size, skip }).unwrap();
        driver.core = driver.another(device(&console, &window));
        driver.core.load(&mut Parts::new(saved)).unwrap();
        driver.core.resume();
        assert_eq!(driver.request(1, &[(BUFFERS, 5, 0)]), 0);
        assert_eq!(console.output_room(), OUTPUT_CAPACITY, "{skip}");
    }
}

#[test]
fn a_window_that_changes_is_told() {
    let (driver, console, window) = port();
    let mut space = [0; 4];
    driver.core.read_config(0, &mut space);
    assert_eq!(space, [80, 0, 24, 0]);
    *lock(&window) = [132, 50];
    console.resized();
    driver.wait_until("an interrupt", |d| {
        d.interrupts.configs.load(Ordering::Acquire) == 1
    });
    driver.core.read_config(0, &mut space);
    assert_eq!(space, [132, 0, 50, 0]);
}
