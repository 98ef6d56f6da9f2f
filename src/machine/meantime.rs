//! The work of the machine's main thread while the guest runs: it waits for events, releases the
//! memory of start-up code, kicks vCPUs on hosts that reset harts (`vcpu::restart`), and lets the
//! watcher look for harts that hang.

use std::time::{Duration, Instant};

use anyhow::Result;
use log::debug;

use super::Deadline;
use super::mainloop::{Event, MainLoop};
use super::watcher::Watcher;
use crate::util::text;
use crate::vcpu::restart::{ALL_OF_LOOKS, KICK_EVERY, LOOK_EVERY};
use crate::vcpu::thread::VcpuHandle;

/// After this time rvmm releases the memory of its start-up code. A machine that has run this long
/// will probably run much longer.
const SETTLED: Duration = Duration::from_millis(500);

/// Time between two tries to plant a debugger's breakpoints at addresses that no hart has mapped.
const REPLANT_EVERY: Duration = Duration::from_millis(20);

/// The timed work in one life of a machine, and when it is due. A life goes from the start or a
/// reset to the next reset or the end.
pub(super) struct Meantime {
    /// When to release code that is not needed any more, such as that of the start. None once it
    /// is released.
    settles: Option<Instant>,
    /// When the next look at the vCPUs is due: a kick that makes each vCPU check whether its hart
    /// was reset (`vcpu::restart`).
    looks: Option<Instant>,
    /// The number of looks so far.
    looked: u32,
    /// Finds harts that hang, if rvmm is to look for them.
    watcher: Option<Watcher>,
    /// When breakpoints are to be planted again, if they are.
    replants: Option<Instant>,
    /// What the watcher or another part has found last, until [`Meantime::next_event`] returns it.
    found: Option<Event>,
}

impl Meantime {
    /// The state for a life that begins now.
    pub(super) fn new(watcher: Option<Watcher>) -> Self {
        let now = Instant::now();
        Self {
            settles: now.checked_add(SETTLED),
            looks: now.checked_add(LOOK_EVERY),
            looked: 0,
            watcher,
            replants: None,
            found: None,
        }
    }

    /// Whether to look for breakpoints that are to be planted.
    pub(super) fn replants(&mut self, replants: bool) {
        self.replants = match self.replants {
            Some(time) if replants => Some(time),
            _ if replants => Instant::now().checked_add(REPLANT_EVERY),
            _ => None,
        };
    }

    /// Waits for an event while `vcpus` run. Returns none if `deadline` has passed.
    ///
    /// # Errors
    /// Fails if the main loop cannot wait for events.
    // Not inlined: the linker puts this function next to other code that a running guest needs
    // (resources/link/order.t). The caller's code is elsewhere, and is released while this function
    // waits.
    #[inline(never)]
    pub(super) fn next_event(
        &mut self,
        main: &mut MainLoop,
        vcpus: &[VcpuHandle],
        deadline: &Deadline,
    ) -> Result<Option<Event>> {
        loop {
            if let Some(found) = self.found.take() {
                return Ok(Some(found));
            }
            let time = deadline.left().min(self.next_act(vcpus));
            match main.next(time)? {
                _ if deadline.left().is_zero() => return Ok(None),
                None => self.act(vcpus),
                Some(event) => {
                    // Do the work here too: events may come so fast that no wait times out.
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
        let watches = self.watcher.as_ref().filter(|_| !vcpus.is_empty());
        let watches = watches.map(Watcher::due);
        let now = Instant::now();
        let times = self.settles.into_iter().chain(looks).chain(watches);
        let times = times.chain(self.replants);
        let next = times.map(|time| time.saturating_duration_since(now)).min();
        next.unwrap_or(Duration::MAX)
    }

    fn act(&mut self, vcpus: &[VcpuHandle]) {
        let now = Instant::now();
        if self.settles.is_some_and(|time| time <= now) {
            self.settles = None;
            if let Err(error) = text::release() {
                debug!("Failed to release the memory of start-up code: {error}");
            }
        }
        let looks = must_look(vcpus) && self.looks.is_some_and(|time| time <= now);
        if looks {
            self.looks = now.checked_add(LOOK_EVERY);
            self.looked = self.looked.wrapping_add(1);
        }
        let found = self.watcher.as_mut().and_then(|watcher| watcher.act(vcpus));
        if self.watcher.as_mut().is_some_and(Watcher::has_sampled) && self.settles.is_none() {
            // What takes samples is not needed for a while.
            self.settles = Some(now);
        }
        if let Some((hart, hang)) = found {
            self.found = Some(Event::Hangs(hart, hang));
        }
        if self.found.is_none() && self.replants.is_some_and(|time| time <= now) {
            self.replants = None;
            self.found = Some(Event::Replant);
        }
        let all = self.looked % ALL_OF_LOOKS == 0;
        for vcpu in vcpus {
            if vcpu.wants_kick() || (looks && (all || vcpu.may_have_stopped())) {
                vcpu.kick();
            }
        }
    }
}

/// Whether the vCPUs need looks: this host resets harts, and one hart can start another. A single
/// hart cannot be started again, because there is no other hart.
fn must_look(vcpus: &[VcpuHandle]) -> bool {
    vcpus.len() > 1 && vcpus.iter().any(VcpuHandle::follows_restarts)
}
