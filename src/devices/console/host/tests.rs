//! Tests of the consoles that need no terminal.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use event_manager::{EventManager, SubscriberOps};
use rustix::io::Errno;

use super::input::Wait;
use super::*;
use crate::devices::console::INPUT_CAPACITY;
use crate::util::sync::lock;

fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("rvmm-console-{}-{name}", std::process::id()))
}

/// The keys of a terminal that nobody types on.
fn no_keys() -> Keys {
    Keys {
        on_leave: None,
        on_report: Box::new(|| ()),
    }
}

/// An output end that a test controls.
#[derive(Default)]
struct Scripted {
    /// Errors of the first writes. Later writes succeed.
    writes: Mutex<VecDeque<io::Error>>,
    /// The bytes that were written.
    written: Mutex<Vec<u8>>,
}

impl Sink for Scripted {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        if let Some(error) = lock(&self.writes).pop_front() {
            return Err(error);
        }
        lock(&self.written).extend(bytes);
        Ok(())
    }
}

/// Results of the first reads. Later there is no input.
struct Reads(VecDeque<Result<u8, Errno>>);

impl Source for Reads {
    fn wait(&mut self) -> Wait<'_> {
        let time = Some(Duration::from_millis(1));
        Wait { fd: None, time }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Errno> {
        buffer[0] = self.0.pop_front().unwrap_or(Err(Errno::AGAIN))?;
        Ok(1)
    }
}

/// A console that is connected to the host, with the loop that reads its input.
struct Connected {
    console: Arc<Console>,
    host: Host,
    main: EventManager<Input>,
}

impl Connected {
    fn new(console: Arc<Console>, (host, input): (Host, Option<Input>)) -> Self {
        let mut main = EventManager::new().unwrap();
        if let Some(input) = input {
            main.add_subscriber(input);
        }
        Self {
            console,
            host,
            main,
        }
    }

    fn by(config: &ConsoleConfig) -> Self {
        let console = Arc::new(Console::default());
        let host = Host::start("the console", Arc::clone(&console), config, no_keys());
        Self::new(console, host.unwrap())
    }

    fn with(sink: Arc<Scripted>, reads: impl Into<VecDeque<Result<u8, Errno>>>) -> Self {
        let console = Arc::new(Console::default());
        let ends = Ends {
            sink,
            source: Some(Box::new(Reads(reads.into()))),
        };
        let host = Host::connect(Arc::clone(&console), ends, None, no_keys());
        Self::new(console, host.unwrap())
    }

    /// Reads as the guest, until `count` bytes have arrived.
    fn guest_reads(&mut self, count: usize) -> Vec<u8> {
        let mut got = Vec::new();
        let mut bytes = [0; 4096];
        while got.len() < count {
            match self.console.read(&mut bytes) {
                0 => self.turn(),
                read => got.extend(&bytes[..read]),
            }
        }
        got
    }

    /// Runs the loop once: handles what is ready, or waits briefly.
    fn turn(&mut self) {
        const MILLISECONDS: i32 = 10;
        self.main.run_with_timeout(MILLISECONDS).unwrap();
    }
}

/// While a disk is full, or a pipe has no reader, only the output of that time is lost.
#[test]
fn a_failed_write_loses_that_piece_alone() {
    let errors = [Errno::NOSPC, Errno::IO, Errno::FBIG, Errno::PIPE];
    let sink = Arc::new(Scripted {
        writes: Mutex::new(errors.into_iter().map(io::Error::from).collect()),
        ..Scripted::default()
    });
    let Connected { console, host, .. } = Connected::with(Arc::clone(&sink), []);
    for number in 0..6 {
        console.write(&[b'0' + number]);
        assert!(console.drain(|_| true));
    }
    host.finish(|_| true);
    assert_eq!(*lock(&sink.written), b"45");
}

/// A read fails, as accept does when the process has no descriptors left.
#[test]
fn input_that_failed_is_tried_again() {
    let reads = [Err(Errno::MFILE), Err(Errno::IO), Ok(b'x')];
    let mut connected = Connected::with(Arc::default(), reads);
    assert_eq!(connected.guest_reads(1), b"x");
    connected.host.finish(|_| true);
}

/// Only as much is read as the guest's queue has room for, and all of it arrives.
#[test]
fn input_waits_for_room_and_arrives_in_order() {
    let typed: Vec<u8> = (0..251).cycle().take(3 * INPUT_CAPACITY).collect();
    let path = path("typed");
    let socket = ConsoleConfig::Socket(path.clone());
    let mut connected = Connected::by(&socket);
    let mut client = UnixStream::connect(&path).unwrap();
    let bytes = typed.clone();
    let client = std::thread::spawn(move || client.write_all(&bytes).map(|()| client));
    while connected.console.input_len() < INPUT_CAPACITY {
        connected.turn();
    }
    for _ in 0..3 {
        connected.turn();
    }
    assert_eq!(connected.console.input_len(), INPUT_CAPACITY);
    assert!(connected.guest_reads(typed.len()) == typed);
    client.join().unwrap().unwrap();
}

/// A regular file is always readable, and epoll refuses it.
#[test]
fn a_regular_file_is_read_to_its_end() {
    struct OfFile(std::fs::File);
    impl Source for OfFile {
        fn wait(&mut self) -> Wait<'_> {
            let fd = Some(rustix::fd::AsFd::as_fd(&self.0));
            Wait { fd, time: None }
        }
        fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Errno> {
            rustix::io::read(&self.0, buffer)
        }
    }
    let path = path("input");
    std::fs::write(&path, [b'x'; 2 * INPUT_CAPACITY]).unwrap();
    let file = std::fs::File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let console = Arc::new(Console::default());
    let ends = Ends {
        sink: Arc::new(Scripted::default()),
        source: Some(Box::new(OfFile(file))),
    };
    let host = Host::connect(Arc::clone(&console), ends, None, no_keys());
    let mut connected = Connected::new(console, host.unwrap());
    connected.guest_reads(2 * INPUT_CAPACITY);
}

#[test]
fn a_file_keeps_everything() {
    let path = path("file");
    let Connected { console, host, .. } = Connected::by(&ConsoleConfig::File(path.clone()));
    console.write(b"first line\n");
    console.write(b"last line");
    host.finish(|_| true);
    assert_eq!(std::fs::read(&path).unwrap(), b"first line\nlast line");
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_full_disk_loses_output_and_not_the_guest() {
    let Connected { console, host, .. } = Connected::by(&ConsoleConfig::File("/dev/full".into()));
    for _ in 0..100 {
        console.write(&[b'x'; 4096]);
        assert!(console.drain(|_| true));
    }
    host.finish(|_| true);
}

#[test]
fn nowhere_takes_everything() {
    let Connected { console, host, .. } = Connected::by(&ConsoleConfig::None);
    console.write(b"lost");
    host.finish(|_| true);
    assert_eq!(console.output_room(), super::super::OUTPUT_CAPACITY);
}

#[test]
fn a_socket_serves_one_client_after_the_other() {
    let path = path("socket");
    let mut connected = Connected::by(&ConsoleConfig::Socket(path.clone()));
    let console = Arc::clone(&connected.console);
    console.write(b"nobody hears this");
    assert!(console.drain(|_| true));
    for name in ["one", "two"] {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(name.as_bytes()).unwrap();
        assert_eq!(connected.guest_reads(3), name.as_bytes());
        console.write(b"hello ");
        console.write(name.as_bytes());
        let mut answer = [0; 9];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer[6..], *name.as_bytes());
    }
    connected.host.finish(|_| true);
    assert!(!path.exists());
}

/// The first client neither reads nor writes, and is still connected when the next one comes.
#[test]
fn an_error_of_an_old_client_is_not_the_next_ones() {
    const MUCH: usize = 4 << 20;
    let path = path("old-client");
    let Ends { sink, source } = socket::bind(&path).unwrap();
    let mut source = source.unwrap();
    let mut read = || {
        source.wait();
        source.read(&mut [0; 16])
    };
    let mut old = UnixStream::connect(&path).unwrap();
    assert_eq!(read(), Err(Errno::AGAIN), "accepted");
    let writer = Arc::clone(&sink);
    let writer = std::thread::spawn(move || writer.write(&vec![b'x'; MUCH]));
    old.read_exact(&mut [0]).unwrap();
    old.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read(), Err(Errno::AGAIN), "gone");
    let mut next = UnixStream::connect(&path).unwrap();
    assert_eq!(read(), Err(Errno::AGAIN), "accepted");
    drop(old);
    writer.join().unwrap().unwrap();
    sink.write(b"hello").unwrap();
    next.set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let mut answer = [0; 5];
    next.read_exact(&mut answer).unwrap();
    assert_eq!(answer, *b"hello");
    sink.close();
}

/// A client that has sent everything and gone: what is written to it fails before all is read.
#[test]
fn what_a_client_sent_before_it_went_arrives() {
    let path = path("gone-client");
    let Ends { sink, source } = socket::bind(&path).unwrap();
    let mut source = source.unwrap();
    let mut read = || {
        source.wait();
        source.read(&mut [0; 1000])
    };
    let mut client = UnixStream::connect(&path).unwrap();
    assert_eq!(read(), Err(Errno::AGAIN), "accepted");
    client.write_all(&[b'x'; 2500]).unwrap();
    drop(client);
    for count in [1000, 1000, 500] {
        sink.write(b"an echo").unwrap();
        assert_eq!(read(), Ok(count));
    }
    assert_eq!(read(), Err(Errno::AGAIN), "gone");
    let _next = UnixStream::connect(&path).unwrap();
    assert_eq!(read(), Err(Errno::AGAIN), "accepted");
    sink.close();
}

/// What is typed after the end of the guest is for the next program.
#[test]
fn a_console_that_has_ended_reads_nothing() {
    let path = path("late");
    let mut connected = Connected::by(&ConsoleConfig::Socket(path.clone()));
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"x").unwrap();
    assert_eq!(connected.guest_reads(1), b"x");
    connected.console.close();
    client.write_all(b"late").unwrap();
    for _ in 0..3 {
        connected.turn();
    }
    assert_eq!(connected.console.input_len(), 0);
}

#[test]
fn where_no_socket_can_be_is_told() {
    let refused = |path: &Path| {
        let config = ConsoleConfig::Socket(path.to_owned());
        let started = Host::start("the console", Arc::default(), &config, no_keys());
        started.err().unwrap().to_string()
    };
    let path = path("taken");
    std::fs::write(&path, "").unwrap();
    assert!(refused(&path).contains("a file is there"));
    assert!(path.exists(), "it was not ours to remove");
    std::fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    assert!(refused(&path).contains("listens on it"));
    drop(listener);
    assert!(refused(&path).contains("remove it"), "{}", refused(&path));
    std::fs::remove_file(&path).unwrap();
    let long = path.with_file_name("x".repeat(108));
    assert!(refused(&long).contains("at most 107 bytes"));
}

#[test]
fn a_pseudo_terminal_is_raw_and_may_be_closed_and_opened() {
    let (pty, name) = pty::create().unwrap();
    let mut source = pty.clone();
    pty.write(b"nobody hears this").unwrap();
    for round in [b"1", b"2"] {
        let mut user = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&name)
            .unwrap();
        user.write_all(round).unwrap();
        let mut buffer = [0; 16];
        let count = loop {
            match source.read(&mut buffer) {
                Err(Errno::AGAIN) => std::thread::yield_now(),
                result => break result.unwrap(),
            }
        };
        assert_eq!(buffer[..count], *round, "no echo, no line buffer");
        pty.write(b"\n").unwrap();
        let mut answer = [0; 4];
        let count = user.read(&mut answer).unwrap();
        assert_eq!(answer[..count], *b"\n", "no carriage return is added");
    }
    assert!(source.wait().fd.is_none(), "nobody has it open");
}
