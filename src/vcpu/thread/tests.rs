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
use crate::hypervisor::{
    Counter, ExternalIrq, HartState, RegId, SbiCall, SbiRet, SystemEvent, regs,
};
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
    /// Its hart, on a host that resets harts.
    hart: Arc<Mutex<FakeHart>>,
}

/// A hart as Linux 7.x keeps it.
#[derive(Default)]
struct FakeHart {
    stopped: bool,
    /// Another hart has started it.
    reset_waits: bool,
    scounteren: u64,
}

struct Flag(Arc<AtomicBool>);

impl Kicker for Flag {
    fn set_immediate_exit(&self, on: bool) {
        self.0.store(on, Ordering::SeqCst);
    }
}

/// A vCPU that waits for no interrupt.
struct Awake;

impl Waiting for Awake {
    fn waits(&self) -> bool {
        false
    }
}

impl Vcpu for Script {
    fn run(&mut self, entry: VmEntry) -> Result<VmExit> {
        *lock(&self.blocked) = get_blocked_signals().unwrap();
        {
            let mut hart = lock(&self.hart);
            if std::mem::take(&mut hart.reset_waits) {
                hart.scounteren = 0;
            }
            if hart.stopped {
                return Ok(VmExit::Interrupted);
            }
        }
        lock(&self.entries).push(entry);
        if let Some(exit) = self.exits.pop_front() {
            return Ok(exit);
        }
        // Or a kick finds the hart stopped.
        while !self.kicked.load(Ordering::SeqCst) && !lock(&self.hart).stopped {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(VmExit::Interrupted)
    }
    fn reg(&self, id: RegId) -> Result<Option<u64>> {
        let scounteren = lock(&self.hart).scounteren;
        Ok((id == regs::SCOUNTEREN).then_some(scounteren))
    }
    fn set_reg(&self, id: RegId, value: u64) -> Result<()> {
        if id == regs::SCOUNTEREN {
            lock(&self.hart).scounteren = value;
        }
        Ok(())
    }
    fn external_irq(&self) -> Result<Arc<dyn ExternalIrq>> {
        unreachable!("has none")
    }
    fn hart_state(&self) -> Result<HartState> {
        Ok(match lock(&self.hart).stopped {
            true => HartState::Stopped,
            false => HartState::Started,
        })
    }
    fn set_hart_state(&self, state: HartState) -> Result<()> {
        lock(&self.hart).stopped = state == HartState::Stopped;
        Ok(())
    }
    fn waiting(&self) -> Result<Box<dyn Waiting>> {
        Ok(Box::new(Awake))
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
    hart: Arc<Mutex<FakeHart>>,
    calls: mpsc::Receiver<()>,
}

/// The script of a hart that is stopped at first, on a host that resets harts.
fn start_stopped(exits: &[VmExit]) -> Started {
    let hart = FakeHart {
        stopped: true,
        ..FakeHart::default()
    };
    start_as(exits, None, Some(hart))
}

fn start(exits: &[VmExit]) -> Started {
    start_counting(exits, None)
}

fn start_counting(exits: &[VmExit], stats: Option<ExitStats>) -> Started {
    start_as(exits, stats, None)
}

fn start_as(exits: &[VmExit], stats: Option<ExitStats>, hart: Option<FakeHart>) -> Started {
    let follow_restarts = hart.is_some();
    let ram = memory::create(
        GuestAddress(0x8000_0000),
        MemConfig::new(ByteSize::mib(1)),
        memory::Backing::Private,
    )
    .unwrap();
    let sbi = Sbi::new(ram, Arc::new(Console::default()));
    let script = Script {
        exits: exits.iter().copied().collect(),
        hart: Arc::new(Mutex::new(hart.unwrap_or_default())),
        ..Script::default()
    };
    let (entries, blocked) = (Arc::clone(&script.entries), Arc::clone(&script.blocked));
    let hart = Arc::clone(&script.hart);
    let (called, calls) = mpsc::channel();
    let (told, stops) = mpsc::channel();
    let on_stop = Box::new(move |stop| told.send(stop).unwrap());
    let irqs = Arc::new(Plic::new(0, Vec::new()));
    let exits = Exits::new(Arc::new(Bus::default()), sbi, Arc::default(), irqs);
    let start = Start {
        id: u32::from(follow_restarts),
        on_stop,
        on_call: Box::new(move || called.send(()).unwrap()),
        stats,
        follow_restarts,
    };
    let handle = VcpuHandle::start(Box::new(script), Arc::new(exits), start).unwrap();
    Started {
        handle,
        stops,
        entries,
        blocked,
        hart,
        calls,
    }
}

#[test]
fn the_simplest_guest_there_is() {
    let shutdown = VmExit::System(SystemEvent::Shutdown { reason: 0 });
    let vcpu = start(&[shutdown]);
    assert!(matches!(vcpu.stops.recv().unwrap(), Ok(Stop::PowerOff)));
    assert_eq!(*lock(&vcpu.entries), [VmEntry::Run]);
}

/// On a host that resets harts it does not run before another hart starts it.
#[test]
fn a_stopped_hart_runs_when_it_is_started() {
    let shutdown = VmExit::System(SystemEvent::Shutdown { reason: 0 });
    let vcpu = start_stopped(&[shutdown]);
    assert!(vcpu.handle.follows_restarts());
    {
        let mut hart = lock(&vcpu.hart);
        assert!(lock(&vcpu.entries).is_empty());
        (hart.stopped, hart.reset_waits) = (false, true);
    }
    assert!(matches!(vcpu.stops.recv().unwrap(), Ok(Stop::PowerOff)));
    vcpu.calls.recv().unwrap();
    assert_eq!(lock(&vcpu.hart).scounteren, 7);
    assert_eq!(*lock(&vcpu.entries), [VmEntry::Run]);
}

#[test]
fn a_stopped_hart_ends_with_its_handle() {
    let vcpu = start_stopped(&[]);
    drop(vcpu.handle);
    assert!(vcpu.stops.recv().is_err(), "nothing is told");
    assert!(lock(&vcpu.entries).is_empty());
}

/// A running hart that stops itself is found when it is kicked, and waits as one that never ran.
#[test]
fn a_hart_that_stops_itself_is_found() {
    let vcpu = start_stopped(&[]);
    for start in 1..=3 {
        let mut hart = lock(&vcpu.hart);
        (hart.stopped, hart.reset_waits) = (false, true);
        drop(hart);
        vcpu.calls.recv().unwrap();
        while lock(&vcpu.entries).len() < start {
            std::thread::yield_now();
        }
        assert_eq!(lock(&vcpu.hart).scounteren, 7);
        assert!(vcpu.handle.may_have_stopped());
        lock(&vcpu.hart).stopped = true;
        // Asleep outside KVM_RUN it needs no look.
        while vcpu.handle.may_have_stopped() {
            std::thread::yield_now();
        }
    }
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
