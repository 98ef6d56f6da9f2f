//! A scripted vCPU through the real loop.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::time::Duration;

use vm_memory::GuestAddress;
use vmm_sys_util::signal::{block_signal, get_blocked_signals};

use super::*;
use crate::bus::Bus;
use crate::config::MemConfig;
use crate::devices::console::Console;
use crate::hypervisor::{Counter, ExternalIrq, HartState, RegId, SbiCall, SbiRet, SystemEvent};
use crate::irqchip::plic::Plic;
use crate::memory;
use crate::util::ByteSize;
use crate::util::sync::lock;
use crate::vcpu::sbi::Sbi;
use crate::vcpu::stats::ExitKind;

/// Plays its exits and keeps the entries; at the end of the script it waits to be kicked.
#[derive(Default)]
struct Script {
    exits: VecDeque<VmExit>,
    entries: Arc<Mutex<Vec<VmEntry>>>,
    kicked: Arc<AtomicBool>,
    /// Signals that its thread blocks.
    blocked: Arc<Mutex<Vec<i32>>>,
}

struct Flag(Arc<AtomicBool>);

impl Kicker for Flag {
    fn set_immediate_exit(&self, on: bool) {
        self.0.store(on, Ordering::SeqCst);
    }
}

impl Vcpu for Script {
    fn run(&mut self, entry: VmEntry) -> Result<VmExit> {
        *lock(&self.blocked) = get_blocked_signals().unwrap();
        lock(&self.entries).push(entry);
        if let Some(exit) = self.exits.pop_front() {
            return Ok(exit);
        }
        while !self.kicked.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(VmExit::Interrupted)
    }
    fn reg(&self, _: RegId) -> Result<Option<u64>> {
        Ok(None)
    }
    fn set_reg(&self, _: RegId, _: u64) -> Result<()> {
        Ok(())
    }
    fn external_irq(&self) -> Result<Arc<dyn ExternalIrq>> {
        unreachable!("has none")
    }
    fn hart_state(&self) -> Result<HartState> {
        Ok(HartState::Started)
    }
    fn set_hart_state(&self, _: HartState) -> Result<()> {
        Ok(())
    }
    fn waiting(&self) -> Result<Box<dyn Waiting>> {
        unreachable!("is not looked at")
    }
    fn counters(&self) -> Result<Vec<Counter>> {
        let (name, value) = ("exits".into(), 8);
        Ok(vec![Counter { name, value }])
    }
    fn kicker(&self) -> Result<Box<dyn Kicker>> {
        Ok(Box::new(Flag(Arc::clone(&self.kicked))))
    }
}

/// A script under way: its handle, how it stopped, and the entries so far.
struct Started {
    handle: VcpuHandle,
    stops: mpsc::Receiver<Result<Stop>>,
    entries: Arc<Mutex<Vec<VmEntry>>>,
    blocked: Arc<Mutex<Vec<i32>>>,
}

fn start(exits: &[VmExit]) -> Started {
    start_counting(exits, None)
}

fn start_counting(exits: &[VmExit], stats: Option<ExitStats>) -> Started {
    let ram = memory::create(GuestAddress(0x8000_0000), MemConfig::new(ByteSize::mib(1))).unwrap();
    let sbi = Sbi::new(ram, Arc::new(Console::default()));
    let script = Script {
        exits: exits.iter().copied().collect(),
        ..Script::default()
    };
    let (entries, blocked) = (Arc::clone(&script.entries), Arc::clone(&script.blocked));
    let (told, stops) = mpsc::channel();
    let on_stop = Box::new(move |stop| told.send(stop).unwrap());
    let irqs = Arc::new(Plic::new(0, Vec::new()));
    let exits = Exits::new(Arc::new(Bus::default()), sbi, Arc::default(), irqs);
    let start = Start {
        id: 0,
        on_stop,
        on_call: Box::new(|| {}),
        stats,
        follow_restarts: false,
    };
    let handle = VcpuHandle::start(Box::new(script), Arc::new(exits), start).unwrap();
    Started {
        handle,
        stops,
        entries,
        blocked,
    }
}

#[test]
fn the_simplest_guest_there_is() {
    let shutdown = VmExit::System(SystemEvent::Shutdown { reason: 0 });
    let vcpu = start(&[shutdown]);
    assert!(matches!(vcpu.stops.recv().unwrap(), Ok(Stop::PowerOff)));
    assert_eq!(*lock(&vcpu.entries), [VmEntry::Run]);
}

#[test]
fn every_exit_is_completed_by_its_entry() {
    let call = SbiCall {
        extension: 99,
        function: 0,
        args: [0; 6],
    };
    let vcpu = start(&[
        VmExit::MmioRead { gpa: 0, len: 2 },
        VmExit::MmioWrite {
            gpa: 0,
            len: 8,
            data: [0; 8],
        },
        VmExit::Sbi(call),
        VmExit::Csr { number: 7 },
        VmExit::Interrupted,
        VmExit::Unrunnable { errno: 5, pc: 4 },
    ]);
    let stop = vcpu.stops.recv().unwrap().unwrap();
    assert_eq!(stop, Stop::Unrunnable { errno: 5, pc: 4 });
    let not_supported = SbiRet {
        error: -2,
        value: 0,
    };
    assert_eq!(
        *lock(&vcpu.entries),
        [
            VmEntry::Run,
            VmEntry::MmioRead(0xffff),
            VmEntry::Run,
            VmEntry::Sbi(not_supported),
            VmEntry::Csr(0),
            VmEntry::Run,
        ]
    );
}

#[test]
fn dropping_the_handle_stops_a_guest_that_spins() {
    let vcpu = start(&[]);
    drop(vcpu.handle);
    assert!(vcpu.stops.recv().is_err(), "nothing is told");
}

/// A kick is a signal: a mask that came over exec must not keep it out.
#[test]
fn a_vcpu_is_kicked_whatever_mask_it_inherits() {
    block_signal(kick_signal()).unwrap();
    let shutdown = VmExit::System(SystemEvent::Shutdown { reason: 0 });
    let vcpu = start(&[shutdown]);
    vcpu.stops.recv().unwrap().unwrap();
    assert!(!lock(&vcpu.blocked).contains(&kick_signal()));
}

#[test]
fn exits_are_counted_when_asked() {
    let read = VmExit::MmioRead { gpa: 9, len: 1 };
    let vcpu = start_counting(&[read, read], Some(ExitStats::default()));
    while lock(&vcpu.entries).len() < 3 {
        std::thread::yield_now();
    }
    let stats = vcpu.handle.stop().unwrap();
    let reads = stats
        .kinds()
        .into_iter()
        .find(|(kind, _)| *kind == ExitKind::MmioRead(9));
    assert_eq!(reads.unwrap().1.count, 2);
    assert_eq!(stats.counters[0].value, 8);
    assert!(start(&[]).handle.stop().is_none());
}
