//! The console on standard input and output.

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

/// Standard input, which other programs may read too: each read is one that cannot wait, whoever took
/// what woke rvmm.
struct Stdin {
    kind: Kind,
    is_terminal: bool,
}

enum Kind {
    /// It is opened once more, non-blocking: that flag on standard input itself would be other programs' too.
    Own(File),
    /// A socket has reads that do not wait.
    Socket,
    /// It cannot be opened again: another user's terminal, after su(1).
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
        // A file's second opening would begin at its first byte.
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
        // What was typed meanwhile may be another's.
        if terminal::in_background() {
            return Err(Errno::AGAIN);
        }
        match self.read_now(buffer) {
            Err(Errno::IO) if terminal::in_background() => Err(Errno::AGAIN),
            result => result,
        }
    }
}
