//! Tests with a vCPU that behaves as with KVM of Linux 7.x: a reset is pending until KVM_RUN.

use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use super::*;
use crate::hypervisor::fake::FakeVcpu;
use crate::util::sync::lock;

/// How KVM behaves for the vCPU.
#[derive(Default)]
struct Host {
    /// The hart is stopped at first.
    stopped: bool,
    reset_waits: bool,
    scounteren: u64,
    /// `scounteren` at each entry into the guest.
    entered_with: Vec<u64>,
    /// Another hart starts this one after this many reads of its state.
    starts_after: Option<u32>,
    /// Number of KVM_RUNs that a signal interrupts before KVM has handled the reset.
    early_signals: u32,
    /// Another hart starts this one again while its reset is taken.
    starts_again: bool,
}

/// Creates the vCPU, and the state of its KVM.
fn fake(host: Host) -> (FakeVcpu, Arc<Mutex<Host>>) {
    let vcpu = FakeVcpu::with(&[(regs::SCOUNTEREN, host.scounteren)]);
    if host.stopped {
        vcpu.set_hart_state(HartState::Stopped).unwrap();
    }
    let host = Arc::new(Mutex::new(host));
    let (registers, state) = (Arc::clone(&vcpu.registers), Arc::clone(&vcpu.state));
    let (at_run, at_read) = (Arc::clone(&host), Arc::clone(&host));
    let started = Arc::clone(&state);
    let on_run = move |_| {
        let mut host = lock(&at_run);
        if host.early_signals > 0 {
            host.early_signals -= 1;
            return VmExit::Interrupted;
        }
        if std::mem::take(&mut host.starts_again) {
            *lock(&state) = HartState::Started;
        }
        if std::mem::take(&mut host.reset_waits) {
            lock(&registers).insert(regs::SCOUNTEREN, 0);
        }
        if *lock(&state) == HartState::Stopped {
            return VmExit::Interrupted;
        }
        host.entered_with.push(lock(&registers)[&regs::SCOUNTEREN]);
        VmExit::Csr { number: 1 }
    };
    let on_state = move || {
        let mut host = lock(&at_read);
        match host.starts_after {
            Some(0) => {
                host.starts_after = None;
                host.reset_waits = true;
                *lock(&started) = HartState::Started;
            }
            Some(reads) => host.starts_after = Some(reads - 1),
            None => {}
        }
    };
    let vcpu = FakeVcpu {
        on_run: Box::new(on_run),
        on_state: Box::new(on_state),
        ..vcpu
    };
    (vcpu, host)
}

/// Creates [`Restarts`], and the number of its calls for kicks.
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
    let (mut vcpu, host) = fake(Host {
        stopped: true,
        starts_after: Some(3),
        early_signals: 2,
        ..Host::default()
    });
    assert_eq!(restarts.look(&mut vcpu).unwrap(), Waited::DONE);
    assert_eq!(calls.load(Ordering::Acquire), 1);
    assert!(!wants_kick(&restarts));
    vcpu.run(VmEntry::Run).unwrap();
    assert_eq!(lock(&host).entered_with, [CYCLE_TIME_INSTRET]);
}

/// Here the hart is already marked as started when its reset is taken.
#[test]
fn a_reset_of_another_host_ends_too() {
    let (mut restarts, ..) = restarts();
    let (mut vcpu, _) = fake(Host {
        reset_waits: true,
        ..Host::default()
    });
    restarts.take_reset(&mut vcpu, VmEntry::Run).unwrap();
    assert_eq!(vcpu.get(regs::SCOUNTEREN), CYCLE_TIME_INSTRET);
    assert_eq!(vcpu.hart_state().unwrap(), HartState::Started);
}

#[test]
fn a_stopped_hart_ends_with_its_machine() {
    let (mut restarts, calls) = restarts();
    let (mut vcpu, _) = fake(Host {
        stopped: true,
        ..Host::default()
    });
    restarts.shared.stopping.store(true, Ordering::Release);
    let waits = Waited::Asked(First::WaitForStart);
    assert_eq!(restarts.look(&mut vcpu).unwrap(), waits);
    assert_eq!(calls.load(Ordering::Acquire), 0);
}

/// A look restores `scounteren`, also right after a reset was taken.
#[test]
fn what_a_restart_between_two_looks_cleared_is_back() {
    let (mut restarts, _) = restarts();
    let (mut vcpu, _) = fake(Host {
        stopped: true,
        starts_after: Some(1),
        ..Host::default()
    });
    restarts.wait_for_start(&mut vcpu).unwrap();
    for _ in 0..3 {
        vcpu.set_reg(regs::SCOUNTEREN, 0).unwrap();
        restarts.look(&mut vcpu).unwrap();
        assert_eq!(vcpu.get(regs::SCOUNTEREN), CYCLE_TIME_INSTRET);
    }
}

#[test]
fn a_guests_own_value_stays() {
    let (mut restarts, _) = restarts();
    let (mut vcpu, _) = fake(Host {
        scounteren: 2,
        ..Host::default()
    });
    restarts.look(&mut vcpu).unwrap();
    assert_eq!(vcpu.get(regs::SCOUNTEREN), 2);
}

/// The hart was started before its vCPU's thread read its state.
#[test]
fn a_hart_that_was_started_early_begins_with_its_counters() {
    let (mut restarts, _) = restarts();
    let (mut vcpu, host) = fake(Host {
        reset_waits: true,
        ..Host::default()
    });
    assert_eq!(restarts.wait_for_start(&mut vcpu).unwrap(), Waited::DONE);
    vcpu.run(VmEntry::Run).unwrap();
    assert_eq!(lock(&host).entered_with, [CYCLE_TIME_INSTRET]);
}

/// Two harts start a third one at once. The second call should fail, but it succeeds. No exit is
/// lost then.
#[test]
fn hostile_a_hart_that_is_started_twice() {
    let (mut restarts, _) = restarts();
    let (mut vcpu, _) = fake(Host {
        stopped: true,
        starts_after: Some(1),
        starts_again: true,
        ..Host::default()
    });
    let exit = restarts.look(&mut vcpu).unwrap();
    assert_eq!(exit, Waited::Over(Some(VmExit::Csr { number: 1 })));
    assert!(!wants_kick(&restarts));
    assert_eq!(vcpu.get(regs::SCOUNTEREN), CYCLE_TIME_INSTRET);
}

/// The thread is stopped before KVM has handled the reset: the next thread takes it.
#[test]
fn a_reset_that_was_not_taken_is_taken_later() {
    let (mut stopped, _) = restarts();
    let (mut vcpu, host) = fake(Host {
        reset_waits: true,
        ..Host::default()
    });
    stopped.shared.stopping.store(true, Ordering::Release);
    let waited = stopped.take_reset(&mut vcpu, VmEntry::Run).unwrap();
    assert_eq!(waited, Waited::Asked(First::TakeReset));
    assert!(lock(&host).reset_waits);
    assert_eq!(vcpu.hart_state().unwrap(), HartState::Started);
    let (mut next, _) = restarts();
    let waited = next.take_reset(&mut vcpu, VmEntry::Run).unwrap();
    assert_eq!(waited, Waited::DONE);
    vcpu.run(VmEntry::Run).unwrap();
    assert_eq!(lock(&host).entered_with, [CYCLE_TIME_INSTRET]);
}
