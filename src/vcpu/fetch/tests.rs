//! Tests with a hart that has only registers.

use super::*;
use crate::config::MemConfig;
use crate::hypervisor::fake::FakeVcpu;
use crate::memory;
use crate::util::ByteSize;
use crate::vcpu::trap::{MODE_SUPERVISOR, SIE, SPIE, SPP};

const RAM: u64 = 0x8000_0000;
const RAM_END: u64 = RAM + (1 << 20);
const HANDLER: u64 = RAM + 0x400;
const NOWHERE: u64 = 0x6000_0000;
const MODE_USER: u64 = 0;

/// The faults of one guest. Each test has its own rate limit, by its name.
fn faults(name: &str) -> FetchFaults {
    let ram = memory::create(
        GuestAddress(RAM),
        MemConfig::new(ByteSize::mib(1)),
        memory::Backing::Private,
    )
    .unwrap();
    let kvm = 0xffff_ffff_01a2_b000..0xffff_ffff_01a6_0000;
    FetchFaults {
        limit: RateLimit::with_burst(name, FAULTS_MAX),
        kvm: OnceLock::from(Some(kvm)),
        ..FetchFaults::new(ram)
    }
}

fn hart(status: u64, mode: u64, satp: u64) -> FakeVcpu {
    FakeVcpu::with(&[
        (regs::SSTATUS, status),
        (regs::MODE, mode),
        (regs::SATP, satp),
        (regs::STVEC, HANDLER | 1),
    ])
}

fn answer(faults: &FetchFaults, hart: &FakeVcpu, pc: u64) -> Option<Stop> {
    hart.set_reg(regs::PC, pc).unwrap();
    faults.answer(hart, libc::EOPNOTSUPP, pc).unwrap()
}

const GOES_ON: Option<Stop> = None;

fn unrunnable(pc: u64) -> Option<Stop> {
    let errno = libc::EOPNOTSUPP;
    Some(Stop::Unrunnable { errno, pc })
}

#[test]
fn the_hart_takes_the_fault() {
    const OTHER_BITS: u64 = 0x8000_0002_0004_6000;
    let faults = faults("takes");
    for (before, mode, after) in [
        (SIE, MODE_SUPERVISOR, SPIE | SPP),
        (SPIE | SPP, MODE_SUPERVISOR, SPP),
        (SIE | SPP, MODE_USER, SPIE),
        (0, MODE_USER, 0),
    ] {
        let hart = hart(before | OTHER_BITS, mode, 0);
        // Addresses below RAM, behind RAM, and outside the physical address space.
        for pc in [NOWHERE, RAM_END, 0xffff_ffff_8000_1234] {
            hart.set_reg(regs::SSTATUS, before | OTHER_BITS).unwrap();
            hart.set_reg(regs::MODE, mode).unwrap();
            assert_eq!(answer(&faults, &hart, pc), GOES_ON);
            assert_eq!(hart.get(regs::SSTATUS), after | OTHER_BITS, "{before:#x}");
            assert_eq!(hart.get(regs::SEPC), pc);
            assert_eq!(hart.get(regs::STVAL), pc);
            assert_eq!(hart.get(regs::SCAUSE), 1);
            assert_eq!(hart.get(regs::PC), HANDLER);
            assert_eq!(hart.get(regs::MODE), MODE_SUPERVISOR);
        }
    }
}

#[test]
fn what_is_no_fetch_ends_the_machine() {
    let faults = faults("other");
    let hart = hart(0, MODE_SUPERVISOR, 0);
    assert_eq!(answer(&faults, &hart, RAM), unrunnable(RAM));
    for errno in [libc::EIO, libc::EFAULT] {
        let stop = faults.answer(&hart, errno, NOWHERE).unwrap();
        assert_eq!(stop, Some(Stop::Unrunnable { errno, pc: NOWHERE }));
    }
}

#[test]
fn by_the_guests_page_tables() {
    let faults = faults("tables");
    let (root, valid, leaf) = (RAM + 0x1000, 1, 0b1001);
    let satp = (8 << 60) | (root >> 12);
    let hart = hart(0, MODE_SUPERVISOR, satp);
    let set = |index: u64, entry: u64| {
        let at = GuestAddress(root + 8 * index);
        faults.ram.write_obj(entry.to_le(), at).unwrap();
    };
    // Map one gigabyte that starts with RAM and one without RAM, and point to a table outside RAM.
    set(1, (RAM >> 2) | leaf);
    set(2, (1 << 28) | leaf);
    set(3, (NOWHERE >> 2) | valid);
    let gigabyte = 1 << 30;
    assert_eq!(answer(&faults, &hart, gigabyte), unrunnable(gigabyte));
    for pc in [2 * gigabyte, 3 * gigabyte, gigabyte + (1 << 20)] {
        assert_eq!(answer(&faults, &hart, pc), GOES_ON, "{pc:#x}");
        assert_eq!(hart.get(regs::SEPC), pc);
    }
    // A page fault is not injected here: the hart takes it itself.
    let unmapped = 4 * gigabyte;
    assert_eq!(answer(&faults, &hart, unmapped), unrunnable(unmapped));
}

#[test]
fn the_second_half_of_an_instruction() {
    let faults = faults("halves");
    let hart = hart(0, MODE_SUPERVISOR, 0);
    let last = RAM_END - 2;
    let put = |bits: u16| {
        let at = GuestAddress(last);
        faults.ram.write_obj(bits.to_le(), at).unwrap();
    };
    put(0x0001);
    assert_eq!(answer(&faults, &hart, last), unrunnable(last));
    put(0x0073);
    assert_eq!(answer(&faults, &hart, last), GOES_ON);
    assert_eq!(hart.get(regs::SEPC), last);
    assert_eq!(hart.get(regs::STVAL), RAM_END);
}

#[test]
fn hostile_a_handler_that_is_nowhere() {
    let faults = faults("handler");
    let hart = hart(0, MODE_SUPERVISOR, 0);
    hart.set_reg(regs::STVEC, NOWHERE).unwrap();
    assert_eq!(answer(&faults, &hart, NOWHERE + 8), GOES_ON);
    let stop = Stop::NoTrapHandler { pc: NOWHERE };
    assert_eq!(answer(&faults, &hart, NOWHERE), Some(stop));
}

#[test]
fn hostile_faults_without_end() {
    let hart = hart(0, MODE_SUPERVISOR, 0);
    let ends = |_| {
        // A reset creates this struct again, but the rate limit stays.
        let faults = faults("flood");
        answer(&faults, &hart, NOWHERE) == Some(Stop::FetchFaults { pc: NOWHERE })
    };
    let first = (0..=FAULTS_MAX).position(ends);
    assert_eq!(first, usize::try_from(FAULTS_MAX).ok());
}

#[test]
fn an_address_of_the_hosts_kvm_is_no_fetch() {
    let faults = faults("lost");
    let hart = hart(0, MODE_SUPERVISOR, 0);
    let pc = 0xffff_ffff_01a3_0000;
    let stop = Stop::LostTrap { pc };
    assert_eq!(answer(&faults, &hart, pc), Some(stop));
}
