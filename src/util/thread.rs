//! The one place where threads start.

use std::io;
use std::thread::{Builder, JoinHandle};

/// What a thread is for. Its name starts with this, and a sandbox can be chosen by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Runs one vCPU.
    Vcpu,
    /// Moves bytes between the console and the host.
    Console,
    /// Serves a disk's requests.
    Disk,
    /// Moves a network interface's packets.
    Net,
    /// Serves another virtio device.
    Virtio,
    /// Starts and stops virtio devices.
    Devices,
    /// Waits for an alarm of the guest's clock.
    Rtc,
    /// Waits for the process's signals.
    Signals,
}

impl Kind {
    fn prefix(self) -> &'static str {
        match self {
            Kind::Vcpu => "vcpu",
            Kind::Console => "console",
            Kind::Disk => "disk",
            Kind::Net => "net",
            Kind::Virtio => "virtio",
            Kind::Devices => "devices",
            Kind::Rtc => "rtc",
            Kind::Signals => "signals",
        }
    }
}

/// Starts a thread named `<kind>-<name>` (Linux shows the first 15 bytes).
///
/// # Errors
/// The host has no resources for another thread.
pub fn spawn<T, F>(kind: Kind, name: &str, body: F) -> io::Result<JoinHandle<T>>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    Builder::new()
        .name(format!("{}-{name}", kind.prefix()))
        .spawn(body)
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
