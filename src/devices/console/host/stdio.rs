//! The console on standard input and output.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSliceMut, IsTerminal};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::fd::AsFd;
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::{Errno, ReadWriteFlags, preadv2, read};
use rustix::net::{RecvFlags, recv};
use rustix::stdio::{stdin, stdout};

use super::input::{Source, Wait};
use super::{Ends, Sink};
use crate::devices::console::terminal;
use crate::util::output::write_whole;
use crate::util::poll::{poll_now, readable_now};

/// How often to look whether rvmm has the terminal: a shell tells nobody that it brings a job that
/// runs to the foreground.
const LOOK: Duration = Duration::from_secs(1);

/// Standard output.
struct Stdout;

impl Sink for Stdout {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        write_whole(stdout(), bytes)
    }
}

/// Standard input. Other programs may read it too, and one of them may have taken what woke rvmm: where
/// the kernel has a read that does not wait, that is used.
struct Stdin {
    kind: Kind,
    is_terminal: bool,
}

enum Kind {
    /// A terminal or a pipe, opened once more, non-blocking: that flag on standard input itself would be other
    /// programs' too.
    Own(File),
    /// A socket has reads that do not wait.
    Socket,
    /// A file, and what cannot be opened again, such as another user's pipe after su(1). Only a pipe of which
    /// others take bytes, on a kernel without RWF_NOWAIT for it, can make a read wait.
    Shared,
}

/// Standard output and input.
pub(super) fn open() -> Ends {
    let is_terminal = io::stdin().is_terminal();
    let source = Stdin {
        kind: kind(is_terminal),
        is_terminal,
    };
    Ends {
        sink: Arc::new(Stdout),
        source: Some(Box::new(source)),
    }
}

fn kind(is_terminal: bool) -> Kind {
    const STDIN: &str = "/proc/self/fd/0";
    let what = fs::metadata(STDIN).map(|there| there.file_type());
    let can_read = fcntl_getfl(stdin()).is_ok_and(|flags| !flags.contains(OFlags::WRONLY));
    match what {
        Ok(what) if what.is_socket() => Kind::Socket,
        Ok(what) if can_read && (what.is_fifo() || is_terminal) => {
            let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits();
            let flags = i32::try_from(flags).unwrap_or(0);
            let mut options = OpenOptions::new();
            let opened = options.read(true).custom_flags(flags).open(STDIN);
            opened.map_or(Kind::Shared, Kind::Own)
        }
        // The second opening of a file would begin at its first byte, that of a device be another device.
        _ => Kind::Shared,
    }
}

impl Stdin {
    fn read_now(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        match &self.kind {
            Kind::Own(file) => read(file, buffer),
            Kind::Socket => Ok(recv(stdin(), buffer, RecvFlags::DONTWAIT)?.0),
            Kind::Shared if !readable_now(stdin()) => Err(Errno::AGAIN),
            Kind::Shared => match read_without_waiting(buffer) {
                Err(Errno::OPNOTSUPP) => read(stdin(), buffer),
                result => result,
            },
        }
    }
}

/// Of a pipe. A file whose bytes are not in memory would say EAGAIN again and again, and so has a plain read.
fn read_without_waiting(buffer: &mut [u8]) -> Result<usize, Errno> {
    /// Where a pipe reads from.
    const HERE: u64 = u64::MAX;
    let is_pipe =
        fstat(stdin()).is_ok_and(|there| FileType::from_raw_mode(there.st_mode) == FileType::Fifo);
    if !is_pipe {
        return Err(Errno::OPNOTSUPP);
    }
    preadv2(
        stdin(),
        &mut [IoSliceMut::new(buffer)],
        HERE,
        ReadWriteFlags::NOWAIT,
    )
}

impl Source for Stdin {
    fn wait(&mut self) -> Wait<'_> {
        let fd = match &self.kind {
            Kind::Own(file) => file.as_fd(),
            Kind::Socket | Kind::Shared => stdin(),
        };
        // In the background it may be readable all the time, by what is typed for another program.
        let may_read = !self.is_terminal || terminal::follow();
        Wait {
            fd: may_read.then_some(fd),
            time: self.is_terminal.then_some(LOOK),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Errno> {
        if !self.is_terminal {
            return self.read_now(buffer);
        }
        // What was typed meanwhile may be another's, and the mode too.
        if !terminal::follow() {
            return Err(Errno::AGAIN);
        }
        match self.read_now(buffer) {
            Err(Errno::IO) if terminal::in_background() => Err(Errno::AGAIN),
            // Nothing was there, unless the terminal is gone.
            Ok(0) if !poll_now(stdin(), PollFlags::IN).contains(PollFlags::HUP) => {
                Err(Errno::AGAIN)
            }
            result => result,
        }
    }
}
