//! Unix sockets that rvmm listens on: the path's permissions, and taking over a stale socket.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::Mode;
use rustix::process::umask;

/// A socket that listens at a path. Dropping it removes the path.
pub struct Listening {
    /// The socket. It is non-blocking.
    pub listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the path when the socket was created: another process may have taken
    /// over the path since.
    identity: Option<(u64, u64)>,
}

impl Listening {
    /// Listens at `path`. Only the user of this process can connect. Replaces a socket whose owner
    /// has ended. No other thread may create files meanwhile, because this changes the process's
    /// umask.
    ///
    /// # Errors
    /// Fails if the path is in use or the socket cannot be created. The message has one line, with
    /// the path, the reason and a way out. It calls the socket `what`, such as `control socket`.
    pub fn at(path: &Path, what: &str) -> Result<Self> {
        make_room(path, what)?;
        let before = umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
        let bound = UnixListener::bind(path);
        umask(before);
        let listener =
            bound.with_context(|| format!("Failed to listen on {what} {path:?}{}", hint(path)))?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            identity: identity(path),
        })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // Ignore errors, such as a directory that is not writable any more: the next machine
            // replaces the stale socket.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let there = fs::symlink_metadata(path).ok()?;
    Some((there.dev(), there.ino()))
}

/// Removes a socket at `path` that nobody listens on.
fn make_room(path: &Path, what: &str) -> Result<()> {
    let Ok(there) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !there.file_type().is_socket() {
        bail!("Failed to listen on {what} {path:?}: a file is there: choose another name");
    }
    match UnixStream::connect(path) {
        Ok(_) => bail!(
            "Failed to listen on {what} {path:?}: another process listens on it: choose another \
             name"
        ),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)
            .with_context(|| format!("Failed to remove the stale {what} {path:?}")),
        // Such as no permission: binding fails too, with the reason.
        Err(_) => Ok(()),
    }
}

fn hint(path: &Path) -> String {
    /// Size of a path in sockaddr_un, without the NUL (unix(7)).
    const LONGEST: usize = 107;
    match path.as_os_str().len() {
        length @ 108.. => {
            format!(": a socket's path has at most {LONGEST} bytes, but this one has {length}")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A path for this test.
    pub(crate) fn path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("rvmm-{}-{name}", std::process::id()))
    }

    fn refused(path: &Path) -> String {
        let error = Listening::at(path, "control socket")
            .err()
            .expect("is refused");
        format!("{error:#}")
    }

    #[test]
    fn a_live_socket_is_refused_and_a_stale_one_taken_over() {
        let path = path("owner");
        let first = Listening::at(&path, "control socket").unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(refused(&path).contains("another process listens"));
        // As if its owner was killed: the path stays.
        let Listening { listener, .. } = &first;
        let copy = listener.try_clone().unwrap();
        std::mem::forget(first);
        drop(copy);
        let stale = self::path("stale");
        drop(UnixListener::bind(&stale).unwrap());
        let second = Listening::at(&stale, "control socket").unwrap();
        assert!(UnixStream::connect(&stale).is_ok());
        drop(second);
        assert!(!stale.exists());
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_is_no_socket_stays() {
        let path = path("file");
        fs::write(&path, "mine").unwrap();
        assert!(refused(&path).contains("a file is there"));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        fs::remove_file(&path).unwrap();
        let long = Path::new("/tmp").join("x".repeat(120));
        assert!(refused(&long).contains("at most 107 bytes"));
        assert!(refused(Path::new("/nowhere/socket")).contains("No such file"));
    }

    /// Another socket has the path meanwhile: it is not removed.
    #[test]
    fn anothers_socket_stays() {
        let path = path("taken");
        let first = Listening::at(&path, "control socket").unwrap();
        fs::remove_file(&path).unwrap();
        let second = UnixListener::bind(&path).unwrap();
        drop(first);
        assert!(UnixStream::connect(&path).is_ok());
        drop(second);
        fs::remove_file(path).unwrap();
    }
}
