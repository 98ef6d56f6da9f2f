//! The guest's time while the guest is paused.
//!
//! The `time` CSR of a guest goes on while its vCPUs do not run. By default a resume sets it back:
//! for the guest, the pause has not happened.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::hypervisor::{Result, Vcpu, regs};
use crate::snapshot::TimeState;

/// What the guest's `time` does after a pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clock {
    /// It goes on where it was.
    #[default]
    Stop,
    /// It catches up: it is as if it had never stopped.
    Jump,
}

/// The guest's time when it was frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrozenTime {
    saved: TimeState,
    /// When that was, by the host's clock: nanoseconds since 1970.
    since_ns: u64,
    /// The time is that of another process, and KVM does not know it.
    is_restored: bool,
}

impl FrozenTime {
    /// The time of a snapshot, which was taken at `since_ns` by the host's clock.
    pub(super) fn of(saved: TimeState, since_ns: u64) -> Self {
        Self {
            saved,
            since_ns,
            is_restored: true,
        }
    }

    /// The time now. No vCPU may run.
    ///
    /// # Errors
    /// Fails if KVM cannot read a register.
    pub(super) fn read(vcpu: &dyn Vcpu) -> Result<Self> {
        Ok(Self {
            saved: TimeState {
                time: vcpu.reg(regs::TIMER_TIME)?.unwrap_or_default(),
                frequency: vcpu.reg(regs::TIMER_FREQUENCY)?.unwrap_or_default(),
            },
            since_ns: host_ns(),
            is_restored: false,
        })
    }

    /// The time to save, and when it was, by the host's clock: nanoseconds since 1970.
    pub(super) fn saved(&self) -> (TimeState, u64) {
        (self.saved, self.since_ns)
    }

    /// Sets the guest's time for its resume. To be called for one vCPU, right before the first one
    /// runs: KVM has one time for the VM.
    ///
    /// # Errors
    /// Fails if KVM cannot write the register.
    pub(super) fn thaw(&self, vcpu: &dyn Vcpu, clock: Clock) -> Result<()> {
        match self.at(clock, host_ns()) {
            Some(time) => vcpu.set_reg(regs::TIMER_TIME, time),
            None => Ok(()),
        }
    }

    /// The guest's time to set if the host's clock shows `now`. None if KVM's is right.
    fn at(&self, clock: Clock, now: u64) -> Option<u64> {
        let TimeState { time, frequency } = self.saved;
        match clock {
            Clock::Stop => Some(time),
            Clock::Jump if !self.is_restored => None,
            Clock::Jump => {
                // A clock that was set back does not set the guest back.
                let passed = u128::from(now.saturating_sub(self.since_ns));
                let ticks = passed * u128::from(frequency) / 1_000_000_000;
                Some(time.saturating_add(u64::try_from(ticks).unwrap_or(u64::MAX)))
            }
        }
    }
}

/// The host's clock: nanoseconds since 1970.
pub(super) fn host_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::fake::FakeVcpu;

    const SAVED: TimeState = TimeState {
        time: 5_000,
        frequency: 10_000_000,
    };

    #[test]
    fn a_restored_time_stops_or_jumps() {
        let frozen = FrozenTime::of(SAVED, 1_000_000_000);
        assert_eq!(frozen.at(Clock::Stop, 9_000_000_000), Some(5_000));
        assert_eq!(frozen.at(Clock::Jump, 3_000_000_000), Some(20_005_000));
        assert_eq!(frozen.at(Clock::Jump, 0), Some(5_000));
        assert_eq!(
            frozen.at(Clock::Jump, u64::MAX),
            Some(184_467_440_727_100_516)
        );
    }

    #[test]
    fn a_pause_sets_the_time_back_or_leaves_it() {
        let values = [(regs::TIMER_TIME, 7), (regs::TIMER_FREQUENCY, 10)];
        let vcpu = FakeVcpu::with(&values);
        let frozen = FrozenTime::read(&vcpu).unwrap();
        let now = |time| {
            vcpu.set_reg(regs::TIMER_TIME, 99).unwrap();
            frozen.thaw(&vcpu, time).unwrap();
            vcpu.get(regs::TIMER_TIME)
        };
        assert_eq!(now(Clock::Stop), 7);
        assert_eq!(now(Clock::Jump), 99);
        assert_eq!(frozen.saved().0.frequency, 10);
    }
}
