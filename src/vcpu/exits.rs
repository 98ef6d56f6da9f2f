//! Handles each exit of a vCPU: passes MMIO to the bus, answers SBI calls and CSR accesses, and
//! decides when an exit ends the machine.

use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};

use super::Stop;
use super::fetch::FetchFaults;
use super::sbi::Sbi;
use super::suspend::{SUSP, SYSTEM_SUSPEND, Suspend};
use crate::bus::Bus;
use crate::devices::sifive_test::PowerSwitch;
use crate::hypervisor::{SbiCall, SystemEvent, VmEntry, VmExit};
use crate::irqchip::HartSide;
use crate::util::{RateLimit, guest_warn};

/// Number of the `seed` CSR, the entropy source of Zkr.
const CSR_SEED: u64 = 0x015;
/// `seed.OPST` ES16: the low 16 bits are fresh entropy (RISC-V Cryptography Extensions, volume I,
/// "The seed CSR").
const SEED_ES16: u64 = 0b10 << 30;
/// `seed.OPST` WAIT: there is no entropy now, and the guest must poll again.
const SEED_WAIT: u64 = 0b01 << 30;

/// SRST's reset reason "no reason".
const NO_REASON: u64 = 0;

/// What the vCPU's thread does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Enter the guest, with this result of its last exit.
    Enter(VmEntry),
    /// Do rare work, which needs the vCPU's registers or takes time.
    Rare(Rare),
}

/// Rare work that the vCPU's thread does itself. This type is small, so that [`Next`] is passed in
/// CPU registers.
#[derive(Debug, PartialEq, Eq)]
pub enum Rare {
    /// End the machine, unless the thread can inject the fault that the guest expects (`fetch`).
    Stop(Box<Stop>),
    /// KVM_RUN was interrupted: check whether the hart was stopped or reset (`restart`).
    Look,
    /// Let the hart sleep until an interrupt wakes it: the guest has suspended the system.
    Suspend,
}

/// Handles exits. All vCPUs of a machine share one `Exits`.
pub struct Exits {
    bus: Arc<Bus>,
    sbi: Sbi,
    power: Arc<PowerSwitch>,
    csrs: RateLimit,
    /// This and `suspend` access the vCPU's registers. So the vCPU's thread uses them, and
    /// [`Exits::handle`] does not.
    pub(super) fetch_faults: FetchFaults,
    pub(super) suspend: Suspend,
}

impl Exits {
    /// Creates the handler of a machine's exits. Devices request the machine's end or reset with
    /// `power`. The external interrupts of the harts come from `irqs`.
    pub fn new(bus: Arc<Bus>, sbi: Sbi, power: Arc<PowerSwitch>, irqs: Arc<dyn HartSide>) -> Self {
        Self {
            bus,
            fetch_faults: FetchFaults::new(Arc::clone(sbi.ram())),
            sbi,
            power,
            suspend: Suspend::new(irqs),
            csrs: RateLimit::named("CSRs"),
        }
    }

    /// Handles `exit`. Blocks only for a store that resets a virtio device or clears its bus master
    /// enable, until the device has stopped.
    #[inline(always)]
    pub fn handle(&self, exit: VmExit) -> Next {
        match exit {
            VmExit::MmioRead { gpa, len } => {
                Next::Enter(VmEntry::MmioRead(self.bus.read(gpa, len)))
            }
            VmExit::MmioWrite { gpa, len, ref data } => {
                self.bus.write(gpa, &data[..len.min(data.len())]);
                match self.power.asked() {
                    None => Next::Enter(VmEntry::Run),
                    Some(request) => stop(request.into()),
                }
            }
            VmExit::Sbi(call) if is_suspend(&call) => Next::Rare(Rare::Suspend),
            VmExit::Sbi(call) => Next::Enter(VmEntry::Sbi(self.sbi.call(call))),
            VmExit::Csr { number } => Next::Enter(VmEntry::Csr(self.csr(number))),
            VmExit::System(event) => stop(system_event(event)),
            VmExit::Breakpoint => stop(Stop::Breakpoint),
            VmExit::Interrupted => Next::Rare(Rare::Look),
            VmExit::Unrunnable { errno, pc } => stop(Stop::Unrunnable { errno, pc }),
            VmExit::FailEntry { reason, cpu } => stop(Stop::FailEntry { reason, cpu }),
            VmExit::Unknown { reason } => stop(Stop::UnknownExit(reason)),
        }
    }

    #[cold]
    fn csr(&self, number: u64) -> u64 {
        if number == CSR_SEED {
            return seed();
        }
        guest_warn!(
            self.csrs,
            "the guest accessed CSR {number:#x}, which rvmm does not emulate"
        );
        0
    }
}

#[inline(always)]
fn is_suspend(call: &SbiCall) -> bool {
    call.extension == SUSP && call.function == SYSTEM_SUSPEND
}

#[cold]
#[inline(never)]
fn stop(stop: Stop) -> Next {
    Next::Rare(Rare::Stop(Box::new(stop)))
}

/// The value of the `seed` CSR: 16 bits of the host's entropy, or WAIT.
fn seed() -> u64 {
    let mut bytes = [0; 2];
    match getrandom(&mut bytes, GetRandomFlags::NONBLOCK) {
        Ok(2) => SEED_ES16 | u64::from(u16::from_le_bytes(bytes)),
        _ => SEED_WAIT,
    }
}

fn system_event(event: SystemEvent) -> Stop {
    match event {
        SystemEvent::Shutdown { reason: NO_REASON } => Stop::PowerOff,
        SystemEvent::Shutdown { reason } => Stop::Failure(reason),
        SystemEvent::Reset { .. } => Stop::Reset,
        SystemEvent::Other { kind } => Stop::UnknownEvent(kind),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::MmioDevice;
    use crate::config::MemConfig;
    use crate::devices::console::Console;
    use crate::irqchip::plic::Plic;
    use crate::memory;
    use crate::util::{ByteSize, sync::lock};
    use std::sync::Mutex;
    use vm_memory::GuestAddress;

    #[derive(Default)]
    struct Cell(Mutex<u64>);

    impl MmioDevice for Cell {
        fn read(&self, _: u64, data: &mut [u8]) {
            let value = lock(&self.0).to_le_bytes();
            data.copy_from_slice(&value[..data.len()]);
        }
        fn write(&self, _: u64, data: &[u8]) {
            let mut value = [0; 8];
            value[..data.len()].copy_from_slice(data);
            *lock(&self.0) = u64::from_le_bytes(value);
        }
    }

    fn exits() -> Exits {
        let mut bus = Bus::default();
        bus.insert(0x1000..0x1008, Arc::new(Cell::default()))
            .unwrap();
        let ram = memory::create(
            GuestAddress(0x8000_0000),
            MemConfig::new(ByteSize::mib(1)),
            memory::Backing::Private,
        )
        .unwrap();
        let sbi = Sbi::new(ram, Arc::new(Console::default()));
        let plic = Arc::new(Plic::new(0x0c00_0000, Vec::new()));
        Exits::new(Arc::new(bus), sbi, Arc::default(), plic)
    }

    #[test]
    fn mmio_goes_to_the_bus() {
        let exits = exits();
        let data = [0x11, 0x22, 0x33, 0x44, 0, 0, 0, 0xff];
        let write = |len| VmExit::MmioWrite {
            gpa: 0x1000,
            len,
            data,
        };
        assert_eq!(exits.handle(write(4)), Next::Enter(VmEntry::Run));
        let read = |gpa, len| exits.handle(VmExit::MmioRead { gpa, len });
        assert_eq!(read(0x1000, 8), Next::Enter(VmEntry::MmioRead(0x4433_2211)));
        assert_eq!(read(0x1000, 1), Next::Enter(VmEntry::MmioRead(0x11)));
        assert_eq!(read(0x2000, 2), Next::Enter(VmEntry::MmioRead(0xffff)));
        // No access of a real hart has this length.
        exits.handle(write(99));
        read(0x1000, 99);
    }

    #[test]
    fn an_unknown_sbi_call_lets_the_guest_go_on() {
        let call = SbiCall {
            extension: 0x0bad_beef,
            function: 0,
            args: [0; 6],
        };
        let Next::Enter(VmEntry::Sbi(ret)) = exits().handle(VmExit::Sbi(call)) else {
            panic!("no SBI result");
        };
        assert_eq!(ret.error, -2);
    }

    #[test]
    fn a_suspend_is_the_harts() {
        let call = |function| SbiCall {
            extension: SUSP,
            function,
            args: [0; 6],
        };
        let exits = exits();
        let suspend = exits.handle(VmExit::Sbi(call(0)));
        assert_eq!(suspend, Next::Rare(Rare::Suspend));
        let Next::Enter(VmEntry::Sbi(ret)) = exits.handle(VmExit::Sbi(call(1))) else {
            panic!("no SBI result");
        };
        assert_eq!(ret.error, -2);
    }

    #[test]
    fn the_seed_is_fresh_and_other_csrs_are_zero() {
        let exits = exits();
        let read = |number| match exits.handle(VmExit::Csr { number }) {
            Next::Enter(VmEntry::Csr(value)) => value,
            other => panic!("{other:?}"),
        };
        let seeds: Vec<u64> = (0..16).map(|_| read(CSR_SEED)).collect();
        assert!(seeds.iter().all(|seed| seed & !0xffff == SEED_ES16));
        assert!(seeds.iter().any(|seed| *seed != seeds[0]));
        assert_eq!(read(0x151), 0);
    }

    #[test]
    fn the_end_has_its_reason() {
        let exits = exits();
        let stop = |event| match exits.handle(VmExit::System(event)) {
            Next::Rare(Rare::Stop(stop)) => *stop,
            other => panic!("{other:?}"),
        };
        assert_eq!(stop(SystemEvent::Shutdown { reason: 0 }), Stop::PowerOff);
        assert_eq!(stop(SystemEvent::Shutdown { reason: 1 }), Stop::Failure(1));
        assert_eq!(
            stop(SystemEvent::Shutdown { reason: u64::MAX }),
            Stop::Failure(u64::MAX)
        );
        assert_eq!(stop(SystemEvent::Reset { reason: 0 }), Stop::Reset);
        assert_eq!(stop(SystemEvent::Other { kind: 9 }), Stop::UnknownEvent(9));
    }

    #[test]
    fn what_cannot_run_ends_the_machine() {
        let exits = exits();
        let crash = VmExit::Unrunnable {
            errno: 95,
            pc: 0x8020_0000,
        };
        let unrunnable = Stop::Unrunnable {
            errno: 95,
            pc: 0x8020_0000,
        };
        assert_eq!(exits.handle(crash), stop(unrunnable));
        let fail = VmExit::FailEntry {
            reason: 0x600,
            cpu: 1,
        };
        let (reason, cpu) = (0x600, 1);
        assert_eq!(exits.handle(fail), stop(Stop::FailEntry { reason, cpu }));
        assert_eq!(
            exits.handle(VmExit::Unknown { reason: 99 }),
            stop(Stop::UnknownExit(99))
        );
        assert_eq!(exits.handle(VmExit::Breakpoint), stop(Stop::Breakpoint));
        assert_eq!(exits.handle(VmExit::Interrupted), Next::Rare(Rare::Look));
    }
}
