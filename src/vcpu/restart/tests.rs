//! A vCPU as KVM of Linux 7.x keeps it: resets wait for KVM_RUN.

use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use super::*;
use crate::hypervisor::{Counter, ExternalIrq, Kicker, RegId, Waiting};
use crate::util::sync::lock;

/// What the fake KVM knows of the vCPU.
#[derive(Default)]
struct State {
    stopped: bool,
    reset_waits: bool,
    scounteren: u64,
    /// `scounteren` at each entry into the guest.
    entered_with: Vec<u64>,
    /// Reads of the state after which another hart starts this one.
    starts_after: Option<u32>,
    /// KVM_RUNs of the stopped hart that a signal ends too early.
    early_signals: u32,
    /// Starts this hart while its reset is taken.
    starts_again: bool,
}

#[derive(Default)]
struct Fake(Mutex<State>);

impl Vcpu for Fake {
    fn run(&mut self, _: VmEntry) -> Result<VmExit> {
        let mut state = lock(&self.0);
        if state.early_signals > 0 {
            state.early_signals -= 1;
            return Ok(VmExit::Interrupted);
        }
        if std::mem::take(&mut state.starts_again) {
            state.stopped = false;
        }
        if std::mem::take(&mut state.reset_waits) {
            state.scounteren = 0;
        }
        if state.stopped {
            return Ok(VmExit::Interrupted);
        }
        let value = state.scounteren;
        state.entered_with.push(value);
        Ok(VmExit::Csr { number: 1 })
    }
    fn complete(&mut self, _: VmEntry) -> Result<()> {
        unreachable!("is not parked")
    }
    fn reg(&self, id: RegId) -> Result<Option<u64>> {
        assert_eq!(id, regs::SCOUNTEREN);
        Ok(Some(lock(&self.0).scounteren))
    }
    fn set_reg(&self, id: RegId, value: u64) -> Result<()> {
        assert_eq!(id, regs::SCOUNTEREN);
        lock(&self.0).scounteren = value;
        Ok(())
    }
    fn hart_state(&self) -> Result<HartState> {
        let mut state = lock(&self.0);
        match &mut state.starts_after {
            Some(0) => {
                state.starts_after = None;
                state.stopped = false;
                state.reset_waits = true;
            }
            Some(reads) => *reads -= 1,
            None => {}
        }
        Ok(match state.stopped {
            true => HartState::Stopped,
            false => HartState::Started,
        })
    }
    fn set_hart_state(&self, to: HartState) -> Result<()> {
        lock(&self.0).stopped = to == HartState::Stopped;
        Ok(())
    }
    fn waiting(&self) -> Result<Box<dyn Waiting>> {
        unreachable!("is not looked at")
    }
    fn external_irq(&self) -> Result<Arc<dyn ExternalIrq>> {
        unreachable!("has none")
    }
    fn counters(&self) -> Result<Vec<Counter>> {
        Ok(Vec::new())
    }
    fn kicker(&self) -> Result<Box<dyn Kicker>> {
        unreachable!("is not kicked")
    }
}

fn fake(state: State) -> Fake {
    Fake(Mutex::new(state))
}

/// Restarts, and how often they called.
fn restarts() -> (Restarts, Arc<AtomicUsize>) {
    let (shared, calls) = (Arc::<Shared>::default(), Arc::new(AtomicUsize::new(0)));
    let (asked, counted) = (Arc::clone(&shared), Arc::clone(&calls));
    let call = Box::new(move || {
        let wants_kick = asked.wants_kick.load(Ordering::Acquire);
        assert!(wants_kick, "called before it wants a kick");
        counted.fetch_add(1, Ordering::AcqRel);
    });
    (Restarts::new(shared, call), calls)
}

fn wants_kick(restarts: &Restarts) -> bool {
    restarts.shared.wants_kick.load(Ordering::Acquire)
}

#[test]
fn a_started_hart_begins_with_its_counters() {
    let (mut restarts, calls) = restarts();
    let mut vcpu = fake(State {
        stopped: true,
        starts_after: Some(3),
        early_signals: 2,
        ..State::default()
    });
    assert_eq!(restarts.look(&mut vcpu).unwrap(), Waited::DONE);
    assert_eq!(calls.load(Ordering::Acquire), 1);
    assert!(!wants_kick(&restarts));
    vcpu.run(VmEntry::Run).unwrap();
    assert_eq!(lock(&vcpu.0).entered_with, [CYCLE_TIME_INSTRET]);
}

/// A hart whose reset sets `scounteren` by itself comes through too.
#[test]
fn a_reset_of_another_host_ends_too() {
    let (mut restarts, ..) = restarts();
    let mut vcpu = fake(State {
        reset_waits: true,
        ..State::default()
    });
    restarts.take_reset(&mut vcpu, VmEntry::Run).unwrap();
    assert_eq!(lock(&vcpu.0).scounteren, CYCLE_TIME_INSTRET);
    assert!(!lock(&vcpu.0).stopped);
}

#[test]
fn a_stopped_hart_ends_with_its_machine() {
    let (mut restarts, calls) = restarts();
    let mut vcpu = fake(State {
        stopped: true,
        ..State::default()
    });
    restarts.shared.stopping.store(true, Ordering::Release);
    let waits = Waited::Asked(First::WaitForStart);
    assert_eq!(restarts.look(&mut vcpu).unwrap(), waits);
    assert_eq!(calls.load(Ordering::Acquire), 0);
}

/// At a look's turn, and right after a reset was taken.
#[test]
fn what_a_restart_between_two_looks_cleared_is_back() {
    let (mut restarts, _) = restarts();
    let mut vcpu = fake(State {
        stopped: true,
        starts_after: Some(1),
        ..State::default()
    });
    restarts.wait_for_start(&mut vcpu).unwrap();
    for _ in 0..3 {
        lock(&vcpu.0).scounteren = 0;
        restarts.look(&mut vcpu).unwrap();
        assert_eq!(lock(&vcpu.0).scounteren, CYCLE_TIME_INSTRET);
    }
}

#[test]
fn a_guests_own_value_stays() {
    let (mut restarts, _) = restarts();
    let mut vcpu = fake(State {
        scounteren: 2,
        ..State::default()
    });
    restarts.look(&mut vcpu).unwrap();
    assert_eq!(lock(&vcpu.0).scounteren, 2);
}

/// Started before its vCPU's thread had a look.
#[test]
fn a_hart_that_was_started_early_begins_with_its_counters() {
    let (mut restarts, _) = restarts();
    let mut vcpu = fake(State {
        reset_waits: true,
        ..State::default()
    });
    assert_eq!(restarts.wait_for_start(&mut vcpu).unwrap(), Waited::DONE);
    vcpu.run(VmEntry::Run).unwrap();
    assert_eq!(lock(&vcpu.0).entered_with, [CYCLE_TIME_INSTRET]);
}

/// Two harts that start a third at once: the second call should fail. Whatever comes of it, no exit is lost.
#[test]
fn hostile_a_hart_that_is_started_twice() {
    let (mut restarts, _) = restarts();
    let mut vcpu = fake(State {
        stopped: true,
        starts_after: Some(1),
        starts_again: true,
        ..State::default()
    });
    let exit = restarts.look(&mut vcpu).unwrap();
    assert_eq!(exit, Waited::Over(Some(VmExit::Csr { number: 1 })));
    assert!(!wants_kick(&restarts));
    assert_eq!(lock(&vcpu.0).scounteren, CYCLE_TIME_INSTRET);
}

/// The thread is stopped before KVM has served the reset: the next one finds it still to come.
#[test]
fn a_reset_that_was_not_taken_is_taken_later() {
    let (mut stopped, _) = restarts();
    let mut vcpu = fake(State {
        reset_waits: true,
        ..State::default()
    });
    stopped.shared.stopping.store(true, Ordering::Release);
    let waited = stopped.take_reset(&mut vcpu, VmEntry::Run).unwrap();
    assert_eq!(waited, Waited::Asked(First::TakeReset));
    assert!(lock(&vcpu.0).reset_waits && !lock(&vcpu.0).stopped);
    let (mut next, _) = restarts();
    let waited = next.take_reset(&mut vcpu, VmEntry::Run).unwrap();
    assert_eq!(waited, Waited::DONE);
    vcpu.run(VmEntry::Run).unwrap();
    assert_eq!(lock(&vcpu.0).entered_with, [CYCLE_TIME_INSTRET]);
}
