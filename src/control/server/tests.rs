//! Tests with clients of all kinds, and a machine that replies to each command at once.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;

use event_manager::{EventManager, SubscriberOps};

use super::super::client::ask;
use super::*;
use crate::util::socket::tests::path;

/// The time that a client has in these tests.
const SHORT: Duration = Duration::from_millis(500);

/// Size of a reply that no socket takes at once, in bytes.
const BIG: usize = 1 << 20;

/// How long a test waits for a reply that must come.
const LONG: Duration = Duration::from_secs(60);

/// Runs the server of the socket at `path` until `clients` returns.
fn serve<T: Send>(path: &Path, clients: impl FnOnce() -> T + Send) -> T {
    let commands = Rc::new(RefCell::new(Vec::new()));
    let taken = Rc::clone(&commands);
    let on_command = move |command, client| taken.borrow_mut().push((command, client));
    let server = Server::listen_for(SHORT, path, Box::new(on_command)).unwrap();
    let mut manager = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
    let id = manager.add_subscriber(Box::new(Rc::clone(&server)));
    thread::scope(|scope| {
        let clients = scope.spawn(clients);
        while !clients.is_finished() {
            manager.run_with_timeout(10).unwrap();
            for (command, client) in commands.take() {
                let reply = match command {
                    Command::Stats => Reply::Stats("x".repeat(BIG).into()),
                    _ => Reply::Done,
                };
                let mut ops = manager.event_ops(id).unwrap();
                server.borrow_mut().answer(client, &reply, &mut ops);
            }
        }
        clients.join().unwrap()
    })
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

/// Reads until the server closes the connection.
fn rest(mut stream: UnixStream) -> String {
    let mut text = String::new();
    match stream.read_to_string(&mut text) {
        Ok(_) => text,
        // The server has closed it without reading all that the client sent.
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => text,
        Err(error) => panic!("{error}"),
    }
}

fn with_path<T: Send>(name: &str, clients: impl FnOnce(&PathBuf) -> T + Send) -> T {
    let path = path(name);
    let result = serve(&path, || clients(&path));
    assert!(!path.exists(), "the server removes its path");
    result
}

#[test]
fn a_command_is_answered() {
    with_path("answered", |path| {
        assert_eq!(ask(path, Command::Pause).unwrap(), Reply::Done);
        let Reply::Stats(text) = ask(path, Command::Stats).unwrap() else {
            panic!("no stats");
        };
        assert_eq!(text.as_str().unwrap().len(), BIG);
    });
    let error = ask(&path("nobody"), Command::Pause).unwrap_err();
    assert!(format!("{error:#}").contains("No such file"), "{error:#}");
}

/// Lines on one connection are handled one after the other, also if they arrive at once.
#[test]
fn a_client_sends_many_lines() {
    with_path("many", |path| {
        let mut stream = connect(path);
        let line = "{\"command\":\"status\"}\n";
        stream.write_all(line.repeat(50).as_bytes()).unwrap();
        stream.write_all(b"nonsense\n").unwrap();
        let mut lines = BufReader::new(stream).lines();
        for _ in 0..50 {
            assert_eq!(lines.next().unwrap().unwrap(), "\"done\"");
        }
        let refused = lines.next().unwrap().unwrap();
        assert!(refused.contains("not a command"), "{refused}");
    });
}

/// As in a shell, the client closes its side or the whole connection right after its line.
#[test]
fn a_client_that_has_gone_is_obeyed() {
    with_path("gone", |path| {
        let mut stream = connect(path);
        stream.write_all(b"{\"command\":\"status\"}\n").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(rest(stream), "\"done\"\n");
        for _ in 0..100 {
            drop(connect(path));
            let mut stream = connect(path);
            stream.write_all(b"{\"command\":\"status\"}\n").unwrap();
        }
        assert_eq!(ask(path, Command::Pause).unwrap(), Reply::Done);
    });
}

#[test]
fn hostile_lines_without_end() {
    with_path("endless", |path| {
        let mut stream = connect(path);
        // The server closes the connection before it has read everything.
        let _ = stream.write_all(&[b'{'; 100_000]);
        let refused = rest(stream);
        assert!(
            refused.is_empty() || refused.contains("too long"),
            "{refused}"
        );
        assert_eq!(ask(path, Command::Pause).unwrap(), Reply::Done);
    });
}

/// Clients that send half a line, send nothing, or do not read their reply are disconnected after
/// their time.
#[test]
fn hostile_clients_that_do_nothing() {
    with_path("idle", |path| {
        let mut half = connect(path);
        half.write_all(b"{\"comm").unwrap();
        let silent = connect(path);
        let mut deaf = connect(path);
        deaf.write_all(b"{\"command\":\"stats\"}\n").unwrap();
        // These clients take all places, and other clients keep coming.
        let all: Vec<_> = (0..CLIENTS_MAX).map(|_| connect(path)).collect();
        for _ in 0..3 {
            assert_eq!(ask(path, Command::Pause).unwrap(), Reply::Done);
        }
        assert_eq!(rest(half), "");
        assert_eq!(rest(silent), "");
        // These came later than the client that does not read.
        all.into_iter()
            .for_each(|stream| assert_eq!(rest(stream), ""));
        let sent = rest(deaf);
        assert!(sent.len() < BIG, "{} bytes", sent.len());
    });
}

#[test]
fn a_hundred_clients_at_once() {
    with_path("hundred", |path| {
        thread::scope(|scope| {
            for _ in 0..100 {
                scope.spawn(|| assert_eq!(ask(path, Command::Status).unwrap(), Reply::Done));
            }
        });
    });
}
