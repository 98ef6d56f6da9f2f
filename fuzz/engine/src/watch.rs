//! A child process fuzzes, and its parent watches it. The input is in memory that both share. So
//! the parent has it however the child ends: by a panic, a signal, the end of stack or memory, or
//! an endless loop.

use std::fs;
use std::path::Path;

use crate::fuzzer;
use crate::options::Options;

/// The exit status if something was found, as in libFuzzer.
const FOUND: i32 = 77;

/// The most bytes that are printed in hex.
const PRINTED_MAX: usize = 1024;

/// The last input.
pub(crate) struct Input {
    start: *mut u8,
    room: usize,
}

/// The header of the shared memory: the number of bytes.
const HEADER: usize = size_of::<usize>();

impl Input {
    /// Memory that a child shares.
    fn new(room: usize) -> Self {
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                room + HEADER,
                protection,
                flags,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED, "no memory for an input");
        Self {
            start: start.cast(),
            room,
        }
    }

    /// Stores the input that runs next.
    pub(crate) fn set(&mut self, input: &[u8]) {
        let length = input.len().min(self.room);
        // SAFETY: the mapping has room for both, is aligned, and the other process reads it only
        // when this one is dead.
        unsafe {
            self.start.cast::<usize>().write_volatile(length);
            std::ptr::copy_nonoverlapping(input.as_ptr(), self.start.add(HEADER), length);
        }
    }

    fn get(&self) -> &[u8] {
        // SAFETY: the mapping has that many bytes, and the process that wrote them is dead.
        unsafe {
            let length = self.start.cast::<usize>().read_volatile().min(self.room);
            std::slice::from_raw_parts(self.start.add(HEADER), length)
        }
    }
}

/// Runs `work` in a child, and reports an abnormal end. Returns an exit status.
pub(crate) fn run(options: &Options, work: impl FnOnce(&mut Input)) -> i32 {
    // A file that is run again may be longer than the inputs made here.
    let mut input = Input::new(options.max_len.max(1 << 20));
    // SAFETY: there is only one thread, and the child continues like this process.
    let child = unsafe { libc::fork() };
    match child {
        -1 => {
            eprintln!(
                "Failed to start a child: {}",
                std::io::Error::last_os_error()
            );
            123
        }
        0 => {
            limit(options);
            work(&mut input);
            0
        }
        _ => {
            let mut status = 0;
            // SAFETY: the child belongs to this process, and the status is a local variable.
            while unsafe { libc::waitpid(child, &mut status, 0) } == -1 {}
            match how_it_ended(status, options) {
                Ok(status) => status,
                Err(how) => report(&how, input.get(), options),
            }
        }
    }
}

/// Sets the child's limits: memory, no core file, and an end with its parent.
fn limit(options: &Options) {
    let set = |what, bytes| {
        let limit = libc::rlimit {
            rlim_cur: bytes,
            rlim_max: bytes,
        };
        // SAFETY: the limit is fully initialized.
        unsafe { libc::setrlimit(what, &limit) };
    };
    set(libc::RLIMIT_CORE, 0);
    set(
        libc::RLIMIT_AS,
        options.rss_limit_mb.saturating_mul(1 << 20),
    );
    // SAFETY: it sets an attribute of this process.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// The exit status, if the child ended by itself; otherwise the cause of its end.
fn how_it_ended(status: i32, options: &Options) -> Result<i32, String> {
    if libc::WIFEXITED(status) {
        return match libc::WEXITSTATUS(status) {
            known @ (0 | 123 | 125) => Ok(known),
            other => Err(format!("the target exited with status {other}")),
        };
    }
    match libc::WTERMSIG(status) {
        libc::SIGALRM => Err(format!("it took more than {} s", options.timeout)),
        // The user ended it.
        signal @ (libc::SIGTERM | libc::SIGINT | libc::SIGHUP) => Ok(128 + signal),
        libc::SIGABRT => Err("it panicked, or was aborted: see above".into()),
        signal => Err(format!("signal {signal} ended it")),
    }
}

fn report(how: &str, input: &[u8], options: &Options) -> i32 {
    eprintln!("FOUND: {how}");
    eprintln!("the input has {} bytes", input.len());
    if input.len() <= PRINTED_MAX {
        eprint!("in hex: ");
        input.iter().for_each(|byte| eprint!("{byte:02x}"));
        eprintln!();
        eprintln!("as text: \"{}\"", input.escape_ascii());
    }
    let path = format!(
        "{}crash-{:016x}",
        options.artifact_prefix,
        fuzzer::hash(input)
    );
    match fs::write(Path::new(&path), input) {
        Ok(()) => eprintln!("it is kept at {path}"),
        Err(error) => eprintln!("Failed to keep it at {path}: {error}"),
    }
    FOUND
}
