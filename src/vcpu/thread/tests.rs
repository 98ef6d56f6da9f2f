//! Runs a scripted vCPU through the real loop.

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
use crate::hypervisor::fake::{FakeVcpu, Registers};
use crate::hypervisor::{Counter, HartState, SbiCall, SbiRet, SystemEvent, regs};
use crate::irqchip::plic::Plic;
use crate::memory;
use crate::util::ByteSize;
use crate::util::sync::lock;
use crate::vcpu::sbi::Sbi;
use crate::vcpu::stats::ExitKind;

/// A running script: its handle, how it stopped, and the entries so far.
struct Started {
    handle: VcpuHandle,
    stops: mpsc::Receiver<Result<Stop>>,
    entries: Arc<Mutex<Vec<VmEntry>>>,
    /// The entries that only completed an exit, without running the guest.
    completed: Arc<Mutex<Vec<VmEntry>>>,
    /// The signals that its thread blocks.
    blocked: Arc<Mutex<Vec<i32>>>,
    exits: Arc<Exits>,
    /// The hart's registers, on a host that resets harts.
    registers: Registers,
    state: Arc<Mutex<HartState>>,
    /// Another hart has started this one, and its reset is pending.
    reset_waits: Arc<AtomicBool>,
    calls: mpsc::Receiver<()>,
}

impl Started {
    /// Starts this hart as another hart does on Linux 7.x.
    fn start_hart(&self) {
        self.reset_waits.store(true, Ordering::SeqCst);
        *lock(&self.state) = HartState::Started;
    }

    fn scounteren(&self) -> u64 {
        lock(&self.registers)[&regs::SCOUNTEREN]
    }
}

/// Starts the script of a hart that is stopped at first, on a host that resets harts.
fn start_stopped(exits: &[VmExit]) -> Started {
    start_as(exits, None, HartState::Stopped)
}

fn start(exits: &[VmExit]) -> Started {
    start_counting(exits, None)
}

fn start_counting(exits: &[VmExit], stats: Option<ExitStats>) -> Started {
    start_as(exits, stats, HartState::Started)
}

/// Creates a vCPU that plays `exits` and records the entries. At the end of the script it waits to
/// be kicked.
fn script(exits: &[VmExit], state: HartState) -> (FakeVcpu, Script) {
    let vcpu = FakeVcpu {
        counters: vec![Counter {
            name: "exits".into(),
            value: 8,
        }],
        ..FakeVcpu::with(&[(regs::SCOUNTEREN, 0)])
    };
    vcpu.set_hart_state(state).unwrap();
    let script = Script::default();
    let (played, kicked) = (script.clone(), Arc::clone(&vcpu.kicked));
    let completed = Arc::clone(&vcpu.completed);
    let (registers, state) = (Arc::clone(&vcpu.registers), Arc::clone(&vcpu.state));
    let is_stopped = move || *lock(&state) == HartState::Stopped;
    let mut exits: VecDeque<_> = exits.iter().copied().collect();
    let on_run = move |entry| {
        *lock(&played.blocked) = get_blocked_signals().unwrap();
        if played.reset_waits.swap(false, Ordering::SeqCst) {
            lock(&registers).insert(regs::SCOUNTEREN, 0);
        }
        if is_stopped() {
            return VmExit::Interrupted;
        }
        if kicked.load(Ordering::SeqCst) {
            lock(&completed).push(entry);
            return VmExit::Interrupted;
        }
        lock(&played.entries).push(entry);
        if let Some(exit) = exits.pop_front() {
            return exit;
        }
        // End the wait also if the hart is stopped, as if a kick found it so.
        while !kicked.load(Ordering::SeqCst) && !is_stopped() {
            std::thread::sleep(Duration::from_millis(1));
        }
        VmExit::Interrupted
    };
    let on_run = Box::new(on_run);
    (FakeVcpu { on_run, ..vcpu }, script)
}

/// What a script records.
#[derive(Clone, Default)]
struct Script {
    entries: Arc<Mutex<Vec<VmEntry>>>,
    blocked: Arc<Mutex<Vec<i32>>>,
    reset_waits: Arc<AtomicBool>,
}

fn start_as(exits: &[VmExit], stats: Option<ExitStats>, state: HartState) -> Started {
    let follow_restarts = state == HartState::Stopped;
    let ram = memory::create(
        GuestAddress(0x8000_0000),
        MemConfig::new(ByteSize::mib(1)),
        memory::Backing::Private,
    )
    .unwrap();
    let sbi = Sbi::new(ram, Arc::new(Console::default()));
    let (vcpu, script) = script(exits, state);
    let (registers, state) = (Arc::clone(&vcpu.registers), Arc::clone(&vcpu.state));
    let completed = Arc::clone(&vcpu.completed);
    let (called, calls) = mpsc::channel();
    let (stopped, stops) = mpsc::channel();
    let on_stop = Box::new(move |stop| stopped.send(stop).unwrap());
    let irqs = Arc::new(Plic::new(0, Vec::new()));
    let exits = Exits::new(Arc::new(Bus::default()), sbi, Arc::default(), irqs);
    let exits = Arc::new(exits);
    let id = u32::from(follow_restarts);
    let start = Start {
        id,
        on_stop,
        on_call: Box::new(move || called.send(()).unwrap()),
        follow_restarts,
        tracer: None,
    };
    let parked = Parked::of_new(Box::new(vcpu), id, follow_restarts, stats);
    let handle = VcpuHandle::prepare(parked, Arc::clone(&exits), start)
        .unwrap()
        .go();
    Started {
        handle,
        stops,
        entries: script.entries,
        completed,
        exits,
        blocked: script.blocked,
        reset_waits: script.reset_waits,
        registers,
        state,
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

/// On a host that resets harts, a stopped hart does not run before another hart starts it.
#[test]
fn a_stopped_hart_runs_when_it_is_started() {
    let shutdown = VmExit::System(SystemEvent::Shutdown { reason: 0 });
    let vcpu = start_stopped(&[shutdown]);
    assert!(vcpu.handle.follows_restarts());
    assert!(lock(&vcpu.entries).is_empty());
    vcpu.start_hart();
    assert!(matches!(vcpu.stops.recv().unwrap(), Ok(Stop::PowerOff)));
    vcpu.calls.recv().unwrap();
    assert_eq!(vcpu.scounteren(), 7);
    assert_eq!(*lock(&vcpu.entries), [VmEntry::Run]);
}

#[test]
fn a_stopped_hart_ends_with_its_handle() {
    let vcpu = start_stopped(&[]);
    drop(vcpu.handle);
    assert!(vcpu.stops.recv().is_err(), "on_stop is not called");
    assert!(lock(&vcpu.entries).is_empty());
}

/// A kick finds a running hart that has stopped itself. It then waits like a hart that has never
/// run.
#[test]
fn a_hart_that_stops_itself_is_found() {
    let vcpu = start_stopped(&[]);
    for start in 1..=3 {
        vcpu.start_hart();
        vcpu.calls.recv().unwrap();
        while lock(&vcpu.entries).len() < start {
            std::thread::yield_now();
        }
        assert_eq!(vcpu.scounteren(), 7);
        assert!(vcpu.handle.may_have_stopped());
        *lock(&vcpu.state) = HartState::Stopped;
        // While it sleeps outside KVM_RUN it needs no kicks.
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
    assert!(vcpu.stops.recv().is_err(), "on_stop is not called");
}

/// A kick is a signal. A mask that was inherited over exec must not block it.
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
    let stats = vcpu.handle.stop().unwrap().stats.unwrap();
    let reads = stats
        .kinds()
        .into_iter()
        .find(|(kind, _)| *kind == ExitKind::MmioRead(9));
    assert_eq!(reads.unwrap().1.count, 2);
    assert_eq!(stats.counters[0].value, 8);
    assert!(start(&[]).handle.stop().unwrap().stats.is_none());
}

/// Starts the vCPU again, as [`start`] does.
fn start_again(parked: Parked, exits: &Arc<Exits>, id: u32) -> (VcpuHandle, mpsc::Receiver<()>) {
    let (ready, calls) = prepare_again(parked, exits, id);
    (ready.go(), calls)
}

/// Makes a thread for the vCPU again.
fn prepare_again(parked: Parked, exits: &Arc<Exits>, id: u32) -> (Ready, mpsc::Receiver<()>) {
    let (called, calls) = mpsc::channel();
    let start = Start {
        id,
        on_stop: Box::new(|_| {}),
        on_call: Box::new(move || called.send(()).unwrap()),
        follow_restarts: id > 0,
        tracer: None,
    };
    let ready = VcpuHandle::prepare(parked, Arc::clone(exits), start);
    (ready.unwrap(), calls)
}

/// Its thread ends without the vCPU, also if nobody says what becomes of it.
#[test]
fn a_vcpu_that_is_ready_has_not_run() {
    let vcpu = start(&[]);
    let parked = vcpu.handle.stop().unwrap();
    let entries = || lock(&vcpu.entries).len();
    let before = entries();
    let (ready, _) = prepare_again(parked, &vcpu.exits, 0);
    let parked = ready.cancel();
    assert_eq!(parked.first, First::Enter);
    assert_eq!(entries(), before);
    let (ready, _) = prepare_again(parked, &vcpu.exits, 0);
    drop(ready);
    assert_eq!(entries(), before);
}

/// Whatever the last exit was, its result is in the registers when the vCPU is returned.
#[test]
fn no_entry_is_lost_when_a_vcpu_is_parked() {
    const ROUNDS: usize = 300;
    let (read, write) = (
        VmExit::MmioRead { gpa: 0, len: 2 },
        VmExit::MmioWrite {
            gpa: 0,
            len: 8,
            data: [0; 8],
        },
    );
    let exits = [read, write, VmExit::Csr { number: 7 }];
    let mut vcpu = start(&exits.repeat(ROUNDS));
    while lock(&vcpu.entries).len() <= exits.len() * ROUNDS {
        let parked = vcpu.handle.stop().unwrap();
        assert_eq!(parked.first, First::Enter);
        (vcpu.handle, _) = start_again(parked, &vcpu.exits, 0);
    }
    drop(vcpu.handle);
    // Each exit was completed once, by an entry into the guest or without one.
    let mut all: Vec<VmEntry> = lock(&vcpu.entries).clone();
    all.extend(lock(&vcpu.completed).iter());
    let count = |wanted: VmEntry| all.iter().filter(|entry| **entry == wanted).count();
    assert_eq!(count(VmEntry::MmioRead(0xffff)), ROUNDS);
    assert_eq!(count(VmEntry::Csr(0)), ROUNDS);
}

/// For a hart that was never started, and for one that was found stopped.
#[test]
fn a_stopped_hart_waits_on_in_the_next_thread() {
    let mut vcpu = start_stopped(&[]);
    for start in 1..=4 {
        let parked = vcpu.handle.stop().unwrap();
        assert_eq!(parked.first, First::WaitForStart);
        // Every other time, start the hart while its vCPU is parked.
        let early = start % 2 == 0;
        if early {
            vcpu.reset_waits.store(true, Ordering::SeqCst);
            *lock(&vcpu.state) = HartState::Started;
        }
        let (handle, calls) = start_again(parked, &vcpu.exits, 1);
        vcpu.handle = handle;
        if !early {
            vcpu.reset_waits.store(true, Ordering::SeqCst);
            *lock(&vcpu.state) = HartState::Started;
        }
        calls.recv().unwrap();
        while lock(&vcpu.entries).len() < start {
            std::thread::yield_now();
        }
        assert_eq!(lock(&vcpu.registers)[&regs::SCOUNTEREN], 7);
        *lock(&vcpu.state) = HartState::Stopped;
        while vcpu.handle.may_have_stopped() {
            std::thread::yield_now();
        }
    }
}
