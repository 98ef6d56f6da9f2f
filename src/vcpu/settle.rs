//! Makes the registers of parked vCPUs complete, for a snapshot.
//!
//! A hart that another hart has just started (SBI HSM) has a reset pending inside KVM, with the
//! address to start at. No register shows that. So each started hart takes its pending reset, if
//! there is one, before its registers are saved. It runs no instruction. An interrupt controller
//! may need the same for some harts (`HartSide::to_settle_before_save`).

use super::first::First;
use super::kicked::{enter_one_stopped, on_kicked_thread};
use super::restart::Restarts;
use super::thread::Parked;
use crate::hypervisor::regs::{self, CYCLE_TIME_INSTRET};
use crate::hypervisor::{HartState, Result, VmEntry};

/// Lets KVM take all resets that are pending for `vcpus`, and do its other work for those of the
/// harts `also`. No vCPU may run meanwhile. `host_resets_harts`: see [`restart`](super::restart).
///
/// # Errors
/// Fails if KVM_RUN fails, or if KVM cannot read or set a register or a hart's state. The vCPUs are
/// lost then.
pub fn settle(vcpus: Vec<Parked>, host_resets_harts: bool, also: Vec<u32>) -> Result<Vec<Parked>> {
    // A single hart cannot be started by another one.
    let is_alone = vcpus.len() == 1 && vcpus.iter().all(|vcpu| vcpu.first == First::Enter);
    let is_asleep = |vcpu: &Parked| matches!(vcpu.first, First::Sleep(_));
    if also.is_empty() && (is_alone || vcpus.iter().all(is_asleep)) {
        return Ok(vcpus);
    }
    on_kicked_thread(vcpus, move |vcpus| {
        for (hart, vcpu) in (0u32..).zip(vcpus) {
            let entered = take_reset(vcpu, host_resets_harts)?;
            if also.contains(&hart) && !entered && !is_asleep(vcpu) {
                enter_one_stopped(vcpu.vcpu.as_mut())?;
            }
        }
        Ok(())
    })
}

/// Lets KVM take the reset of a started hart, if there is one. Returns whether KVM has done its
/// work for the vCPU.
fn take_reset(parked: &mut Parked, host_resets_harts: bool) -> Result<bool> {
    let vcpu = parked.vcpu.as_mut();
    let is_started = vcpu.hart_state()? == HartState::Started;
    match parked.first {
        // Its reset comes when it wakes up.
        First::Sleep(_) => return Ok(false),
        First::TakeReset => {
            Restarts::new_alone().take_reset(vcpu, VmEntry::Run)?;
            parked.first = First::Enter;
        }
        First::WaitForStart if is_started => {
            Restarts::new_alone().take_reset(vcpu, VmEntry::Run)?;
            parked.first = First::Enter;
        }
        First::Enter | First::EnterNudged if is_started => {
            enter_one_stopped(vcpu)?;
            if host_resets_harts && vcpu.reg(regs::SCOUNTEREN)? == Some(0) {
                vcpu.set_reg(regs::SCOUNTEREN, CYCLE_TIME_INSTRET)?;
            }
        }
        First::Enter | First::EnterNudged | First::WaitForStart => return Ok(false),
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::fake::{FakeVcpu, registers};
    use crate::hypervisor::{Vcpu, VmExit};
    use crate::util::sync::lock;
    use std::sync::{Arc, Mutex};

    const ENTRY: u64 = 0x8020_0000;

    /// A hart in `state`, with a reset pending in KVM if `pending`.
    fn parked(state: HartState, first: First, pending: bool) -> Parked {
        let registers = registers(&[(regs::SCOUNTEREN, 7), (regs::PC, 0)]);
        let shown = Arc::clone(&registers);
        let on_run = Box::new(move |_| {
            if pending {
                lock(&shown).insert(regs::PC, ENTRY);
                lock(&shown).insert(regs::SCOUNTEREN, 0);
            }
            VmExit::Interrupted
        });
        let state = Arc::new(Mutex::new(state));
        let vcpu = FakeVcpu {
            registers,
            state,
            on_run,
            ..FakeVcpu::default()
        };
        let (vcpu, stats) = (Box::new(vcpu) as Box<dyn Vcpu>, None);
        Parked { vcpu, first, stats }
    }

    fn seen(parked: &Parked) -> (u64, u64, HartState, bool) {
        let reg = |id| parked.vcpu.reg(id).unwrap().unwrap();
        let state = parked.vcpu.hart_state().unwrap();
        let enters = parked.first == First::Enter;
        (reg(regs::PC), reg(regs::SCOUNTEREN), state, enters)
    }

    #[test]
    fn started_harts_take_their_reset() {
        use HartState::{Started, Stopped};
        let cases = [
            (
                parked(Started, First::Enter, true),
                (ENTRY, 7, Started, true),
            ),
            (parked(Started, First::Enter, false), (0, 7, Started, true)),
            (parked(Stopped, First::Enter, false), (0, 7, Stopped, true)),
            (
                parked(Started, First::WaitForStart, true),
                (ENTRY, 7, Started, true),
            ),
            (
                parked(Stopped, First::WaitForStart, false),
                (0, 7, Stopped, false),
            ),
            (
                parked(Stopped, First::TakeReset, true),
                (ENTRY, 7, Started, true),
            ),
        ];
        let (vcpus, expected): (Vec<_>, Vec<_>) = cases.into_iter().unzip();
        let settled: Vec<_> = settle(vcpus, true, vec![])
            .unwrap()
            .iter()
            .map(seen)
            .collect();
        assert_eq!(settled, expected);
    }

    #[test]
    fn a_hart_alone_does_not_run() {
        let vcpu = FakeVcpu::default();
        let (vcpu, first, stats) = (Box::new(vcpu) as Box<dyn Vcpu>, First::Enter, None);
        settle(vec![Parked { vcpu, first, stats }], false, vec![]).unwrap();
    }

    /// The interrupt controller needs it for a hart that is alone, and for a stopped one.
    #[test]
    fn other_work_of_kvm_is_done_too() {
        let alone = vec![parked(HartState::Started, First::Enter, true)];
        let settled = settle(alone, false, vec![0]).unwrap();
        assert_eq!(seen(&settled[0]).0, ENTRY);
        let stopped = vec![
            parked(HartState::Stopped, First::Enter, true),
            parked(HartState::Stopped, First::Enter, true),
        ];
        let settled = settle(stopped, false, vec![1]).unwrap();
        let entries: Vec<_> = settled.iter().map(|parked| seen(parked).0).collect();
        assert_eq!(entries, [0, ENTRY]);
    }
}
