//! Connects a console to a Unix socket, for one client at a time.

use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Result, anyhow};
use log::info;
use rustix::fd::AsFd;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::input::{Source, Wait};
use super::{Ends, Sink};
use crate::util::output::write_whole;
use crate::util::sync::lock;

/// A listening socket. [`Sink::close`] removes its path. While no client is connected, output is
/// dropped. A second client waits until the first has disconnected.
struct Socket {
    listener: UnixListener,
    client: Mutex<Option<Arc<UnixStream>>>,
    path: PathBuf,
}

/// Listens at `path`, which must not exist yet.
pub(super) fn bind(path: &Path) -> Result<Ends> {
    let listener = UnixListener::bind(path);
    let listener = listener.map_err(|error| {
        let hint = hint(path, &error);
        anyhow!("Failed to listen on console socket {path:?}: {error}{hint}")
    })?;
    // A client may disconnect before rvmm accepts it. Then accept must not block.
    listener.set_nonblocking(true)?;
    let socket = Arc::new(Socket {
        listener,
        client: Mutex::new(None),
        path: path.to_owned(),
    });
    Ok(Ends {
        sink: Arc::clone(&socket) as _,
        source: Some(Box::new(Input {
            socket,
            client: None,
        })),
    })
}

impl Socket {
    fn client(&self) -> Option<Arc<UnixStream>> {
        lock(&self.client).clone()
    }

    fn accept(&self) -> Result<Arc<UnixStream>, Errno> {
        let accepted = self.listener.accept();
        let (stream, _) = accepted.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
        info!("a client has connected to the console");
        let client = Arc::new(stream);
        *lock(&self.client) = Some(Arc::clone(&client));
        Ok(client)
    }

    /// Disconnects `client`. If another client has connected meanwhile, that one stays connected.
    fn lose(&self, client: &Arc<UnixStream>) {
        let mut current = lock(&self.client);
        if current.as_ref().is_some_and(|now| Arc::ptr_eq(now, client)) {
            info!("the console's client has disconnected");
            *current = None;
        }
        // This also ends a write to the client that blocks on another thread.
        let _ = client.shutdown(Shutdown::Both);
    }
}

impl Sink for Socket {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let Some(client) = self.client() else {
            return Ok(());
        };
        match write_whole(&*client, bytes) {
            Err(error) if is_gone(&error) => {
                self.lose(&client);
                Ok(())
            }
            result => result,
        }
    }

    fn close(&self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The input from a socket's clients, one after the other.
struct Input {
    socket: Arc<Socket>,
    /// The client whose input is read. Even if a write to it has failed, it stays here until all
    /// its input is read.
    client: Option<Arc<UnixStream>>,
}

impl Source for Input {
    fn wait(&mut self) -> Wait<'_> {
        let client = self.client.as_ref().map(AsFd::as_fd);
        Wait {
            fd: client.or(Some(self.socket.listener.as_fd())),
            time: None,
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Errno> {
        let Some(client) = self.client.take() else {
            self.client = Some(self.socket.accept()?);
            return Err(Errno::AGAIN);
        };
        match recv(&*client, buffer, RecvFlags::DONTWAIT) {
            Ok((count @ 1.., _)) => {
                self.client = Some(client);
                Ok(count)
            }
            Err(Errno::INTR | Errno::AGAIN) => {
                self.client = Some(client);
                Err(Errno::AGAIN)
            }
            Ok(_) | Err(_) => {
                self.socket.lose(&client);
                Err(Errno::AGAIN)
            }
        }
    }
}

/// Why rvmm cannot listen at `path`, and what to do. The text is added to the error's message.
fn hint(path: &Path, error: &io::Error) -> String {
    /// The longest path in bytes that fits in sockaddr_un, without the NUL (unix(7)).
    const LONGEST: usize = 107;
    match error.kind() {
        io::ErrorKind::AddrInUse => match UnixStream::connect(path) {
            Ok(_) => ": another process listens on it: choose another name".into(),
            Err(error) if is_stale(path, &error) => {
                ": a stale socket is there, which nobody listens on: remove it".into()
            }
            Err(_) => ": a file is there: choose another name".into(),
        },
        io::ErrorKind::InvalidInput => {
            let length = path.as_os_str().len();
            format!(": a socket's path has at most {LONGEST} bytes, but this one has {length}")
        }
        _ => String::new(),
    }
}

/// Whether `path` is a socket whose owner has ended. `error` is the error of connecting to it.
fn is_stale(path: &Path, error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionRefused
        && fs::metadata(path).is_ok_and(|there| there.file_type().is_socket())
}

/// Whether the error of a write means that the client has disconnected.
fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected)
}
