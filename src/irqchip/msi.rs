//! Message-signalled interrupts that the kernel delivers: each has an eventfd (irqfd), and a route
//! to an IMSIC.
//!
//! KVM can only replace its whole table of routes, and waits until all vCPUs have seen the new one.
//! So rvmm keeps the table here, and passes it to KVM only when a message has changed.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use rustix::event::PollFlags;
use vmm_sys_util::eventfd::EventFd;

use crate::hypervisor::{self, MSI_ROUTES_MAX, MsiMessage, Vm};
use crate::util::poll::{borrow, poll_now};
use crate::util::sync::lock;
use crate::util::{RateLimit, guest_warn};

/// The routes of one machine.
pub struct MsiRouter {
    vm: Arc<dyn Vm>,
    table: Mutex<Table>,
    failures: RateLimit,
}

#[derive(Default)]
struct Table {
    /// The message of each interrupt number in use. `None` if it was never connected.
    routes: BTreeMap<u32, Option<MsiMessage>>,
    /// Whether KVM does not have the current routes yet.
    changed: bool,
}

impl MsiRouter {
    /// A router without interrupts, for a machine with an in-kernel AIA.
    pub fn new(vm: Arc<dyn Vm>) -> Arc<Self> {
        Arc::new(Self {
            vm,
            table: Mutex::default(),
            failures: RateLimit::named("messages"),
        })
    }

    /// Creates an interrupt with an eventfd and an interrupt number of its own.
    ///
    /// # Errors
    /// Fails if the host has no free descriptors, or KVM no free interrupt numbers.
    pub fn vector(self: &Arc<Self>) -> io::Result<MsiVector> {
        let signal = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?;
        let mut table = lock(&self.table);
        let free = (0..MSI_ROUTES_MAX).find(|number| !table.routes.contains_key(number));
        let number = free.ok_or_else(|| io::Error::other("KVM has no interrupt numbers left"))?;
        table.routes.insert(number, None);
        Ok(MsiVector {
            router: Arc::clone(self),
            number,
            signal,
            connected: false,
        })
    }

    /// Connects each vector to its message. Changes the kernel's table at most once. Logs a
    /// failure.
    pub fn connect<'a>(&self, vectors: impl IntoIterator<Item = (&'a mut MsiVector, MsiMessage)>) {
        let vectors: Vec<_> = vectors.into_iter().collect();
        let mut table = lock(&self.table);
        for (vector, message) in &vectors {
            let route = table.routes.insert(vector.number, Some(*message));
            table.changed |= route != Some(Some(*message));
        }
        if table.changed {
            match self.vm.set_msi_routes(&table.routes()) {
                Ok(()) => table.changed = false,
                Err(error) => return self.failed(&error),
            }
        }
        for (vector, _) in vectors {
            if !vector.connected {
                match self.vm.connect_irqfd(vector.number, &vector.signal) {
                    Ok(()) => vector.connected = true,
                    Err(error) => self.failed(&error),
                }
            }
        }
    }

    fn failed(&self, error: &hypervisor::Error) {
        let cause = std::error::Error::source(error);
        guest_warn!(self.failures, "{error}: {cause:?}");
    }
}

impl Table {
    fn routes(&self) -> Vec<(u32, MsiMessage)> {
        let routes = self.routes.iter();
        routes
            .filter_map(|(number, route)| Some((*number, (*route)?)))
            .collect()
    }
}

/// One message-signalled interrupt.
pub struct MsiVector {
    router: Arc<MsiRouter>,
    number: u32,
    signal: EventFd,
    connected: bool,
}

impl MsiVector {
    /// Raises the interrupt. It stays pending while the vector is not connected.
    pub fn signal(&self) {
        // This fails only if the eventfd's counter is at its maximum; the interrupt is pending
        // then.
        let _ = self.signal.write(1);
    }

    /// The vector's eventfd. To signal it is the same as [`MsiVector::signal`].
    ///
    /// # Errors
    /// Fails if the host has no free descriptors.
    pub fn descriptor(&self) -> io::Result<EventFd> {
        self.signal.try_clone()
    }

    /// Disconnects the vector: from now on, its signals stay pending. Its route stays in the table,
    /// so the table does not change if the vector is connected again with the same message.
    pub fn disconnect(&mut self) {
        if std::mem::take(&mut self.connected) {
            let router = &self.router;
            if let Err(error) = router.vm.disconnect_irqfd(self.number, &self.signal) {
                router.failed(&error);
            }
        }
    }

    /// Whether there is a signal that waits until the vector is connected.
    pub fn is_pending(&self) -> bool {
        !self.connected && poll_now(borrow(&self.signal), PollFlags::IN).contains(PollFlags::IN)
    }
}

impl Drop for MsiVector {
    fn drop(&mut self) {
        self.disconnect();
        lock(&self.router.table).routes.remove(&self.number);
    }
}

#[cfg(test)]
pub(crate) mod tests;
