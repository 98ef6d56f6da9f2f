//! KVM_RUN for a vCPU whose hart runs no instruction.
//!
//! Some work of KVM for a vCPU is done only in KVM_RUN, right before it enters the guest: it takes
//! a pending reset of the hart, and gives the vCPU one of the host's guest interrupt files. If the
//! hart is marked as stopped, KVM_RUN does this work too, but then sleeps instead of entering the
//! guest, until a signal comes (kvm_riscv_check_vcpu_requests and kvm_arch_vcpu_ioctl_run in
//! `arch/riscv/kvm/vcpu.c`). A signal from before that sleep would end KVM_RUN too early. So
//! another thread sends the signal, and only when it sees the vCPU's thread sleep.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use rustix::thread::gettid;
use vmm_sys_util::signal::{Killable, register_signal_handler, unblock_signal};

use super::thread::{kick_signal, on_kick};
use crate::hypervisor::{Error, HartState, Result, Vcpu, VmEntry, VmExit};
use crate::util::thread::{Kind, is_asleep, spawn};

/// How often the thread is looked at.
const LOOK_EVERY: Duration = Duration::from_micros(50);

/// The most calls of KVM_RUN for a hart that is stopped. One is enough.
const TRIES: u32 = 100;

/// Runs `body` with `value` on a thread of its own, and returns the value. Each time that the
/// thread sleeps, a signal interrupts it.
///
/// # Errors
/// Fails if `body` fails, or if the host cannot start a thread. `value` is lost then.
pub(super) fn on_kicked_thread<T: Send + 'static>(
    mut value: T,
    body: impl FnOnce(&mut T) -> Result<()> + Send + 'static,
) -> Result<T> {
    let refused = |e: io::Error| Error::refused("start a thread for vCPUs", e);
    register_signal_handler(kick_signal(), on_kick).map_err(|e| refused(e.into()))?;
    let id = Arc::new(AtomicI32::new(0));
    let own = Arc::clone(&id);
    let thread = spawn(Kind::Vcpu, "settle", move || {
        // This fails only for invalid signal numbers.
        let _ = unblock_signal(kick_signal());
        own.store(gettid().as_raw_nonzero().get(), Ordering::Release);
        body(&mut value).map(|()| value)
    });
    let thread = thread.map_err(refused)?;
    while !thread.is_finished() {
        if is_asleep(id.load(Ordering::Acquire)) {
            // Fails if the thread has ended already.
            let _ = thread.kill(kick_signal());
        }
        std::thread::sleep(LOOK_EVERY);
    }
    let result = thread.join();
    result.map_err(|_| refused(io::Error::other("it panicked")))?
}

/// Lets KVM do its work for `vcpu`, and runs no instruction of its hart. To be called on a
/// [kicked thread](on_kicked_thread), while no other vCPU runs. The hart's state is as before.
///
/// # Errors
/// Fails if KVM_RUN fails, or if KVM cannot set the hart's state.
pub(super) fn enter_one_stopped(vcpu: &mut dyn Vcpu) -> Result<()> {
    let before = vcpu.hart_state()?;
    vcpu.set_hart_state(HartState::Stopped)?;
    for _ in 0..TRIES {
        if vcpu.run(VmEntry::Run)? == VmExit::Interrupted {
            return vcpu.set_hart_state(before);
        }
    }
    let reason = io::Error::other("it does not sleep although its hart is stopped");
    Err(Error::refused("run a vCPU", reason))
}

/// Lets KVM do its work for the vCPUs of these harts, and returns all vCPUs: see
/// `enter_one_stopped`. If the host has guest interrupt files, each of these vCPUs has one then, as
/// long as there are enough. No vCPU may run meanwhile.
///
/// # Errors
/// Fails if KVM_RUN fails, if KVM cannot set a hart's state, or if the host cannot start a thread.
pub fn enter_stopped(vcpus: Vec<Box<dyn Vcpu>>, harts: Vec<u32>) -> Result<Vec<Box<dyn Vcpu>>> {
    on_kicked_thread(vcpus, move |vcpus| {
        let vcpus = (0u32..).zip(vcpus).filter(|(hart, _)| harts.contains(hart));
        vcpus
            .into_iter()
            .try_for_each(|(_, vcpu)| enter_one_stopped(vcpu.as_mut()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::fake::FakeVcpu;
    use crate::util::sync::lock;
    use std::sync::Mutex;
    use std::thread::park_timeout;

    /// Each KVM_RUN sleeps until the signal comes, with the hart stopped.
    #[test]
    fn a_hart_is_stopped_while_kvm_works() {
        let mut vcpus: Vec<Box<dyn Vcpu>> = Vec::new();
        let seen = Arc::<Mutex<Vec<HartState>>>::default();
        let states = [HartState::Started, HartState::Stopped];
        for before in states {
            let state = Arc::new(Mutex::new(before));
            let (now, seen) = (Arc::clone(&state), Arc::clone(&seen));
            let mut runs = 0;
            let on_run = Box::new(move |_| {
                lock(&seen).push(*lock(&now));
                // std parks again after a signal, so this ends by the time alone.
                park_timeout(Duration::from_millis(2));
                runs += 1;
                match runs {
                    1 => VmExit::Breakpoint,
                    _ => VmExit::Interrupted,
                }
            });
            vcpus.push(Box::new(FakeVcpu {
                state,
                on_run,
                ..FakeVcpu::default()
            }));
        }
        let vcpus = enter_stopped(vcpus, vec![0, 1]).unwrap();
        assert_eq!(*lock(&seen), [HartState::Stopped; 4]);
        let after: Vec<_> = vcpus
            .iter()
            .map(|vcpu| vcpu.hart_state().unwrap())
            .collect();
        assert_eq!(after, states);
    }

    #[test]
    fn a_thread_that_sleeps_is_kicked() {
        let slept = on_kicked_thread(0, |slept| {
            let pause = rustix::thread::Timespec {
                tv_sec: 3600,
                tv_nsec: 0,
            };
            let ended = rustix::thread::nanosleep(&pause);
            assert!(matches!(
                ended,
                rustix::thread::NanosleepRelativeResult::Interrupted(_)
            ));
            *slept += 1;
            Ok(())
        });
        assert_eq!(slept.unwrap(), 1);
        let failed = on_kicked_thread((), |()| Err(Error::refused("run", io::Error::other("x"))));
        assert!(failed.is_err());
    }
}
