//! The connection to GDB: a socket on the main loop that one client may use at a time.
//!
//! No client can block the loop: the descriptors are non-blocking, and what a client does not take
//! is kept, up to `UNSENT_MAX` bytes.

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

use crate::config::GdbAddress;
use crate::util::socket::Listening;

/// The most bytes that wait to be sent. A reply has at most some KiB; a client that lets more wait
/// is disconnected.
const UNSENT_MAX: usize = 1 << 20;

/// Bytes that are read at once.
const AT_ONCE: usize = 4096;

const LISTENER: u32 = 0;
const CLIENT: u32 = 1;

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

/// Called with what the client does, on the main loop's thread.
pub type OnSaid = Box<dyn Fn(Said)>;

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
    unsent: Vec<u8>,
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

/// The end of the connection that gdbstub writes to.
#[derive(Clone)]
pub struct Wire(Rc<RefCell<Client>>);

impl Wire {
    /// Ends the connection, after what the client takes now. [`Said::Bye`] follows.
    pub fn close(&self) {
        let mut client = self.0.borrow_mut();
        let _ = client.flush();
        if let Some(stream) = &client.stream {
            stream.shut_down();
        }
    }
}

impl Connection for Wire {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.0.borrow_mut().unsent.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.borrow_mut().flush()
    }
}

/// The server: a subscriber of the main loop.
pub struct Link {
    listener: Listener,
    client: Rc<RefCell<Client>>,
    on_said: OnSaid,
}

impl Link {
    /// A server on `listener`, and the end that gdbstub writes to.
    pub fn new(listener: Listener, on_said: OnSaid) -> (Self, Wire) {
        let client = Rc::<RefCell<Client>>::default();
        let wire = Wire(Rc::clone(&client));
        let link = Self {
            listener,
            client,
            on_said,
        };
        (link, wire)
    }

    fn accept(&mut self, ops: &mut EventOps) {
        let stream = match self.listener.accept() {
            Ok(stream) => stream,
            Err(error) => {
                debug!("Failed to accept GDB's connection: {error}");
                return;
            }
        };
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
        client.unsent.clear();
        client.stream = Some(stream);
        drop(client);
        (self.on_said)(Said::Hello);
    }

    /// Reads all that there is, because the events are edge-triggered.
    fn serve(&mut self, ops: &mut EventOps) {
        loop {
            let mut bytes = [0; AT_ONCE];
            let mut client = self.client.borrow_mut();
            let sent = client.flush();
            let Some(stream) = client.stream.as_mut().filter(|_| sent.is_ok()) else {
                drop(client);
                return self.lose(ops);
            };
            match stream.read(&mut bytes) {
                Ok(count) if count > 0 => {
                    drop(client);
                    (self.on_said)(Said::Bytes(bytes[..count].to_vec()));
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
        let stream = self.client.borrow_mut().stream.take();
        let Some(stream) = stream else {
            return;
        };
        if let Err(error) = ops.remove(Events::empty(&stream)) {
            debug!("Failed to stop listening to GDB: {error}");
        }
        (self.on_said)(Said::Bye);
    }
}

impl MutEventSubscriber for Link {
    fn init(&mut self, ops: &mut EventOps) {
        let listener = Events::with_data(&self.listener, LISTENER, EventSet::IN);
        if let Err(error) = ops.add(listener) {
            warn!("Failed to listen for GDB: {error}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            LISTENER => self.accept(ops),
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
    fn server() -> (u16, Wire, Receiver<Said>, EventManager<Link>) {
        let listener = Listener::at(&GdbAddress::Port(0)).unwrap();
        let GdbAddress::Port(port) = listener.address(&GdbAddress::Port(0)) else {
            unreachable!()
        };
        let (said, heard) = channel();
        let (link, wire) = Link::new(listener, Box::new(move |what| said.send(what).unwrap()));
        let mut main = EventManager::new().unwrap();
        main.add_subscriber(link);
        (port, wire, heard, main)
    }

    /// Runs the loop until something is said.
    fn next(main: &mut EventManager<Link>, heard: &Receiver<Said>) -> Said {
        loop {
            if let Ok(said) = heard.try_recv() {
                return said;
            }
            main.run_with_timeout(100).unwrap();
        }
    }

    #[test]
    fn bytes_go_both_ways() {
        let (port, mut wire, heard, mut main) = server();
        let mut gdb = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        assert_eq!(next(&mut main, &heard), Said::Hello);
        Write::write_all(&mut gdb, b"$g#67").unwrap();
        assert_eq!(next(&mut main, &heard), Said::Bytes(b"$g#67".to_vec()));
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
        assert_eq!(next(&mut main, &heard), Said::Bye);
        let _again = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        assert_eq!(next(&mut main, &heard), Said::Hello);
    }

    #[test]
    fn a_client_that_does_not_read_is_lost() {
        let (port, mut wire, heard, mut main) = server();
        let _gdb = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        assert_eq!(next(&mut main, &heard), Said::Hello);
        let piece = [b'x'; 64 << 10];
        while wire.write_all(&piece).and_then(|()| wire.flush()).is_ok() {}
    }
}
