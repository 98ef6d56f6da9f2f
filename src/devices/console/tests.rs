use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use super::*;

#[derive(Default)]
struct Calls(AtomicUsize);

impl Listener for Calls {
    fn console_changed(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn listened() -> (Arc<Console>, Arc<Calls>) {
    let (console, calls) = (Arc::new(Console::default()), Arc::new(Calls::default()));
    let as_listener: Arc<dyn Listener> = calls.clone();
    console.set_listener(Arc::downgrade(&as_listener));
    (console, calls)
}

#[test]
fn output_is_bounded_and_the_guest_never_waits() {
    let console = Console::default();
    let flood = vec![b'x'; 3 * OUTPUT_CAPACITY];
    assert_eq!(console.write(&flood), OUTPUT_CAPACITY);
    assert_eq!(console.write(b"y"), 0);
    assert_eq!(console.output_room(), 0);
    let mut taken = Vec::new();
    assert!(console.take_output(&mut taken));
    assert_eq!(taken.len(), OUTPUT_CAPACITY);
    // The bytes are taken but not written: there is room only once the writer returns.
    assert_eq!(console.write(b"y"), 0);
}

#[test]
fn room_is_told_when_a_full_queue_was_written() {
    let (console, calls) = listened();
    let mut taken = Vec::new();
    console.write(&vec![b'x'; OUTPUT_CAPACITY]);
    assert!(console.take_output(&mut taken));
    console.close();
    assert_eq!(calls.0.load(Ordering::SeqCst), 0);
    assert!(!console.take_output(&mut taken));
    assert_eq!(calls.0.load(Ordering::SeqCst), 1);
}

#[test]
fn room_for_input_is_told_once_half_is_free() {
    let console = Console::default();
    let calls = Arc::new(Calls::default());
    let woken = Arc::clone(&calls);
    console.set_on_input_room(Box::new(move || woken.console_changed()));
    let count = || calls.0.load(Ordering::SeqCst);
    let mut half = vec![0; INPUT_CAPACITY / 2];
    console.type_input(&vec![b'x'; INPUT_CAPACITY]);
    assert_eq!(console.read(&mut half), INPUT_CAPACITY / 2);
    assert_eq!(count(), 0, "nobody had asked");
    console.type_input(&half);
    assert_eq!(console.input_room(), 0);
    assert_eq!(console.read(&mut [0]), 1);
    assert_eq!(count(), 0);
    console.read(&mut half);
    console.read(&mut half);
    assert_eq!(count(), 1);
    assert_eq!(console.input_room(), INPUT_CAPACITY);
}

#[test]
fn typing_never_waits() {
    let (console, calls) = listened();
    assert!(console.type_input(&[7; INPUT_CAPACITY + 1]));
    assert!(console.type_input(b"more"));
    assert_eq!(console.input_len(), INPUT_CAPACITY);
    assert_eq!(calls.0.load(Ordering::SeqCst), 2);
    console.close();
    assert!(!console.type_input(b"x"));
}

#[test]
fn closing_frees_both_sides() {
    let console = Arc::new(Console::default());
    let taker = Arc::clone(&console);
    let take = thread::spawn(move || taker.take_output(&mut Vec::new()));
    console.close();
    assert!(!console.type_input(b"more"));
    assert!(!take.join().unwrap());
}

#[test]
fn what_was_queued_before_closing_is_taken() {
    let console = Console::default();
    console.write(b"last words");
    console.close();
    let mut taken = Vec::new();
    assert!(console.take_output(&mut taken));
    assert_eq!(taken, b"last words");
    assert!(!console.take_output(&mut taken));
}

#[test]
fn draining_waits_for_a_reader_but_not_for_ever() {
    let console = Arc::new(Console::default());
    assert!(console.drain(|_| false));
    console.write(b"x");
    let mut asked = 0;
    assert!(!console.drain(|idle| {
        asked += 1;
        idle < Duration::from_millis(1)
    }));
    assert!(asked > 0);

    let (taker, (go, wait)) = (console.clone(), mpsc::channel::<()>());
    let thread = thread::spawn(move || {
        let mut taken = Vec::new();
        while taker.take_output(&mut taken) {
            wait.recv().unwrap();
        }
    });
    go.send(()).unwrap();
    assert!(console.drain(|_| true));
    console.close();
    thread.join().unwrap();
}
