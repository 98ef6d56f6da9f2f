//! What the machine's own thread does while the guest runs: it waits for events, gives memory
//! back, and kicks vCPUs where the host makes that necessary.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use log::debug;

use super::{Deadline, Event};
use crate::util::text;
use crate::vcpu::restart::{ALL_OF_LOOKS, KICK_EVERY, LOOK_EVERY};
use crate::vcpu::thread::VcpuHandle;

/// After this time the code that only starting needed is given back: a machine that has run for so
/// long may run for longer.
const SETTLED: Duration = Duration::from_millis(500);

/// One life of a machine, seen from its own thread.
pub(super) struct Meantime<'a> {
    vcpus: &'a [VcpuHandle],
    /// When code is given back; none when it is.
    settles: Option<Instant>,
    /// When vCPUs are looked at next, and how often they have been.
    looks: Option<Instant>,
    looked: u32,
}

impl<'a> Meantime<'a> {
    /// Of a life of `vcpus` that begins now.
    pub(super) fn of(vcpus: &'a [VcpuHandle]) -> Self {
        let now = Instant::now();
        Self {
            vcpus,
            settles: now.checked_add(SETTLED),
            looks: now.checked_add(LOOK_EVERY),
            looked: 0,
        }
    }

    /// Waits for an event; none when the time of `deadline` is over.
    pub(super) fn next_event(
        &mut self,
        events: &Receiver<Event>,
        deadline: &Deadline,
    ) -> Option<Event> {
        loop {
            let patience = deadline.left();
            match events.recv_timeout(patience.min(self.next_act())) {
                Err(RecvTimeoutError::Timeout) if !deadline.left().is_zero() => self.act(),
                event => return event.ok(),
            }
        }
    }

    /// The time until [`Meantime::act`] has something to do.
    fn next_act(&self) -> Duration {
        if self.vcpus.iter().any(VcpuHandle::wants_kick) {
            return KICK_EVERY;
        }
        let looks = self.looks.filter(|_| self.must_look());
        let now = Instant::now();
        let times = self.settles.into_iter().chain(looks);
        let next = times.map(|time| time.saturating_duration_since(now)).min();
        next.unwrap_or(Duration::MAX)
    }

    /// Whether harts of this machine may stop and start unseen. Nobody starts a hart that is alone.
    fn must_look(&self) -> bool {
        self.vcpus.len() > 1 && self.vcpus.iter().any(VcpuHandle::follows_restarts)
    }

    fn act(&mut self) {
        let now = Instant::now();
        if self.settles.is_some_and(|time| time <= now) {
            self.settles = None;
            if let Err(error) = text::release() {
                debug!("the code that only starting needed stays in memory: {error}");
            }
        }
        let looks = self.must_look() && self.looks.is_some_and(|time| time <= now);
        if looks {
            self.looks = now.checked_add(LOOK_EVERY);
            self.looked = self.looked.wrapping_add(1);
        }
        let all = self.looked % ALL_OF_LOOKS == 0;
        for vcpu in self.vcpus {
            if vcpu.wants_kick() || (looks && (all || vcpu.may_have_stopped())) {
                vcpu.kick();
            }
        }
    }
}
