//! Consoles that a test can reach without a terminal of its own.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use super::*;

fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("rvmm-console-{}-{name}", std::process::id()))
}

fn start(config: &ConsoleConfig) -> (Arc<Console>, Host) {
    let console = Arc::new(Console::default());
    let host = Host::start(Arc::clone(&console), config, Box::new(|| ())).unwrap();
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
fn a_full_disk_ends_output_and_not_the_guest() {
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

#[test]
fn a_socket_that_is_there_is_told() {
    let path = path("taken");
    std::fs::write(&path, "").unwrap();
    let config = ConsoleConfig::Socket(path.clone());
    let error = Host::start(Arc::default(), &config, Box::new(|| ())).err();
    assert!(error.unwrap().to_string().contains("no file may be yet"));
    assert!(path.exists(), "it was not ours to remove");
    std::fs::remove_file(&path).unwrap();
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
