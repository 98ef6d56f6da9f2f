//! The in-kernel AIA of real hosts, saved and loaded: what a fake cannot show. The guests are a few
//! instructions, which access one register each.
#![cfg(target_arch = "riscv64")]

use std::sync::Arc;
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rvmm::bus::{Device, IrqSink};
use rvmm::config::MemConfig;
use rvmm::hypervisor::kvm::Kvm;
use rvmm::hypervisor::{HartState, Hypervisor, MsiMessage, Vcpu, Vm, VmEntry, VmExit, regs};
use rvmm::irqchip::HartSide;
use rvmm::irqchip::aia::{IMSIC_SIZE, InKernelAia, Placement, Promise};
use rvmm::memory::{self, Backing};
use rvmm::snapshot::{LoadError, Parts};
use rvmm::util::ByteSize;
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::common::Shell;
use crate::common::disk::{disk, md5, random};
use crate::common::freezing::{Freezer, kernel_is_content, kill, printed, text};
use crate::common::host::{self, Kind};

const RAM: u64 = 0x8000_0000;
const APLIC: u64 = 0x0d00_0000;
const IMSIC: u64 = 0x2800_0000;

/// Registers of an IMSIC, by their numbers in `siselect`.
const EIDELIVERY: u64 = 0x70;
const EITHRESHOLD: u64 = 0x72;
const EIP0: u64 = 0x80;
const EIP2: u64 = 0x82;
const EIE0: u64 = 0xc0;
const EIE2: u64 = 0xc2;

/// Registers of the APLIC, by their offsets. Those of sources begin with source 0.
const DOMAINCFG: u64 = 0;
const SOURCECFG: u64 = 0;
const SETIP: u64 = 0x1c00;
const SETIE: u64 = 0x1e00;
const TARGET: u64 = 0x3000;
const IE: u64 = 1 << 8;
const EDGE_RISE: u64 = 4;
const LEVEL_HIGH: u64 = 6;

/// `sd zero, 0(zero)`: an exit, because this is not RAM.
const DONE: u32 = 0x0000_3023;

/// What a hart can be asked to do, with a0 and a1.
#[derive(Clone, Copy)]
enum Act {
    WriteImsic,
    ReadImsic,
    Claim,
    ReadSip,
    Store,
    Load,
}

/// The code of each [`Act`], in their order.
const CODE: [[u32; 4]; 6] = [
    // csrw siselect, a0; csrw sireg, a1
    [0x1505_1073, 0x1515_9073, DONE, DONE],
    // csrw siselect, a0; csrr a1, sireg
    [0x1505_1073, 0x1510_25f3, DONE, DONE],
    // csrrw a1, stopei, zero
    [0x15c0_15f3, DONE, DONE, DONE],
    // csrr a1, sip
    [0x1440_25f3, DONE, DONE, DONE],
    // sw a1, 0(a0)
    [0x00b5_2023, DONE, DONE, DONE],
    // lwu a1, 0(a0)
    [0x0005_6583, DONE, DONE, DONE],
];

struct Guest {
    vm: Arc<dyn Vm>,
    aia: InKernelAia,
    vcpus: Vec<Option<Box<dyn Vcpu>>>,
}

impl Guest {
    /// A guest with so many harts, all of them started.
    fn new(harts: u32, promise: Option<Promise>) -> Self {
        let vm = Kvm::open().expect("KVM").create_vm().expect("a VM");
        let config = MemConfig::new(ByteSize::mib(1));
        let ram = memory::create(GuestAddress(RAM), config, Backing::Private).expect("RAM");
        let code: Vec<u8> = CODE
            .as_flattened()
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect();
        ram.write_slice(&code, GuestAddress(RAM)).expect("the code");
        vm.map_ram(&ram).expect("a memslot");
        let device = vm.create_aia().expect("asked").expect("an AIA");
        let vcpu = |hart| {
            let vcpu = vm.create_vcpu(hart).expect("a vCPU");
            vcpu.set_hart_state(HartState::Started).expect("started");
            Some(vcpu)
        };
        let vcpus = (0..harts).map(vcpu).collect();
        let placement = Placement {
            aplic: GuestAddress(APLIC),
            imsic: GuestAddress(IMSIC),
        };
        let aia = InKernelAia::start(vm.clone(), device, placement, harts, false, promise);
        let aia = aia.expect("an AIA that runs");
        Self { vm, aia, vcpus }
    }

    /// A new guest with as many harts as `from` has, for the state that it has saved.
    fn for_state_of(mut from: Self) -> (Self, Parts) {
        until(|| from.settled_to_save());
        let mut parts = from.save();
        let harts = u32::try_from(from.vcpus.len()).expect("a number");
        // Gives its interrupt files back.
        drop(from);
        let promise = Promise::of(&mut parts).expect("a promise");
        (Self::new(harts, Some(promise)), parts)
    }

    fn vcpu(&mut self, hart: usize) -> &mut dyn Vcpu {
        self.vcpus[hart].as_mut().expect("a vCPU").as_mut()
    }

    /// Lets `hart` do it, and returns a1.
    fn act(&mut self, hart: usize, act: Act, a0: u64, a1: u64) -> u64 {
        let vcpu = self.vcpu(hart);
        let pc = RAM + 16 * act as u64;
        for (register, value) in [(regs::PC, pc), (regs::A0, a0), (regs::A1, a1)] {
            vcpu.set_reg(register, value).expect("a register");
        }
        loop {
            match vcpu.run(VmEntry::Run).expect("KVM_RUN") {
                VmExit::Interrupted => {}
                VmExit::MmioWrite { gpa: 0, .. } => break,
                exit => panic!("{exit:x?}"),
            }
        }
        vcpu.complete(VmEntry::Run).expect("completed");
        vcpu.reg(regs::A1).expect("a register").expect("a1")
    }

    fn write(&mut self, hart: usize, register: u64, value: u64) {
        self.act(hart, Act::WriteImsic, register, value);
    }

    fn read(&mut self, hart: usize, register: u64) -> u64 {
        self.act(hart, Act::ReadImsic, register, 0)
    }

    /// The interrupt that is taken next, and is not pending then.
    fn claim(&mut self, hart: usize) -> u64 {
        self.act(hart, Act::Claim, 0, 0) >> 16
    }

    fn store(&mut self, register: u64, value: u64) {
        self.act(0, Act::Store, APLIC + register, value);
    }

    fn load(&mut self, register: u64) -> u64 {
        self.act(0, Act::Load, APLIC + register, 0)
    }

    fn signal(&self, hart: u64, data: u32) {
        let address = IMSIC + hart * IMSIC_SIZE;
        let message = MsiMessage { address, data };
        self.vm.signal_msi(message).expect("a message");
    }

    /// `sip`, as the hart reads it.
    fn sip(&mut self, hart: usize) -> u64 {
        self.act(hart, Act::ReadSip, 0, 0)
    }

    /// Lets `hart` run, and returns whether it has a guest interrupt file now. Disables all of its
    /// interrupts.
    fn get_file(&mut self, hart: usize) -> bool {
        self.write(hart, EIE0, 1 << 40);
        let is_there = self.read(hart, EIE0) == 1 << 40;
        self.write(hart, EIE0, 0);
        is_there
    }

    /// Settles the vCPUs as the AIA wants it before a save, and returns whether it wants no more.
    fn settled_to_save(&mut self) -> bool {
        let harts = self.aia.to_settle_before_save().expect("asked");
        for hart in &harts {
            self.settle(*hart as usize);
        }
        harts.is_empty()
    }

    fn save(&self) -> Parts {
        Parts::new(Device::save(&self.aia).expect("saved"))
    }

    fn take_over(&self, mut parts: Parts) -> Result<(), LoadError> {
        Device::load(&self.aia, &mut parts)
    }

    /// Lets the vCPU of `hart` go through KVM_RUN once, without running an instruction. The hart is
    /// stopped meanwhile, so KVM_RUN sleeps. After a signal it does what it does before each entry,
    /// and returns.
    fn settle(&mut self, hart: usize) {
        extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), nothing).expect("a handler");
        let mut vcpu = self.vcpus[hart].take().expect("a vCPU");
        vcpu.set_hart_state(HartState::Stopped).expect("stopped");
        let thread = spawn(move || {
            let exit = vcpu.run(VmEntry::Run).expect("KVM_RUN");
            assert_eq!(exit, VmExit::Interrupted);
            vcpu
        });
        while !thread.is_finished() {
            sleep(Duration::from_millis(20));
            // Fails if the thread has ended.
            let _ = thread.kill(SIGRTMIN());
        }
        let vcpu = thread.join().expect("a vCPU");
        vcpu.set_hart_state(HartState::Started).expect("started");
        self.vcpus[hart] = Some(vcpu);
    }
}

/// Waits until `is_done`. Other cases may use the host's interrupt files for a while.
fn until(mut is_done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_done() {
        assert!(Instant::now() < end, "not done in a minute");
    }
}

/// Lets this thread, and those that it starts, run on one of the host's processors only: the first
/// one, or the last one. A hart that runs on the same processor keeps its guest interrupt file.
fn pin(all: &CpuSet, last: bool) {
    let mut usable = (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu));
    let cpu = if last { usable.last() } else { usable.next() };
    let mut one = CpuSet::new();
    one.set(cpu.expect("a processor"));
    sched_setaffinity(None, &one).expect("pinned");
}

/// The processors that this thread had, and has again when this is dropped.
struct Pinned(CpuSet);

impl Drop for Pinned {
    fn drop(&mut self) {
        sched_setaffinity(None, &self.0).expect("as before");
    }
}

/// Keeps this thread on the last of its processors.
fn stay() -> Pinned {
    let all = sched_getaffinity(None).expect("the processors");
    pin(&all, true);
    Pinned(all)
}

/// A host without AIA has no IMSIC to save: rvmm uses its PLIC there.
fn has_no_aia() -> bool {
    let is_none = host::kind() == Kind::NoAia;
    if is_none {
        let vm = Kvm::open().expect("KVM").create_vm().expect("a VM");
        assert!(vm.create_aia().expect("asked").is_none());
    }
    is_none
}

const fn bits<const N: usize>(numbers: [u32; N]) -> u64 {
    let (mut bits, mut at) = (0, 0);
    while at < N {
        bits |= 1 << numbers[at];
        at += 1;
    }
    bits
}

const ALL: [u64; 6] = [EIDELIVERY, EITHRESHOLD, EIP0, EIP2, EIE0, EIE2];

/// On a host with guest interrupt files, all identities. Elsewhere those that a guest can have.
#[test]
fn both_halves_come_back() {
    if has_no_aia() {
        return;
    }
    let _pinned = stay();
    let mut first = Guest::new(1, None);
    let is_whole = first.aia.has_guest_files() || !first.aia.is_lossy();
    until(|| first.get_file(0) == is_whole);
    first.write(0, EIE0, bits([1, 31, 40, 63]));
    first.write(0, EIE2, bits([5, 6, 40]));
    first.write(0, EITHRESHOLD, 200);
    first.write(0, EIDELIVERY, 1);
    for identity in [31, 33, 40, 70] {
        first.signal(0, identity);
    }
    let before = ALL.map(|register| first.read(0, register));
    if is_whole {
        assert_eq!(before[4..], [bits([1, 31, 40, 63]), bits([5, 6, 40])]);
    } else {
        // lr.w: what a guest reads above bit 31 are copies of that bit.
        assert_eq!(before[4..], [0xffff_ffff_8000_0002, bits([5, 6])]);
    }
    let needs_file = first.aia.has_guest_files() && first.aia.is_lossy();
    if needs_file {
        let mut parts = first.save();
        let hasty = Guest::new(1, Some(Promise::of(&mut parts).expect("a promise")));
        let line = hasty.take_over(parts).expect_err("no file").to_string();
        let expected = "cannot enable interrupt identity 40 of hart 0: it has no guest";
        assert!(line.contains(expected), "{line}");
    }
    let (mut second, mut parts) = Guest::for_state_of(first);
    let harts = second.aia.to_settle_before_load(&mut parts).expect("asked");
    assert_eq!(harts, if needs_file { vec![0] } else { vec![] });
    if needs_file {
        // With a pending interrupt, the AIA can be asked whether the hart has a file.
        second.signal(0, 31);
        until(|| second.settled_to_save());
    }
    second.take_over(parts).expect("loaded");
    assert_eq!(ALL.map(|register| second.read(0, register)), before);
    let claims: Vec<_> = (0..4).map(|_| second.claim(0)).collect();
    assert_eq!(
        claims,
        if is_whole {
            [31, 40, 70, 0]
        } else {
            [31, 70, 0, 0]
        }
    );
    assert_eq!(second.read(0, EIP0), if is_whole { bits([33]) } else { 0 });
}

/// KVM moves an emulated file into a guest interrupt file when the vCPU runs. Then the hart's
/// external interrupt is no longer one that KVM injects, as `sip` may have it: hart 1 has been
/// saved so, and its interrupt was taken back since.
#[test]
fn lower_halves_need_no_guest_file() {
    const EXTERNAL: u64 = 1 << 9;
    if has_no_aia() {
        return;
    }
    let _pinned = stay();
    for settles in [false, true] {
        let mut first = Guest::new(2, None);
        for hart in [0, 1] {
            first.write(hart, EIE0, bits([3, 31]));
            first.write(hart, EIE2, bits([5]));
            first.write(hart, EIDELIVERY, 1);
        }
        for identity in [31, 40, 69] {
            first.signal(0, identity);
        }
        let (mut second, mut parts) = Guest::for_state_of(first);
        let harts = second.aia.to_settle_before_load(&mut parts).expect("asked");
        assert!(harts.is_empty(), "{harts:?}");
        for hart in [0, 1] {
            second.vcpu(hart).set_reg(regs::SIP, EXTERNAL).expect("sip");
            if settles {
                second.settle(hart);
            }
        }
        second.take_over(parts).expect("loaded");
        assert_eq!(second.sip(0) & EXTERNAL, EXTERNAL);
        assert_eq!(second.sip(1) & EXTERNAL, 0);
        for hart in [0, 1] {
            assert_eq!(second.read(hart, EIE0) & 0xffff_ffff, bits([3, 31]));
            assert_eq!(second.read(hart, EIE2), bits([5]));
            assert_eq!(second.read(hart, EIDELIVERY), 1);
        }
        assert_eq!([0; 3].map(|_| second.claim(0)), [31, 69, 0]);
        assert_eq!(second.sip(0) & EXTERNAL, 0);
        second.signal(1, 31);
        assert_eq!([0; 2].map(|_| second.claim(1)), [31, 0]);
    }
}

#[test]
fn wires_come_back() {
    if has_no_aia() {
        return;
    }
    let _pinned = stay();
    let mut first = Guest::new(2, None);
    let target = |hart: u64, identity: u64| (hart << 18) | identity;
    // A level that is high: its interrupt was sent to hart 1. A level that was high before its
    // source was enabled, and is low now. Two edges, one pending and not enabled, one enabled.
    for (source, mode, target) in [
        (10, LEVEL_HIGH, target(1, 9)),
        (11, LEVEL_HIGH, target(0, 10)),
        (33, EDGE_RISE, target(0, 11)),
        (34, EDGE_RISE, target(1, 12)),
    ] {
        first.store(SOURCECFG + 4 * source, mode);
        first.store(TARGET + 4 * source, target);
    }
    first.store(SETIE, 1 << 10);
    first.store(SETIE + 4, 1 << 2);
    first.store(DOMAINCFG, IE);
    for (source, high) in [(10, true), (11, true), (11, false), (33, true)] {
        first.aia.set_level(source, high);
    }
    let registers = || {
        let sources = (1..64).flat_map(|source| [SOURCECFG + 4 * source, TARGET + 4 * source]);
        let words = [DOMAINCFG, SETIE, SETIE + 4, SETIP, SETIP + 4];
        sources.chain(words)
    };
    let before: Vec<_> = registers().map(|register| first.load(register)).collect();
    assert_eq!(before[before.len() - 2..], [1 << 11, 1 << 1], "pending");

    let (mut second, parts) = Guest::for_state_of(first);
    // The devices set their lines first.
    second.aia.set_level(10, true);
    second.aia.set_level(33, true);
    second.take_over(parts).expect("loaded");
    let after: Vec<_> = registers().map(|register| second.load(register)).collect();
    assert_eq!(after, before);
    for hart in [0, 1] {
        second.write(hart, EIE0, !1);
        second.write(hart, EIDELIVERY, 1);
    }
    assert_eq!(
        [0; 2].map(|_| second.claim(1)),
        [9, 0],
        "sent before, and not twice"
    );
    assert_eq!(second.claim(0), 0);
    // The inputs are known: only source 34 has an edge. Sources 11 and 33 are pending.
    for source in [33, 34] {
        second.aia.set_level(source, true);
    }
    assert_eq!([0; 2].map(|_| second.claim(1)), [12, 0]);
    second.store(SETIE, 1 << 11);
    second.store(SETIE + 4, 1 << 1);
    assert_eq!([0; 3].map(|_| second.claim(0)), [10, 11, 0]);
}

/// A Linux whose one hart has more interrupts than 31, if the host has guest interrupt files. Each
/// of them works after a restore.
#[test]
fn linux_with_many_messages_goes_on() {
    const DISKS: usize = 20;
    let freezer = Freezer::new();
    let mut flags: Vec<String> = freezer.ctl("ctl").into();
    for number in 0..DISKS {
        let name = format!("d{number}");
        let image = freezer.scratch.file(&name, random(64 << 10));
        flags.extend(disk(&image, &format!(",id={name}")));
    }
    let mut guest = Shell::start(&flags);
    guest.ok("head -c 4096 /dev/vda >/dev/null");
    freezer.freeze("ctl", "snap", &[]);
    kill(guest.vm);
    let shown = printed(["snapshot", "show", "--json", &text(&freezer.path("snap"))]);
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    let enabled = &shown["devices"]["aia"]["aia"]["imsics"][0]["enabled"];
    let enabled = enabled.as_array().into_iter().flatten();
    let upper = enabled
        .filter_map(Value::as_u64)
        .filter(|identity| identity % 64 > 31);
    assert_eq!(upper.count() > 0, host::kind() == Kind::Aia, "{shown}");

    let mut guest = Shell::restored(freezer.thaw("snap").spawn());
    for number in 0..DISKS {
        let sum = md5(&freezer.path(&format!("d{number}")));
        let find = format!("$(grep -lx d{number} /sys/block/*/serial | cut -d/ -f4)");
        let read =
            format!("dd if=/dev/{find} bs=4k iflag=direct 2>/dev/null | md5sum | cut -c1-32");
        assert_eq!(guest.ok(&read), sum, "disk d{number}");
    }
    kernel_is_content(&mut guest);
    guest.power_off();
}
