//! Consoles that a test can reach without a terminal of its own.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::socket::Socket;
use super::*;
use crate::util::sync::lock;

fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("rvmm-console-{}-{name}", std::process::id()))
}

/// An endpoint of a test's own making.
#[derive(Default)]
struct Scripted {
    /// What each write gives; then they pass.
    writes: Mutex<VecDeque<io::Error>>,
    /// What was written.
    written: Mutex<Vec<u8>>,
    /// What each read gives; then nothing comes any more, and `stop` is not heard either.
    reads: Mutex<VecDeque<Result<u8, Errno>>>,
}

impl Endpoint for Scripted {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        if let Some(error) = lock(&self.writes).pop_front() {
            return Err(error);
        }
        lock(&self.written).extend(bytes);
        Ok(())
    }

    fn read(&self, buffer: &mut [u8], _: &OwnedFd) -> Result<usize, Errno> {
        let next = lock(&self.reads).pop_front();
        match next {
            Some(byte) => {
                buffer[0] = byte?;
                Ok(1)
            }
            None => loop {
                std::thread::park();
            },
        }
    }
}

fn connect(endpoint: Scripted) -> (Arc<Console>, Arc<Scripted>, Host) {
    let (console, endpoint) = (Arc::new(Console::default()), Arc::new(endpoint));
    let as_endpoint: Arc<dyn Endpoint> = Arc::clone(&endpoint) as _;
    let host = Host::connect(Arc::clone(&console), as_endpoint, None, Box::new(|| ()));
    (console, endpoint, host.unwrap())
}

/// A disk that is full for a while, or a pipe that is without a reader for a while, loses what was
/// written meanwhile and nothing more.
#[test]
fn a_failed_write_loses_that_piece_alone() {
    let errors = [Errno::NOSPC, Errno::IO, Errno::FBIG, Errno::PIPE];
    let (console, endpoint, host) = connect(Scripted {
        writes: Mutex::new(errors.into_iter().map(io::Error::from).collect()),
        ..Scripted::default()
    });
    for number in 0..6 {
        console.write(&[b'0' + number]);
        assert!(console.drain(|_| true));
    }
    host.finish(|_| true);
    assert_eq!(*lock(&endpoint.written), b"45");
}

/// As accept does when all of a process's descriptors are taken.
#[test]
fn input_that_failed_is_tried_again() {
    let (console, _, host) = connect(Scripted {
        reads: Mutex::new([Err(Errno::MFILE), Err(Errno::IO), Ok(b'x')].into()),
        ..Scripted::default()
    });
    assert_eq!(guest_reads(&console, 1), b"x");
    host.finish(|_| true);
}

/// Another program that reads the same terminal took what woke the thread.
#[test]
fn an_input_that_never_comes_back_holds_up_no_end() {
    let (_, _, host) = connect(Scripted::default());
    host.finish(|_| true);
}

fn start(config: &ConsoleConfig) -> (Arc<Console>, Host) {
    let console = Arc::new(Console::default());
    let host = Host::start("the console", Arc::clone(&console), config, Box::new(|| ())).unwrap();
    (console, host)
}

/// What the guest reads until it has `count` bytes.
fn guest_reads(console: &Console, count: usize) -> Vec<u8> {
    let mut got = Vec::new();
    let mut bytes = [0; 64];
    while got.len() < count {
        let read = console.read(&mut bytes);
        got.extend(&bytes[..read]);
        std::thread::yield_now();
    }
    got
}

#[test]
fn a_file_keeps_everything() {
    let path = path("file");
    let (console, host) = start(&ConsoleConfig::File(path.clone()));
    console.write(b"first line\n");
    console.write(b"last line");
    host.finish(|_| true);
    assert_eq!(std::fs::read(&path).unwrap(), b"first line\nlast line");
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_full_disk_loses_output_and_not_the_guest() {
    let (console, host) = start(&ConsoleConfig::File("/dev/full".into()));
    for _ in 0..100 {
        console.write(&[b'x'; 4096]);
        assert!(console.drain(|_| true));
    }
    host.finish(|_| true);
}

#[test]
fn nowhere_takes_everything() {
    let (console, host) = start(&ConsoleConfig::None);
    console.write(b"lost");
    host.finish(|_| true);
    assert_eq!(console.output_room(), super::super::OUTPUT_CAPACITY);
}

#[test]
fn a_socket_serves_one_client_after_the_other() {
    let path = path("socket");
    let (console, host) = start(&ConsoleConfig::Socket(path.clone()));
    console.write(b"nobody hears this");
    assert!(console.drain(|_| true));
    for name in ["one", "two"] {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(name.as_bytes()).unwrap();
        assert_eq!(guest_reads(&console, 3), name.as_bytes());
        console.write(b"hello ");
        console.write(name.as_bytes());
        let mut answer = [0; 9];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer[6..], *name.as_bytes());
    }
    host.finish(|_| true);
    assert!(!path.exists());
}

/// The first client neither reads nor writes, and is still there when the next one comes.
#[test]
fn an_error_of_an_old_client_is_not_the_next_ones() {
    const MUCH: usize = 4 << 20;
    let path = path("old-client");
    let socket = Arc::new(Socket::bind(&path).unwrap());
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let read = || socket.read(&mut [0; 16], &stop);
    let mut old = UnixStream::connect(&path).unwrap();
    assert_eq!(read(), Err(Errno::AGAIN), "accepted");
    let writer = Arc::clone(&socket);
    let writer = std::thread::spawn(move || writer.write(&vec![b'x'; MUCH]));
    old.read_exact(&mut [0]).unwrap();
    old.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read(), Err(Errno::AGAIN), "gone");
    let mut next = UnixStream::connect(&path).unwrap();
    assert_eq!(read(), Err(Errno::AGAIN), "accepted");
    drop(old);
    writer.join().unwrap().unwrap();
    socket.write(b"hello").unwrap();
    next.set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let mut answer = [0; 5];
    next.read_exact(&mut answer).unwrap();
    assert_eq!(answer, *b"hello");
    socket.close();
}

#[test]
fn where_no_socket_can_be_is_told() {
    let refused = |path: &Path| {
        let config = ConsoleConfig::Socket(path.to_owned());
        let started = Host::start("the console", Arc::default(), &config, Box::new(|| ()));
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
    let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
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
            match pty.read(&mut buffer, &stop) {
                Err(Errno::AGAIN) => {}
                result => break result.unwrap(),
            }
        };
        assert_eq!(buffer[..count], *round, "no echo, no line buffer");
        pty.write(b"\n").unwrap();
        let mut answer = [0; 4];
        let count = user.read(&mut answer).unwrap();
        assert_eq!(answer[..count], *b"\n", "no carriage return is added");
    }
    write(&*stop, &1u64.to_ne_bytes()).unwrap();
    assert_eq!(pty.read(&mut [0; 16], &stop), Err(Errno::CANCELED));
}
