//! Starts all of rvmm's threads.

use std::io;
use std::thread::{Builder, JoinHandle, Scope, ScopedJoinHandle};

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

/// Starts a thread with the name `<kind>-<name>`, of which Linux shows the first 15 bytes.
///
/// # Errors
/// Fails if the host has no resources for another thread.
pub fn spawn<T, F>(kind: Kind, name: &str, body: F) -> io::Result<JoinHandle<T>>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
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
    Builder::new().name(name).spawn_scoped(scope, body)
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
}
