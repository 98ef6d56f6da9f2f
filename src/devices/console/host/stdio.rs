//! Connects a console to standard input and output.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSliceMut, IsTerminal};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::fd::AsFd;
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::{Errno, ReadWriteFlags, preadv2, read};
use rustix::net::{RecvFlags, recv};
use rustix::stdio::{stdin, stdout};

use super::input::{Source, Wait};
use super::{Ends, Sink};
use crate::devices::console::terminal;
use crate::util::output::write_whole;
use crate::util::poll::{poll_now, readable_now};

/// How often to check whether rvmm is in the foreground: a running job gets no signal when its
/// shell brings it to the foreground.
const LOOK: Duration = Duration::from_secs(1);

/// Standard output.
struct Stdout;

impl Sink for Stdout {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        write_whole(stdout(), bytes)
    }
}

/// Standard input. Other programs may read it too, and may take the bytes that woke rvmm. So rvmm
/// uses reads that do not block, where the kernel has them.
struct Stdin {
    kind: Kind,
    is_terminal: bool,
}

enum Kind {
    /// A terminal or a pipe, opened once more, non-blocking. Setting that flag on standard input
    /// itself would affect other programs too.
    Own(File),
    /// A socket: recv has a flag for reads that do not block.
    Socket,
    /// A pipe that cannot be opened again, such as another user's after su(1). A read can block
    /// only if others take bytes from it, and the kernel has no RWF_NOWAIT for pipes.
    SharedPipe,
    /// A file, a device, or a terminal that cannot be opened again.
    Plain,
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
    let is_pipe = what.as_ref().is_ok_and(FileTypeExt::is_fifo);
    let can_read = fcntl_getfl(stdin()).is_ok_and(|flags| !flags.contains(OFlags::WRONLY));
    if what.is_ok_and(|what| what.is_socket()) {
        return Kind::Socket;
    }
    // A file that is opened again would be read from its first byte, and a device might be another
    // device.
    if can_read && (is_pipe || is_terminal) {
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits();
        let flags = i32::try_from(flags).unwrap_or(0);
        let mut options = OpenOptions::new();
        if let Ok(file) = options.read(true).custom_flags(flags).open(STDIN) {
            return Kind::Own(file);
        }
    }
    if is_pipe {
        Kind::SharedPipe
    } else {
        Kind::Plain
    }
}

impl Stdin {
    fn read_now(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        match &self.kind {
            Kind::Own(file) => read(file, buffer),
            Kind::Socket => Ok(recv(stdin(), buffer, RecvFlags::DONTWAIT)?.0),
            Kind::SharedPipe | Kind::Plain if !readable_now(stdin()) => Err(Errno::AGAIN),
            Kind::SharedPipe => match read_without_waiting(buffer) {
                Err(Errno::OPNOTSUPP) => read(stdin(), buffer),
                result => result,
            },
            // Without RWF_NOWAIT: a file that is not in the page cache might give EAGAIN for ever.
            Kind::Plain => read(stdin(), buffer),
        }
    }
}

/// Reads from the pipe that standard input is.
fn read_without_waiting(buffer: &mut [u8]) -> Result<usize, Errno> {
    /// Where a pipe reads from.
    const HERE: u64 = u64::MAX;
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
            Kind::Socket | Kind::SharedPipe | Kind::Plain => stdin(),
        };
        // In the background, do not wait for it: it may be readable all the time because of input
        // for another program.
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
        // The input, and the terminal's mode, may be another program's.
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
