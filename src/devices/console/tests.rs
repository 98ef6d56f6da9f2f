use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use serde_json::json;

use super::*;
use crate::snapshot::testing::{self, Part};
use crate::snapshot::{LoadError, Parts, SaveError, Saved};

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

/// The lines after a silence end the wait for more output, and then no more.
#[test]
fn the_first_lines_are_written_at_once() {
    let console = Console::default();
    let pacing = || lock(&console.queues).writer == Writer::Pacing;
    let pace = || lock(&console.queues).writer = Writer::Pacing;
    for _ in 0..PROMPT_LINES {
        pace();
        console.write(b"x");
        assert!(pacing(), "a line is not complete");
        console.write(b"\r\n");
        assert!(!pacing());
    }
    pace();
    console.write(b"x\n");
    assert!(pacing());
    // Nothing comes in the time between two writes.
    let mut taken = Vec::new();
    console.take_output(&mut taken);
    let console = Arc::new(console);
    let taker = Arc::clone(&console);
    let take = thread::spawn(move || taker.take_output(&mut Vec::new()));
    while lock(&console.queues).writer != Writer::Idle {
        thread::yield_now();
    }
    lock(&console.queues).writer = Writer::Pacing;
    console.write(b"x\n");
    assert_ne!(lock(&console.queues).writer, Writer::Pacing);
    assert!(take.join().unwrap());
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

impl Part for Console {
    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        Ok(vec![Saved::of(&Console::save(self))?])
    }
    fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        Console::load(self, parts.take()?)
    }
}

/// A console with this JSON as its state.
fn loaded(json: &str) -> Result<Console, LoadError> {
    let console = Console::default();
    console.load(serde_json::from_str(json).unwrap())?;
    Ok(console)
}

#[test]
fn what_waits_survives() {
    let with_bytes = || {
        let console = Console::default();
        console.write(b"written");
        console
    };
    let saved = with_bytes().save();
    let json = serde_json::to_string(&saved).unwrap();
    assert_eq!(json, r#"{"input":"","output":"7772697474656e"}"#);
    assert_eq!(loaded(&json).unwrap().save(), saved);
    testing::survives(|| Box::new(with_bytes()), &[]);
}

#[test]
fn what_the_writer_has_taken_stays_here() {
    let console = Console::default();
    console.write(b"first");
    let mut taken = Vec::new();
    assert!(console.take_output(&mut taken));
    console.write(b"second");
    console.type_input(b"typed");
    let json = r#"{"input":"7479706564","output":"7365636f6e64"}"#;
    assert_eq!(serde_json::to_string(&console.save()).unwrap(), json);
    let other = loaded(json).unwrap();
    assert_eq!(other.output_room(), OUTPUT_CAPACITY - b"second".len());
    other.close();
    assert!(other.take_output(&mut taken));
    assert_eq!(taken, b"second");
}

#[test]
fn input_comes_behind_that_of_the_other_process() {
    let console = Console::default();
    console.type_input(b"new");
    let state = |input: String| serde_json::from_value(json!({"input": input, "output": ""}));
    console.load(state("6f6c64".into()).unwrap()).unwrap();
    let mut bytes = [0; 9];
    assert_eq!(console.read(&mut bytes), 6);
    assert_eq!(&bytes, b"oldnew\0\0\0");
    // Where there is no room, the newest bytes are lost.
    console.type_input(b"new");
    let most = "78".repeat(INPUT_CAPACITY - 1);
    console.load(state(most).unwrap()).unwrap();
    let mut all = vec![0; INPUT_CAPACITY + 1];
    assert_eq!(console.read(&mut all), INPUT_CAPACITY);
    assert_eq!(all[INPUT_CAPACITY - 2..], *b"xn\0");
}

#[test]
fn more_than_a_queue_holds_is_refused() {
    for (name, limit) in [("input", INPUT_CAPACITY), ("output", OUTPUT_CAPACITY)] {
        let mut state = json!({"input": "", "output": ""});
        state[name] = "00".repeat(limit).into();
        loaded(&state.to_string()).unwrap();
        state[name] = "00".repeat(limit + 1).into();
        let error = loaded(&state.to_string()).err().unwrap().to_string();
        let wanted = format!("{} bytes of {name} wait in the console", limit + 1);
        assert!(error.starts_with(&wanted), "{error}");
    }
}

#[test]
fn a_waiting_writer_gets_what_was_loaded() {
    let console = Arc::new(Console::default());
    let (taker, (sender, taken)) = (Arc::clone(&console), mpsc::channel());
    thread::spawn(move || {
        let mut bytes = Vec::new();
        taker.take_output(&mut bytes);
        sender.send(bytes).unwrap();
    });
    while lock(&console.queues).writer != Writer::Idle {
        thread::yield_now();
    }
    console
        .load(serde_json::from_str(r#"{"input":"","output":"78"}"#).unwrap())
        .unwrap();
    let taken = taken.recv_timeout(Duration::from_secs(60));
    assert_eq!(taken.unwrap(), b"x");
}
