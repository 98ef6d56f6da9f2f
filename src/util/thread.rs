//! Starts all of rvmm's threads.

use std::fs;
use std::io;
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};

use super::signal::Blocked;

/// The purpose of a thread. It is the first part of the thread's name. A sandbox could be chosen by
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Runs one vCPU.
    Vcpu,
    /// Writes a console's output.
    Console,
    /// Serves a disk's requests.
    Disk,
    /// Moves a network interface's packets.
    Net,
    /// Serves another virtio device.
    Virtio,
    /// Does work that would hold up the main loop, or makes sure that rvmm ends.
    Main,
    /// Starts and stops virtio devices.
    Devices,
}

impl Kind {
    fn prefix(self) -> &'static str {
        match self {
            Kind::Vcpu => "vcpu",
            Kind::Console => "console",
            Kind::Disk => "disk",
            Kind::Net => "net",
            Kind::Virtio => "virtio",
            Kind::Main => "main",
            Kind::Devices => "devices",
        }
    }
}

/// Starts a thread with the name `<kind>-<name>`, of which Linux shows the first 15 bytes. The
/// thread blocks all signals, because the main thread handles them.
///
/// # Errors
/// Fails if the host has no resources for another thread.
pub fn spawn<T, F>(kind: Kind, name: &str, body: F) -> io::Result<JoinHandle<T>>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let _blocked = Blocked::all();
    Builder::new()
        .name(format!("{}-{name}", kind.prefix()))
        .spawn(body)
}

/// As [`spawn`], for a thread that ends before `scope` does. It may borrow what lives that long.
///
/// # Errors
/// As for [`spawn`].
pub fn spawn_scoped<'scope, T, F>(
    scope: &'scope Scope<'scope, '_>,
    kind: Kind,
    name: &str,
    body: F,
) -> io::Result<ScopedJoinHandle<'scope, T>>
where
    T: Send + 'scope,
    F: FnOnce() -> T + Send + 'scope,
{
    let name = format!("{}-{name}", kind.prefix());
    let _blocked = Blocked::all();
    Builder::new().name(name).spawn_scoped(scope, body)
}

/// Whether the thread of this process with the id `thread` sleeps in a system call that a signal
/// interrupts (state S of proc_pid_stat(5)). False if there is no such thread.
pub fn is_asleep(thread: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat"));
    // The name of the thread, in parentheses, may have any characters.
    stat.is_ok_and(|stat| {
        stat.rsplit(") ")
            .next()
            .unwrap_or_default()
            .starts_with('S')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_carries_its_name() {
        let thread = spawn(Kind::Vcpu, "0", || {
            std::thread::current().name().map(str::to_owned)
        });
        assert_eq!(thread.unwrap().join().unwrap().as_deref(), Some("vcpu-0"));
    }

    #[test]
    fn a_thread_sleeps_or_does_not() {
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        assert!(!is_asleep(own), "this thread runs");
        assert!(!is_asleep(0));
        let (send, receive) = std::sync::mpsc::channel();
        let (wait, waits) = std::sync::mpsc::channel::<()>();
        let thread = spawn(Kind::Vcpu, "a) R b", move || {
            send.send(rustix::thread::gettid().as_raw_nonzero().get())
                .unwrap();
            waits.recv().unwrap_err();
        });
        let id = receive.recv().unwrap();
        while !is_asleep(id) {
            std::thread::yield_now();
        }
        drop(wait);
        thread.unwrap().join().unwrap();
    }
}
