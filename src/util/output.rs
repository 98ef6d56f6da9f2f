//! Output to descriptors that rvmm shares with other programs. Those may have made them
//! non-blocking.

use std::fs::File;
use std::io::{self, Write};
use std::thread::sleep;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::AsFd;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, write};

use super::poll::poll_now;

/// Bytes for one write. A pipe that is ready for writing takes them without waiting (PIPE_BUF of
/// pipe(7)).
const AT_ONCE: usize = 4096;

/// The time between two attempts if a descriptor polls as ready, but a write still gives EAGAIN.
const RETRY: Duration = Duration::from_millis(10);

/// Writes all of `bytes` to `fd`. Waits for the reader as long as it takes, also if `fd` is
/// non-blocking.
///
/// # Errors
/// Fails if a write fails, for example because the reader has gone or the disk is full. A part of
/// `bytes` may have been written.
pub fn write_whole(fd: impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    let mut waited = false;
    while !bytes.is_empty() {
        match write(&fd, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                bytes = &bytes[count..];
                waited = false;
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                if waited {
                    sleep(RETRY);
                }
                // If poll fails, the next write returns the error.
                let _ = poll(&mut [PollFd::new(&fd, PollFlags::OUT)], None);
                waited = true;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Writes as many of `bytes` as `fd` takes without waiting, and drops the rest. A write to a
/// terminal in blocking mode may still wait, if the terminal has room for less than a line.
pub fn write_now(fd: impl AsFd, mut bytes: &[u8]) {
    while !bytes.is_empty() && !poll_now(&fd, PollFlags::OUT).is_empty() {
        match write(&fd, &bytes[..bytes.len().min(AT_ONCE)]) {
            Ok(count @ 1..) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Ok(_) | Err(_) => return,
        }
    }
}

/// A file to which every write is a [`write_now`]. A write to a terminal or a pipe never waits for
/// the reader.
#[derive(Debug)]
pub struct Unwaiting(File);

impl Unwaiting {
    /// Makes `file` non-blocking. No other program may share its open file description, because the
    /// flag would apply to that program too.
    ///
    /// # Errors
    /// Fails if the flag cannot be set (fcntl(2)).
    pub fn new(file: File) -> io::Result<Self> {
        fcntl_setfl(&file, fcntl_getfl(&file)? | OFlags::NONBLOCK)?;
        Ok(Self(file))
    }
}

/// A write always succeeds. Bytes that cannot be written are lost; the next write is tried again.
impl Write for Unwaiting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Write for &Unwaiting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_now(&self.0, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use std::fs::OpenOptions;
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    use std::os::unix::net::UnixStream;
    use std::thread;

    const MUCH: usize = 300_000;

    #[test]
    fn a_non_blocking_reader_that_lags_gets_everything() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let bytes: Vec<u8> = (0..MUCH).map(|i| i.to_le_bytes()[1]).collect();
        let sent = bytes.clone();
        let writer = thread::spawn(move || write_whole(ours, &sent));
        // The stream is full before the test reads on, so the writer has to wait.
        let mut first = [0];
        theirs.read_exact(&mut first).unwrap();
        let mut rest = Vec::new();
        theirs.read_to_end(&mut rest).unwrap();
        writer.join().unwrap().unwrap();
        assert!(first == bytes[..1] && rest == bytes[1..]);
    }

    #[test]
    fn what_nobody_can_take_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let error = write_whole(ours, b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = write_whole(full, b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }

    /// Nobody reads from the terminal. A line that is longer than the room left must not wait.
    #[test]
    fn a_terminal_that_nobody_reads_is_waited_for_by_nobody() {
        let main = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&main).unwrap();
        unlockpt(&main).unwrap();
        let name = ptsname(&main, Vec::new()).unwrap();
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(libc::O_NOCTTY);
        let other = options.open(name.to_str().unwrap()).unwrap();
        let mut other = Unwaiting::new(other).unwrap();
        for _ in 0..1000 {
            other.write_all(&[b'x'; 999]).unwrap();
        }
    }

    #[test]
    fn what_is_not_taken_at_once_is_dropped() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        write_now(&ours, &[b'x'; 4 << 20]);
        drop(ours);
        let mut taken = Vec::new();
        theirs.read_to_end(&mut taken).unwrap();
        assert!((1..4 << 20).contains(&taken.len()), "{}", taken.len());
    }
}
