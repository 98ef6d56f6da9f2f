//! The connection to GDB: a socket on the main loop that one client may use at a time.
//!
//! No client can block the loop: the descriptors are non-blocking. What a client does not take is
//! kept, up to `UNSENT_MAX` bytes. What it sends is read as far as it is handled, up to
//! `UNHEARD_MAX` bytes ahead.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use anyhow::{Context, Result};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use gdbstub::conn::Connection;
use log::{debug, info, warn};
use vmm_sys_util::eventfd::EventFd;

use crate::config::GdbAddress;
use crate::util::socket::Listening;

/// The most bytes that wait to be sent. A reply has at most some KiB; a client that lets more wait
/// is disconnected.
const UNSENT_MAX: usize = 1 << 20;

/// The most bytes that are read and not handled yet.
const UNHEARD_MAX: usize = 64 << 10;

/// Bytes that are read at once.
const AT_ONCE: usize = 4096;

const LISTENER: u32 = 0;
const CLIENT: u32 = 1;
const HEARD: u32 = 2;

/// What a client does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// It has connected.
    Hello,
    /// It has sent these bytes.
    Bytes(Vec<u8>),
    /// It has disconnected.
    Bye,
}

/// The number of a client. Each has another one.
pub type Number = u64;

/// Called with what the client of this number does, on the main loop's thread.
pub type OnSaid = Box<dyn Fn(Number, Said)>;

/// A socket that listens for GDB.
pub enum Listener {
    /// A port of 127.0.0.1.
    Tcp(TcpListener),
    /// A path.
    Unix(Listening),
}

impl Listener {
    /// Listens at `address`: a port is for the users of this host only, a path for this user only.
    ///
    /// # Errors
    /// Fails if the port or the path is in use. The message names it.
    pub fn at(address: &GdbAddress) -> Result<Self> {
        Ok(match address {
            GdbAddress::Port(port) => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, *port));
                let listener = listener.with_context(|| {
                    format!("Failed to listen for GDB on port {port}: choose another one")
                })?;
                listener.set_nonblocking(true)?;
                Self::Tcp(listener)
            }
            GdbAddress::Unix(path) => Self::Unix(Listening::at(path, "GDB's socket")?),
        })
    }

    /// The address, with the port that the host has chosen.
    pub fn address(&self, asked: &GdbAddress) -> GdbAddress {
        match self {
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) => GdbAddress::Port(address.port()),
                Err(_) => asked.clone(),
            },
            Self::Unix(_) => asked.clone(),
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                // Packets are small, and GDB waits for each.
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Listener::Unix(listening) => {
                let (stream, _) = listening.listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok(Stream::Unix(stream))
            }
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Listener::Tcp(listener) => listener.as_raw_fd(),
            Listener::Unix(listening) => listening.listener.as_raw_fd(),
        }
    }
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(bytes),
            Stream::Unix(stream) => stream.read(bytes),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => Write::write(stream, bytes),
            Stream::Unix(stream) => Write::write(stream, bytes),
        }
    }
}

impl Stream {
    fn shut_down(&self) {
        // Fails if the client has gone.
        let _ = match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Stream::Tcp(stream) => stream.as_raw_fd(),
            Stream::Unix(stream) => stream.as_raw_fd(),
        }
    }
}

/// The client, which the main loop and gdbstub share.
#[derive(Default)]
struct Client {
    stream: Option<Stream>,
    number: Number,
    unsent: Vec<u8>,
    /// Bytes that were read and are not handled yet.
    unheard: usize,
}

impl Client {
    /// Sends what the client takes now.
    fn flush(&mut self) -> io::Result<()> {
        let Some(stream) = &mut self.stream else {
            self.unsent.clear();
            return Ok(());
        };
        while !self.unsent.is_empty() {
            match stream.write(&self.unsent) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        match self.unsent.len() > UNSENT_MAX {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(()),
        }
    }
}

/// The end of one client's connection, to which gdbstub writes.
#[derive(Clone)]
pub struct Wire {
    client: Rc<RefCell<Client>>,
    number: Number,
    /// Wakes the main loop when all bytes are handled.
    heard: Rc<EventFd>,
}

impl Wire {
    /// The connection of another client.
    pub fn of(&self, number: Number) -> Self {
        Self {
            number,
            ..self.clone()
        }
    }

    /// Whether this is the connection of client `number`.
    pub fn is_of(&self, number: Number) -> bool {
        self.number == number
    }

    /// Ends the connection, after what the client takes now. [`Said::Bye`] follows. Does nothing
    /// if the client has gone.
    pub fn close(&self) {
        let mut client = self.client.borrow_mut();
        if client.number != self.number {
            return;
        }
        let _ = client.flush();
        if let Some(stream) = &client.stream {
            stream.shut_down();
        }
    }

    /// `count` bytes of a client have been handled: more may be read.
    pub fn heard(&self, count: usize) {
        let mut client = self.client.borrow_mut();
        client.unheard = client.unheard.saturating_sub(count);
        if client.unheard == 0 {
            // This fails only if 2^64 wake-ups wait.
            let _ = self.heard.write(1);
        }
    }
}

impl Connection for Wire {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        let mut client = self.client.borrow_mut();
        if client.number != self.number {
            return Err(io::ErrorKind::NotConnected.into());
        }
        if client.unsent.len() >= UNSENT_MAX {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        client.unsent.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut client = self.client.borrow_mut();
        match client.number == self.number {
            true => client.flush(),
            false => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// The server: a subscriber of the main loop.
pub struct Link {
    listener: Listener,
    client: Rc<RefCell<Client>>,
    heard: Rc<EventFd>,
    on_said: OnSaid,
}

impl Link {
    /// A server on `listener`, and the end that gdbstub writes to.
    ///
    /// # Errors
    /// Fails if the host has no descriptors left.
    pub fn new(listener: Listener, on_said: OnSaid) -> io::Result<(Self, Wire)> {
        let client = Rc::<RefCell<Client>>::default();
        let heard = Rc::new(EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?);
        let wire = Wire {
            client: Rc::clone(&client),
            number: 0,
            heard: Rc::clone(&heard),
        };
        let link = Self {
            listener,
            client,
            heard,
            on_said,
        };
        Ok((link, wire))
    }

    /// Accepts all that wait, because the events are edge-triggered. If the host has no descriptors
    /// left, the next connection tries again.
    fn accept(&mut self, ops: &mut EventOps) {
        loop {
            match self.listener.accept() {
                Ok(stream) => self.welcome(stream, ops),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    debug!("Failed to accept GDB's connection: {error}");
                    return;
                }
            }
        }
    }

    fn welcome(&mut self, stream: Stream, ops: &mut EventOps) {
        let mut client = self.client.borrow_mut();
        if client.stream.is_some() {
            info!("GDB is connected already: a second connection is refused");
            return;
        }
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        if let Err(error) = ops.add(Events::with_data(&stream, CLIENT, events)) {
            warn!("Failed to listen to GDB: {error}");
            return;
        }
        *client = Client {
            stream: Some(stream),
            number: client.number + 1,
            ..Client::default()
        };
        let number = client.number;
        drop(client);
        (self.on_said)(number, Said::Hello);
    }

    /// Reads all that there is and that may be read, because the events are edge-triggered.
    fn serve(&mut self, ops: &mut EventOps) {
        loop {
            let mut bytes = [0; AT_ONCE];
            let mut client = self.client.borrow_mut();
            let sent = client.flush();
            if client.unheard >= UNHEARD_MAX && sent.is_ok() {
                return;
            }
            let Some(stream) = client.stream.as_mut().filter(|_| sent.is_ok()) else {
                drop(client);
                return self.lose(ops);
            };
            match stream.read(&mut bytes) {
                Ok(count) if count > 0 => {
                    client.unheard += count;
                    let number = client.number;
                    drop(client);
                    (self.on_said)(number, Said::Bytes(bytes[..count].to_vec()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    drop(client);
                    return self.lose(ops);
                }
            }
        }
    }

    fn lose(&mut self, ops: &mut EventOps) {
        let mut client = self.client.borrow_mut();
        let Some(stream) = client.stream.take() else {
            return;
        };
        let number = client.number;
        drop(client);
        if let Err(error) = ops.remove(Events::empty(&stream)) {
            debug!("Failed to stop listening to GDB: {error}");
        }
        (self.on_said)(number, Said::Bye);
    }
}

impl MutEventSubscriber for Link {
    fn init(&mut self, ops: &mut EventOps) {
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for events in [
            Events::with_data(&self.listener, LISTENER, edges),
            Events::with_data(self.heard.as_ref(), HEARD, EventSet::IN),
        ] {
            if let Err(error) = ops.add(events) {
                warn!("Failed to listen for GDB: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            LISTENER => self.accept(ops),
            HEARD => {
                let _ = self.heard.read();
                self.serve(ops);
            }
            _ => self.serve(ops),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::{EventManager, SubscriberOps};
    use std::sync::mpsc::{Receiver, channel};

    /// A server on a free port, its wire, what is said, and its loop.
    fn server() -> (u16, Wire, Receiver<(Number, Said)>, EventManager<Link>) {
        let listener = Listener::at(&GdbAddress::Port(0)).unwrap();
        let GdbAddress::Port(port) = listener.address(&GdbAddress::Port(0)) else {
            unreachable!()
        };
        let (said, heard) = channel();
        let on_said = move |number, what| said.send((number, what)).unwrap();
        let (link, wire) = Link::new(listener, Box::new(on_said)).unwrap();
        let mut main = EventManager::new().unwrap();
        main.add_subscriber(link);
        (port, wire, heard, main)
    }

    /// Runs the loop until something is said.
    fn next(main: &mut EventManager<Link>, heard: &Receiver<(Number, Said)>) -> (Number, Said) {
        loop {
            if let Ok(said) = heard.try_recv() {
                return said;
            }
            main.run_with_timeout(100).unwrap();
        }
    }

    #[test]
    fn bytes_go_both_ways() {
        let (port, wire, heard, mut main) = server();
        let mut wire = wire.of(1);
        let mut gdb = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        assert_eq!(next(&mut main, &heard), (1, Said::Hello));
        Write::write_all(&mut gdb, b"$g#67").unwrap();
        assert_eq!(next(&mut main, &heard), (1, Said::Bytes(b"$g#67".to_vec())));
        wire.write_all(b"+").unwrap();
        wire.flush().unwrap();
        let mut reply = [0; 1];
        gdb.read_exact(&mut reply).unwrap();
        assert_eq!(&reply, b"+");
        // A second client gets nothing.
        let mut other = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        main.run_with_timeout(100).unwrap();
        assert_eq!(other.read(&mut reply).unwrap(), 0);
        drop(gdb);
        assert_eq!(next(&mut main, &heard), (1, Said::Bye));
        let _again = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        assert_eq!(next(&mut main, &heard), (2, Said::Hello));
        // What was for the first client is not for the second.
        assert!(wire.write_all(b"+").is_err());
    }

    #[test]
    fn a_client_that_does_not_read_is_lost() {
        let (port, wire, heard, mut main) = server();
        let mut wire = wire.of(1);
        let _gdb = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        assert_eq!(next(&mut main, &heard), (1, Said::Hello));
        let piece = [b'x'; 64 << 10];
        let tries = (0..1000).map(|_| wire.write_all(&piece).and_then(|()| wire.flush()));
        assert!(tries.filter(Result::is_err).count() > 0);
        assert!(wire.client.borrow().unsent.len() <= UNSENT_MAX);
        wire.close();
        assert_eq!(next(&mut main, &heard), (1, Said::Bye));
    }

    /// It is read only as far as what it has sent is handled.
    #[test]
    fn a_client_that_floods_waits() {
        let (port, wire, heard, mut main) = server();
        let mut gdb = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        gdb.set_nonblocking(true).unwrap();
        assert_eq!(next(&mut main, &heard), (1, Said::Hello));
        let piece = [b'x'; 64 << 10];
        let mut count = 0;
        for _ in 0..100 {
            while Write::write(&mut gdb, &piece).is_ok() {}
            main.run_with_timeout(0).unwrap();
            let pieces = heard.try_iter();
            count += pieces
                .map(|(_, said)| match said {
                    Said::Bytes(bytes) => bytes.len(),
                    other => panic!("{other:?}"),
                })
                .sum::<usize>();
        }
        assert!(
            (UNHEARD_MAX..UNHEARD_MAX + AT_ONCE).contains(&count),
            "{count}"
        );
        wire.heard(count);
        assert!(matches!(next(&mut main, &heard), (1, Said::Bytes(_))));
    }
}
