//! What the machine's own thread does while the guest runs: it waits for events, gives memory
//! back, and kicks vCPUs where the host makes that necessary.

use std::time::{Duration, Instant};

use anyhow::Result;
use log::debug;

use super::Deadline;
use super::mainloop::{Event, MainLoop};
use crate::util::text;
use crate::vcpu::restart::{ALL_OF_LOOKS, KICK_EVERY, LOOK_EVERY};
use crate::vcpu::thread::VcpuHandle;

/// After this time the code that only starting needed is given back: a machine that has run for so
/// long may run for longer.
const SETTLED: Duration = Duration::from_millis(500);

/// What one life of a machine has to have done, and when.
pub(super) struct Meantime {
    /// When code is given back; none when it is.
    settles: Option<Instant>,
    /// When vCPUs are looked at next, and how often they have been.
    looks: Option<Instant>,
    looked: u32,
}

/// Of a life that begins now.
impl Default for Meantime {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            settles: now.checked_add(SETTLED),
            looks: now.checked_add(LOOK_EVERY),
            looked: 0,
        }
    }
}

impl Meantime {
    /// Waits for an event while `vcpus` run; none when the time of `deadline` is over.
    ///
    /// # Errors
    /// The host cannot wait.
    // Not a part of its caller, whose code is given back while this waits (resources/link/order.t).
    #[inline(never)]
    pub(super) fn next_event(
        &mut self,
        main: &mut MainLoop,
        vcpus: &[VcpuHandle],
        deadline: &Deadline,
    ) -> Result<Option<Event>> {
        loop {
            let time = deadline.left().min(self.next_act(vcpus));
            match main.next(time)? {
                _ if deadline.left().is_zero() => return Ok(None),
                None => self.act(vcpus),
                Some(event) => {
                    // Events may come without a pause.
                    self.act(vcpus);
                    return Ok(Some(event));
                }
            }
        }
    }

    /// The time until [`Meantime::act`] has something to do.
    fn next_act(&self, vcpus: &[VcpuHandle]) -> Duration {
        if vcpus.iter().any(VcpuHandle::wants_kick) {
            return KICK_EVERY;
        }
        let looks = self.looks.filter(|_| must_look(vcpus));
        let now = Instant::now();
        let times = self.settles.into_iter().chain(looks);
        let next = times.map(|time| time.saturating_duration_since(now)).min();
        next.unwrap_or(Duration::MAX)
    }

    fn act(&mut self, vcpus: &[VcpuHandle]) {
        let now = Instant::now();
        if self.settles.is_some_and(|time| time <= now) {
            self.settles = None;
            if let Err(error) = text::release() {
                debug!("the code that only starting needed stays in memory: {error}");
            }
        }
        let looks = must_look(vcpus) && self.looks.is_some_and(|time| time <= now);
        if looks {
            self.looks = now.checked_add(LOOK_EVERY);
            self.looked = self.looked.wrapping_add(1);
        }
        let all = self.looked % ALL_OF_LOOKS == 0;
        for vcpu in vcpus {
            if vcpu.wants_kick() || (looks && (all || vcpu.may_have_stopped())) {
                vcpu.kick();
            }
        }
    }
}

/// Whether harts of `vcpus` may stop and start unseen. Nobody starts a hart that is alone.
fn must_look(vcpus: &[VcpuHandle]) -> bool {
    vcpus.len() > 1 && vcpus.iter().any(VcpuHandle::follows_restarts)
}
