//! Output to descriptors that other programs share, and may have made non-blocking.

use std::io;
use std::thread::sleep;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::AsFd;
use rustix::io::{Errno, write};

use super::poll::poll_now;

/// A pipe that is ready for writing takes as much at once (PIPE_BUF of pipe(7)).
const AT_ONCE: usize = 4096;

/// Between two attempts at what says it is ready and is not.
const RETRY: Duration = Duration::from_millis(10);

/// Writes all of `bytes` to `fd`, however long its reader takes, whether `fd` is blocking or not.
///
/// # Errors
/// What is not written yet cannot be: the reader has gone, or the disk is full.
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
                // A signal, or an error that the next write tells.
                let _ = poll(&mut [PollFd::new(&fd, PollFlags::OUT)], None);
                waited = true;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Writes what `fd` takes at once; the rest is dropped. A blocking terminal may still wait, where its
/// room is less than a line.
pub fn write_now(fd: impl AsFd, mut bytes: &[u8]) {
    while !bytes.is_empty() && !poll_now(&fd, PollFlags::OUT).is_empty() {
        match write(&fd, &bytes[..bytes.len().min(AT_ONCE)]) {
            Ok(count @ 1..) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Ok(_) | Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::io::Read;
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
        // Nobody reads before the stream is full, and the writer waits.
        let mut first = [0];
        theirs.read_exact(&mut first).unwrap();
        let mut rest = Vec::new();
        theirs.read_to_end(&mut rest).unwrap();
        writer.join().unwrap().unwrap();
        assert!(first == bytes[..1] && rest == bytes[1..]);
    }

    #[test]
    fn what_nobody_can_take_is_told() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let error = write_whole(ours, b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = write_whole(full, b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
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
