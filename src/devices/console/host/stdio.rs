//! Connects a console to standard input and output.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;
use std::time::Duration;

use rustix::fd::AsFd;
use rustix::fs::OFlags;
use rustix::io::{Errno, read};
use rustix::net::{RecvFlags, recv};
use rustix::stdio::{stdin, stdout};

use super::input::{Source, Wait};
use super::{Ends, Sink};
use crate::devices::console::terminal;
use crate::util::output::write_whole;
use crate::util::poll::readable_now;

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

/// Standard input. Other programs may read it too, and may take the bytes that woke rvmm. So no
/// read may block.
struct Stdin {
    kind: Kind,
    is_terminal: bool,
}

enum Kind {
    /// Opened once more, non-blocking. Setting that flag on standard input itself would affect
    /// other programs too.
    Own(File),
    /// A socket: recv has a flag for reads that do not block.
    Socket,
    /// It cannot be opened again, such as another user's terminal after su(1), or a regular file.
    Shared,
}

/// Standard output and input.
pub(super) fn open() -> Ends {
    let is_terminal = io::stdin().is_terminal();
    let source = Stdin {
        kind: kind(),
        is_terminal,
    };
    Ends {
        sink: Arc::new(Stdout),
        source: Some(Box::new(source)),
    }
}

fn kind() -> Kind {
    const STDIN: &str = "/proc/self/fd/0";
    let what = fs::metadata(STDIN).map(|there| there.file_type());
    match what {
        Ok(what) if what.is_socket() => Kind::Socket,
        // A file that is opened again would be read from its first byte.
        Ok(what) if what.is_file() => Kind::Shared,
        _ => {
            let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits();
            let flags = i32::try_from(flags).unwrap_or(0);
            let opened = OpenOptions::new()
                .read(true)
                .custom_flags(flags)
                .open(STDIN);
            opened.map_or(Kind::Shared, Kind::Own)
        }
    }
}

impl Stdin {
    fn read_now(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        match &self.kind {
            Kind::Own(file) => read(file, buffer),
            Kind::Socket => Ok(recv(stdin(), buffer, RecvFlags::DONTWAIT)?.0),
            Kind::Shared if readable_now(stdin()) => read(stdin(), buffer),
            Kind::Shared => Err(Errno::AGAIN),
        }
    }
}

impl Source for Stdin {
    fn wait(&mut self) -> Wait<'_> {
        let fd = match &self.kind {
            Kind::Own(file) => file.as_fd(),
            Kind::Socket | Kind::Shared => stdin(),
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
        // The input may be for another program.
        if terminal::in_background() {
            return Err(Errno::AGAIN);
        }
        match self.read_now(buffer) {
            Err(Errno::IO) if terminal::in_background() => Err(Errno::AGAIN),
            result => result,
        }
    }
}
