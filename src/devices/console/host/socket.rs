//! The console on a Unix socket, for one client at a time.

use std::fs;
use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use log::info;
use rustix::fd::OwnedFd;
use rustix::io::{Errno, read};

use super::{Endpoint, wait_readable};
use crate::util::sync::lock;

/// A listening socket, removed at the end. While nobody is connected, output is dropped; a second
/// client waits until the first has gone.
pub(super) struct Socket {
    listener: UnixListener,
    client: Mutex<Option<Arc<UnixStream>>>,
    path: PathBuf,
}

impl Socket {
    /// Listens at `path`, where nothing may be yet.
    pub(super) fn bind(path: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path).with_context(|| {
            format!("Failed to listen on console socket {path:?}, where no file may be yet")
        })?;
        Ok(Self {
            listener,
            client: Mutex::new(None),
            path: path.to_owned(),
        })
    }

    fn client(&self) -> Option<Arc<UnixStream>> {
        lock(&self.client).clone()
    }

    fn accept(&self) -> Result<(), Errno> {
        let accepted = self.listener.accept();
        let (stream, _) = accepted.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
        info!("a client has connected to the console");
        *lock(&self.client) = Some(Arc::new(stream));
        Ok(())
    }
}

impl Endpoint for Socket {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        if let Some(client) = self.client() {
            if (&*client).write_all(bytes).is_err() {
                info!("the console's client has gone");
                *lock(&self.client) = None;
            }
        }
        Ok(())
    }

    fn read(&self, buffer: &mut [u8], stop: &OwnedFd) -> Result<usize, Errno> {
        let Some(client) = self.client() else {
            wait_readable(&self.listener, stop)?;
            self.accept()?;
            return Err(Errno::AGAIN);
        };
        wait_readable(&*client, stop)?;
        match read(&*client, buffer) {
            Ok(0) | Err(Errno::CONNRESET) => {
                info!("the console's client has disconnected");
                *lock(&self.client) = None;
                Err(Errno::AGAIN)
            }
            result => result,
        }
    }

    fn close(&self) {
        let _ = fs::remove_file(&self.path);
    }
}
