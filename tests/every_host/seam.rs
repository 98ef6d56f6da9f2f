//! The interface to KVM, on machines of a few instructions: what a fake cannot show.
#![cfg(target_arch = "riscv64")]

use std::sync::Arc;

use rvmm::config::MemConfig;
use rvmm::hypervisor::kvm::Kvm;
use rvmm::hypervisor::{
    AiaConfig, AiaMode, Hypervisor, Memslot, RAM, RegId, Vcpu, Vm, VmEntry, VmExit, regs,
};
use rvmm::memory::{self, Backing, GuestMemory, pages_of};
use rvmm::util::ByteSize;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const BASE: u64 = 0x8000_0000;

/// A store to address 0, which is not RAM: `sd zero, 0(zero)`.
const STORE: u32 = 0x0000_3023;
/// `j .`
const SPIN: u32 = 0x0000_006f;

fn ram(gpa: u64) -> Arc<GuestMemory> {
    let config = MemConfig::new(ByteSize::mib(1));
    memory::create(GuestAddress(gpa), config, Backing::Shared).expect("RAM")
}

/// A machine with this code at the start of its RAM, and its one hart.
fn machine(code: &[u32]) -> (Arc<dyn Vm>, Box<dyn Vcpu>) {
    let vm = Kvm::open().expect("KVM").create_vm().expect("a VM");
    let ram = ram(BASE);
    let code: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
    ram.write_slice(&code, GuestAddress(BASE))
        .expect("the code");
    vm.map_ram(&ram).expect("a memslot");
    let vcpu = vm.create_vcpu(0).expect("a vCPU");
    vcpu.set_reg(regs::PC, BASE).expect("pc");
    (vm, vcpu)
}

/// The next exit that no signal caused.
fn exit(vcpu: &mut dyn Vcpu, mut entry: VmEntry) -> VmExit {
    loop {
        match vcpu.run(entry).expect("KVM_RUN") {
            VmExit::Interrupted => entry = VmEntry::Run,
            exit => return exit,
        }
    }
}

fn run_to_store(vcpu: &mut dyn Vcpu) {
    let exit = exit(vcpu, VmEntry::Run);
    assert!(matches!(exit, VmExit::MmioWrite { gpa: 0, .. }), "{exit:?}");
}

fn value(vcpu: &dyn Vcpu, id: RegId) -> u64 {
    vcpu.reg(id).expect("a register").expect("which is there")
}

/// `lw a0, 0(zero)`.
#[test]
fn a_load_is_completed_and_nothing_runs() {
    let (_vm, mut vcpu) = machine(&[0x0000_2503, SPIN]);
    let vcpu = vcpu.as_mut();
    let load = VmExit::MmioRead { gpa: 0, len: 4 };
    assert_eq!(exit(vcpu, VmEntry::Run), load);
    assert_eq!(value(vcpu, regs::PC), BASE);
    vcpu.complete(VmEntry::MmioRead(0x1234)).expect("completed");
    for _ in 0..2 {
        assert_eq!(value(vcpu, regs::A0), 0x1234);
        assert_eq!(value(vcpu, regs::PC), BASE + 4);
        // There is nothing to complete.
        vcpu.complete(VmEntry::Run).expect("completed");
    }
    let kicker = vcpu.kicker().expect("a kicker");
    kicker.set_immediate_exit(true);
    vcpu.complete(VmEntry::Run).expect("completed");
    // The guest spins, so a lost kick would hang here.
    assert_eq!(
        vcpu.run(VmEntry::Run).expect("KVM_RUN"),
        VmExit::Interrupted
    );
    kicker.set_immediate_exit(false);
    assert_eq!(value(vcpu, regs::PC), BASE + 4);
}

/// Stores to the third page of RAM, then to address 0, in a loop: `auipc t0, 0; lui t1, 2; add t0,
/// t0, t1; sd t0, 0(t0); sd zero, 0(zero); j .-20`.
const STORES: [u32; 6] = [0x0297, 0x2337, 0x0062_82b3, 0x0052_b023, STORE, 0xfedf_f06f];

fn logged(vm: &dyn Vm) -> Vec<usize> {
    let log = vm.dirty_log(RAM).expect("a log");
    assert_eq!(log.len(), 4);
    pages_of(&log).collect()
}

const NONE: [usize; 0] = [];

#[test]
fn what_the_guest_writes_is_logged() {
    let (vm, mut vcpu) = machine(&STORES);
    assert!(vm.dirty_log(RAM).is_err(), "not on");
    assert!(vm.set_dirty_log("flash", true).is_err(), "not there");
    // Before and after the page is mapped for writing.
    for _ in 0..2 {
        vm.set_dirty_log(RAM, true).expect("logging");
        for _ in 0..2 {
            run_to_store(vcpu.as_mut());
            assert_eq!(logged(vm.as_ref()), [2]);
            assert_eq!(logged(vm.as_ref()), NONE);
        }
        vm.set_dirty_log(RAM, false).expect("no logging");
        run_to_store(vcpu.as_mut());
    }
}

#[test]
fn a_log_is_cleared_by_hand() {
    let (vm, mut vcpu) = machine(&STORES);
    assert!(
        vm.clear_dirty_log_by_hand().expect("asked"),
        "every KVM supports this"
    );
    vm.set_dirty_log(RAM, true).expect("logging");
    for _ in 0..2 {
        run_to_store(vcpu.as_mut());
        assert_eq!(logged(vm.as_ref()), [2]);
        assert_eq!(
            logged(vm.as_ref()),
            [2],
            "it stays in the log until it is cleared"
        );
        vm.clear_dirty_log(RAM, 0, &[1 << 2]).expect("cleared");
        assert_eq!(logged(vm.as_ref()), NONE);
    }
    vm.clear_dirty_log(RAM, 2, &[0; 2]).expect("the last words");
    assert!(vm.clear_dirty_log(RAM, 3, &[0; 2]).is_err(), "too many");
}

/// `lui t0, 0x20000; ld a0, 0(t0); sd a0, 8(t0); ld a0, 0(t0)`.
#[test]
fn a_read_only_memslot_is_read_and_not_written() {
    const FLASH: u64 = 0x2000_0000;
    let code = [0x2000_02b7, 0x0002_b503, 0x00a2_b423, 0x0002_b503];
    let (vm, mut vcpu) = machine(&code);
    let flash = ram(FLASH);
    flash.write_obj(42u64, GuestAddress(FLASH)).expect("flash");
    let memslot = Memslot {
        name: "flash",
        gpa: GuestAddress(FLASH),
        mapping: flash.iter().next().expect("a region").get_mmap(),
        readonly: true,
    };
    vm.add_memslot(memslot.clone()).expect("a memslot");
    assert!(vm.add_memslot(memslot).is_err(), "twice");
    drop(flash);
    let store = exit(vcpu.as_mut(), VmEntry::Run);
    let mut data = [0; 8];
    data[0] = 42;
    let (gpa, len) = (FLASH + 8, 8);
    assert_eq!(store, VmExit::MmioWrite { gpa, len, data });
    vm.remove_memslot("flash").expect("removed");
    let load = exit(vcpu.as_mut(), VmEntry::Run);
    assert_eq!(load, VmExit::MmioRead { gpa: FLASH, len });
}

/// `ebreak`, with a trap handler 8 bytes further on.
#[test]
fn a_breakpoint_is_an_exit_or_the_guests() {
    let (_vm, mut vcpu) = machine(&[0x0010_0073, SPIN, STORE, SPIN]);
    vcpu.set_reg(regs::STVEC, BASE + 8).expect("stvec");
    vcpu.set_guest_debug(true).expect("debugged");
    for _ in 0..2 {
        assert_eq!(exit(vcpu.as_mut(), VmEntry::Run), VmExit::Breakpoint);
        assert_eq!(value(vcpu.as_ref(), regs::PC), BASE);
    }
    vcpu.set_guest_debug(false).expect("not debugged");
    run_to_store(vcpu.as_mut());
    assert_eq!(value(vcpu.as_ref(), regs::SCAUSE), 3);
    assert_eq!(value(vcpu.as_ref(), regs::SEPC), BASE);
}

#[test]
fn every_listed_register_has_its_width() {
    let (_vm, vcpu) = machine(&[SPIN]);
    let list = vcpu.reg_list().expect("a list");
    for known in [regs::PC, regs::MODE, regs::SATP, regs::TIMER_TIME] {
        assert!(list.contains(&known), "{known}");
    }
    for id in list {
        let bytes = vcpu.reg_bytes(id).unwrap_or_else(|e| panic!("{id}: {e:?}"));
        let width = bytes.map(|bytes| bytes.len());
        assert_eq!(width, id.width(), "{id} ({:#x})", id.0);
    }
    let pc = (BASE + 4).to_le_bytes();
    vcpu.set_reg_bytes(regs::PC, &pc).expect("written");
    assert_eq!(vcpu.reg_bytes(regs::PC).expect("read").expect("pc"), pc);
    assert!(
        vcpu.set_reg_bytes(regs::PC, &pc[..4]).is_err(),
        "half of a register must be refused"
    );
}

#[test]
fn the_aplic_has_its_registers() {
    /// `sourcecfg` of source 1, and a level that is active when high (AIA 1.0, section 4.5).
    const SOURCE: u32 = 4;
    const LEVEL_HIGH: u32 = 6;
    let vm = Kvm::open().expect("KVM").create_vm().expect("a VM");
    let Some(aia) = vm.create_aia().expect("asked") else {
        return;
    };
    let _vcpu = vm.create_vcpu(0).expect("a vCPU");
    for (attr, value) in [
        (AiaConfig::Mode, AiaMode::Emulated as u32),
        (AiaConfig::Sources, 63),
        (AiaConfig::GuestBits, 0),
        (AiaConfig::HartBits, 0),
    ] {
        aia.set_config(attr, value).expect("configured");
    }
    aia.place_aplic(GuestAddress(0x0d00_0000)).expect("placed");
    aia.place_imsic(0, GuestAddress(0x2800_0000))
        .expect("placed");
    aia.init().expect("started");
    aia.set_aplic(SOURCE, LEVEL_HIGH).expect("written");
    assert_eq!(aia.aplic(SOURCE).expect("read"), LEVEL_HIGH);
    assert!(aia.aplic(0x4000).is_err(), "behind the last register");
}
