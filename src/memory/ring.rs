//! Transfers between a file and guest RAM by io_uring(7).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use io_uring::types::{CancelBuilder, Timespec};
use io_uring::{EnterFlags, IoUring, cqueue, opcode, types};
use vmm_sys_util::eventfd::EventFd;

use super::Pieces;
use super::pieces::PIECES_MAX;

/// The direction of a request, and the offset in the ring's file in bytes.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// Read from the file at this offset into the pieces.
    Read(u64),
    /// Write the pieces to the file at this offset.
    Write(u64),
}

/// The time until [`Ring::stop`] tries again if the host refuses to wait for a request.
const RETRY: Duration = Duration::from_millis(1);

/// A ring for one file, used by one thread. `T` identifies a request for the ring's owner.
pub struct Ring<T> {
    ring: IoUring,
    file: Arc<File>,
    /// Requests in flight. The `user_data` of a request's entry is the number of its slot.
    slots: Vec<Option<(Op, Pieces, T)>>,
    free: Vec<usize>,
    /// The bytes of all requests in flight.
    bytes: usize,
}

/// A request that has ended: its pieces, its owner's `T`, and the number of bytes transferred or
/// the error.
pub type Ended<T> = (Pieces, T, io::Result<usize>);

impl<T> Ring<T> {
    /// Creates a ring on `file` for up to `requests` requests at a time. The kernel signals `ended`
    /// when a request ends.
    ///
    /// # Errors
    /// Fails if the host has no io_uring, or does not allow it to this process.
    pub fn new(requests: u16, file: Arc<File>, ended: &EventFd) -> io::Result<Self> {
        let ring = IoUring::new(requests.into())?;
        ring.submitter().register_eventfd(ended.as_raw_fd())?;
        Ok(Self {
            ring,
            file,
            slots: (0..requests).map(|_| None).collect(),
            free: (0..usize::from(requests)).rev().collect(),
            bytes: 0,
        })
    }

    /// The number of requests that were pushed and have not been reaped.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The bytes of all requests in flight.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Queues a request. [`Ring::submit`] starts it.
    ///
    /// # Errors
    /// Returns the request if the ring is full, or if the request has too many pieces.
    pub fn push(&mut self, op: Op, pieces: Pieces, request: T) -> Result<(), (Pieces, T)> {
        let iovecs = pieces.iovecs();
        let count = u32::try_from(iovecs.len()).unwrap_or(u32::MAX);
        if count > PIECES_MAX {
            return Err((pieces, request));
        }
        let start = iovecs.as_ptr();
        let Some(slot) = self.free.pop() else {
            return Err((pieces, request));
        };
        let fd = types::Fd(self.file.as_raw_fd());
        let entry = match op {
            Op::Read(offset) => opcode::Readv::new(fd, start, count).offset(offset).build(),
            Op::Write(offset) => opcode::Writev::new(fd, start, count).offset(offset).build(),
        };
        let entry = entry.user_data(slot as u64);
        // SAFETY: the file is open as long as the ring. The pieces are mapped RAM, and their list
        // is on the heap. The slot keeps both until the kernel reports the end of the request.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            self.free.push(slot);
            return Err((pieces, request));
        }
        self.bytes += pieces.len();
        self.slots[slot] = Some((op, pieces, request));
        Ok(())
    }

    /// Starts the requests that were pushed.
    ///
    /// # Errors
    /// Fails if io_uring_enter(2) fails. Requests that have not started stay queued.
    pub fn submit(&mut self) -> io::Result<()> {
        while self.has_unsubmitted() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether there are requests that were pushed and have not started.
    pub fn has_unsubmitted(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Takes a request that has ended, if there is one. Does not wait.
    pub fn reap(&mut self) -> Option<Ended<T>> {
        let entry = self.ring.completion().next()?;
        let slot = usize::try_from(entry.user_data()).ok()?;
        let (op, pieces, request) = self.slots.get_mut(slot)?.take()?;
        if let Op::Read(_) = op {
            pieces.wrote(pieces.len());
        }
        self.free.push(slot);
        self.bytes -= pieces.len();
        Some((pieces, request, result(&entry)))
    }

    /// Starts the requests that were pushed, and waits until one has ended. Returns at once if no
    /// request is in flight, and early for a signal.
    ///
    /// # Errors
    /// Fails if io_uring_enter(2) fails for another reason than a signal.
    pub fn wait(&mut self) -> io::Result<()> {
        if self.in_flight() == 0 {
            return Ok(());
        }
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Ends all requests, and returns those that had started. Cancels the requests that the kernel
    /// has not begun, and waits for the others; if the host refuses to wait, tries again. Drops the
    /// requests that were pushed and never started.
    pub fn stop(mut self) -> Vec<Ended<T>> {
        self.end()
    }

    fn end(&mut self) -> Vec<Ended<T>> {
        let unsubmitted = self.ring.submission().len();
        let mut ended = Vec::new();
        if self.in_flight() > unsubmitted {
            // Needs Linux 6.0. Its result is not needed: each request reports its own end.
            let (all, now) = (CancelBuilder::any(), Timespec::new());
            let _ = self.ring.submitter().register_sync_cancel(Some(now), all);
        }
        while self.in_flight() > unsubmitted {
            match self.reap() {
                Some(end) => ended.push(end),
                None if self.wait_for_end().is_err() => sleep(RETRY),
                None => {}
            }
        }
        ended
    }

    /// Waits until a request has ended. Starts no request.
    fn wait_for_end(&self) -> io::Result<()> {
        let flags = EnterFlags::GETEVENTS.bits();
        // SAFETY: the call submits no entry and passes no argument; the kernel only waits.
        unsafe { self.ring.submitter().enter::<()>(0, 1, flags, None) }?;
        Ok(())
    }
}

fn result(entry: &cqueue::Entry) -> io::Result<usize> {
    usize::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()))
}

/// Waits for all requests, because the kernel may write to their buffers until they have ended.
impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        self.end();
    }
}

// The unit tests for riscv64 run in user-mode emulation, which has no io_uring. Integration tests
// cover it there.
#[cfg(all(test, not(target_arch = "riscv64")))]
mod tests {
    use super::*;
    use crate::config::MemConfig;
    use crate::memory;
    use crate::util::ByteSize;
    use std::io::Write;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;
    use vm_memory::GuestAddress;

    const BASE: GuestAddress = GuestAddress(0x8000_0000);

    fn pieces(bytes: &[u8]) -> Pieces {
        let ram = memory::create(
            BASE,
            MemConfig::new(ByteSize::mib(1)),
            memory::Backing::Private,
        )
        .unwrap();
        let mut pieces = Pieces::of(&memory::FlatRam::of(&ram));
        pieces.push(BASE, bytes.len()).unwrap();
        pieces.copy_from(bytes);
        pieces
    }

    fn ring(content: &[u8]) -> (Ring<char>, File, EventFd) {
        let fd = rustix::fs::memfd_create("ring", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.write_all_at(content, 0).unwrap();
        let ended = EventFd::new(0).unwrap();
        let ring = Ring::new(2, Arc::new(file.try_clone().unwrap()), &ended).unwrap();
        (ring, file, ended)
    }

    #[test]
    fn requests_come_back_with_their_bytes() {
        let (mut ring, file, ended) = ring(b"0123456789");
        ring.push(Op::Read(3), pieces(b"...."), 'r').ok().unwrap();
        ring.push(Op::Write(20), pieces(b"abc"), 'w').ok().unwrap();
        let (_, full) = ring.push(Op::Read(0), pieces(b"."), 'f').err().unwrap();
        assert_eq!(full, 'f');
        ring.submit().unwrap();
        let mut ends = Vec::new();
        while ring.in_flight() > 0 {
            ended.read().unwrap();
            while let Some((pieces, request, result)) = ring.reap() {
                let mut bytes = vec![0; pieces.len()];
                pieces.copy_to(&mut bytes);
                ends.push((request, bytes, result.unwrap()));
            }
        }
        ends.sort();
        assert_eq!(
            ends,
            [('r', b"3456".to_vec(), 4), ('w', b"abc".to_vec(), 3)]
        );
        let mut written = [0; 3];
        file.read_exact_at(&mut written, 20).unwrap();
        assert_eq!(&written, b"abc");
        ring.push(Op::Read(99), pieces(b"."), 'e').ok().unwrap();
        ring.wait().unwrap();
        assert_eq!(
            ring.reap().unwrap().2.unwrap(),
            0,
            "the file ends before the offset"
        );
    }

    /// A read's pages are marked when the request comes back, whatever its result. A write to the
    /// file marks none.
    #[test]
    fn what_is_read_is_marked() {
        let (mut ring, ..) = ring(b"0123456789");
        let ram = memory::create(
            BASE,
            MemConfig::new(ByteSize::mib(1)),
            memory::Backing::Private,
        )
        .unwrap();
        let log = memory::dirty_log(&ram);
        log.start().unwrap();
        let piece = |page: u64, length| {
            let mut pieces = Pieces::of(&memory::FlatRam::of(&ram));
            let at = GuestAddress(BASE.0 + page * memory::PAGE_SIZE);
            pieces.push(at, length).unwrap();
            pieces
        };
        ring.push(Op::Read(0), piece(3, 4097), 'r').ok().unwrap();
        ring.push(Op::Write(20), piece(9, 3), 'w').ok().unwrap();
        while ring.in_flight() > 0 {
            ring.wait().unwrap();
            while ring.reap().is_some() {}
        }
        assert_eq!(memory::pages_of(&log.take()).collect::<Vec<_>>(), [3, 4]);
        ring.push(Op::Read(0), piece(7, 1), 'r').ok().unwrap();
        ring.submit().unwrap();
        ring.stop();
        assert_eq!(memory::pages_of(&log.take()).collect::<Vec<_>>(), [7]);
    }

    #[test]
    fn a_ring_that_goes_waits_for_its_requests() {
        let (mut ring, ..) = ring(&[7; 100]);
        ring.push(Op::Read(0), pieces(&[0; 100]), 'r').ok().unwrap();
        drop(ring);
    }

    /// A ring on a socket. A read waits until the test writes to the other end.
    fn slow_ring() -> (Ring<char>, UnixStream) {
        let (reader, writer) = UnixStream::pair().unwrap();
        let ended = EventFd::new(0).unwrap();
        let reader = Arc::new(File::from(OwnedFd::from(reader)));
        (Ring::new(2, reader, &ended).unwrap(), writer)
    }

    #[test]
    fn a_ring_that_stops_cancels_what_has_not_begun() {
        let (mut ring, _writer) = slow_ring();
        ring.push(Op::Read(0), pieces(b"."), 'r').ok().unwrap();
        ring.submit().unwrap();
        ring.push(Op::Read(0), pieces(b"."), 'u').ok().unwrap();
        let ended = ring.stop();
        let [(_, 'r', Err(error))] = ended.as_slice() else {
            panic!("only the submitted request ends, and it is cancelled")
        };
        assert_eq!(error.raw_os_error(), Some(libc::ECANCELED));
    }

    /// For a while another file takes the place of the ring's descriptor, so that the kernel
    /// refuses to cancel and to wait.
    #[test]
    fn a_ring_that_cannot_wait_does_not_give_up() {
        let (mut ring, mut writer) = slow_ring();
        let buffer = pieces(b".");
        ring.push(Op::Read(0), buffer.clone(), 'r').ok().unwrap();
        ring.submit().unwrap();
        let fd = ring.ring.as_raw_fd();
        // SAFETY: these are the test's own descriptors, and it puts them back.
        let kept = unsafe { libc::dup(fd) };
        // SAFETY: as above.
        assert_eq!(unsafe { libc::dup2(writer.as_raw_fd(), fd) }, fd);
        assert!(ring.wait().is_err() && ring.wait_for_end().is_err());
        let late = std::thread::spawn(move || writer.write_all(b"x").unwrap());
        let ended = ring.end();
        late.join().unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { libc::dup2(kept, fd) }, fd);
        // SAFETY: as above.
        unsafe { libc::close(kept) };
        let [(_, 'r', Ok(1))] = ended.as_slice() else {
            panic!("the request has ended")
        };
        let mut byte = [0];
        buffer.copy_to(&mut byte);
        assert_eq!(&byte, b"x");
    }
}
