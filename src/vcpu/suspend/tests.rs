//! Tests with a hart that has only registers and is reset as by KVM, and an interrupt controller
//! with one register.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::hypervisor::VmExit;
use crate::hypervisor::fake::{FakeVcpu, registers};
use crate::irqchip::SavedRegister;
use crate::util::sync::lock;

/// An interrupt controller with one register. An interrupt is pending once it was asked
/// `pending_at` times.
#[derive(Default)]
struct Controller {
    register: Mutex<u64>,
    asked: AtomicU32,
    pending_at: u32,
}

impl HartSide for Controller {
    fn is_pending(&self, hart: u32, saved: &[SavedRegister]) -> Result<bool> {
        assert_eq!(saved, [(1, 77)]);
        assert_eq!(hart, 3);
        Ok(self.asked.fetch_add(1, Ordering::AcqRel) >= self.pending_at)
    }
    fn save(&self, _: u32) -> Result<Vec<SavedRegister>> {
        Ok(vec![(1, *lock(&self.register))])
    }
    fn restore(&self, _: u32, saved: &[SavedRegister]) -> Result<()> {
        *lock(&self.register) = saved[0].1;
        Ok(())
    }
}

struct Fixture {
    suspend: Suspend,
    hart: FakeVcpu,
    controller: Arc<Controller>,
    restarts: Restarts,
}

/// A hart with these registers. Its external interrupt is pending once the controller was asked
/// `pending_at` times.
fn fixture(values: &[(RegId, u64)], pending_at: u32) -> Fixture {
    let controller = Arc::new(Controller {
        register: Mutex::new(77),
        pending_at,
        ..Controller::default()
    });
    let registers = registers(values);
    let (cleared, reset) = (Arc::clone(&registers), Arc::clone(&controller));
    Fixture {
        suspend: Suspend::new(Arc::clone(&controller) as _),
        hart: FakeVcpu {
            registers,
            others: Some(0),
            on_run: Box::new(move |entry| {
                assert_eq!(entry, OK);
                lock(&cleared).clear();
                *lock(&reset.register) = 0;
                VmExit::Interrupted
            }),
            ..FakeVcpu::default()
        },
        controller,
        restarts: Restarts::new(Arc::default(), Box::new(|| {})),
    }
}

impl Fixture {
    fn stop(&self) {
        let stopping = &self.restarts.shared.stopping;
        stopping.store(true, Ordering::Release);
    }

    /// Sleeps until the hart wakes, or its thread is to end.
    fn sleep(&mut self) -> Waited {
        let sleeper = self.suspend.begin(3, &self.hart).unwrap();
        self.sleep_on(sleeper)
    }

    fn sleep_on(&mut self, sleeper: Sleeper) -> Waited {
        let (suspend, hart) = (&self.suspend, &mut self.hart);
        suspend.sleep(3, hart, &mut self.restarts, sleeper).unwrap()
    }
}

#[test]
fn what_is_pending_and_enabled_wakes() {
    const NEVER: u32 = u32::MAX;
    // A hart that does not wake would sleep until its machine ends, so end it at once.
    let with = |registers: &[(RegId, u64)], pending_at| {
        let mut fixture = fixture(registers, pending_at);
        fixture.stop();
        assert!(matches!(fixture.sleep(), Waited::Asked(First::Sleep(_))));
        // The last step of waking up sets this register.
        fixture.hart.get(regs::SCOUNTEREN) == 7
    };
    assert!(!with(&[], 0), "nothing is enabled");
    assert!(with(&[(regs::SIE, 0x222), (regs::SIP, 2)], NEVER));
    assert!(!with(&[(regs::SIE, 0x200), (regs::SIP, 0x22)], NEVER));
    assert!(with(&[(regs::SIE, 0x200)], 0), "by the controller");
    let timer = |time, compare| {
        let set = [
            (regs::SIE, 0x20),
            (regs::TIMER_TIME, time),
            (regs::TIMER_COMPARE, compare),
        ];
        with(&set, NEVER)
    };
    assert!(timer(10, 10) && timer(11, 10));
    assert!(!timer(9, 10) && !timer(u64::MAX - 1, u64::MAX));
}

#[test]
fn the_hart_sleeps_until_its_interrupt_and_keeps_it() {
    let mut fixture = fixture(&[(regs::SIE, 0x200)], 3);
    assert_eq!(fixture.sleep(), Waited::DONE);
    let controller = &fixture.controller;
    assert_eq!(controller.asked.load(Ordering::Acquire), 4);
    assert_eq!(*lock(&controller.register), 77);
    assert_eq!(fixture.hart.get(regs::SCOUNTEREN), 7);
}

#[test]
fn a_suspended_hart_ends_with_its_machine() {
    let mut fixture = fixture(&[], 0);
    fixture.stop();
    assert!(matches!(fixture.sleep(), Waited::Asked(First::Sleep(_))));
}

/// The thread is stopped while the hart sleeps, and once more when the hart is about to wake. The
/// hart continues to sleep in the next thread, and keeps the interrupt that wakes it.
#[test]
fn a_sleep_goes_on_in_the_next_thread() {
    let mut fixture = fixture(&[(regs::SIE, 0x200)], 2);
    fixture.stop();
    let mut waited = fixture.sleep();
    for _ in 0..3 {
        let Waited::Asked(First::Sleep(sleeper)) = waited else {
            panic!("{waited:?}");
        };
        waited = fixture.sleep_on(sleeper);
    }
    assert_eq!(*lock(&fixture.controller.register), 77, "no reset yet");
    let Waited::Asked(First::Sleep(sleeper)) = waited else {
        panic!("{waited:?}");
    };
    let stopping = &fixture.restarts.shared.stopping;
    stopping.store(false, Ordering::Release);
    assert_eq!(fixture.sleep_on(sleeper), Waited::DONE);
    assert_eq!(*lock(&fixture.controller.register), 77);
}
