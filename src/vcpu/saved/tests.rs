use super::*;
use crate::hypervisor::fake::FakeVcpu;

const FCSR: RegId = RegId(0x8020_0000_0600_0020);
const F0: RegId = RegId(0x8030_0000_0600_0000);
const F0_SINGLE: RegId = RegId(0x8020_0000_0500_0000);
const V0: RegId = RegId(0x8040_0000_0900_0006);
const VLENB_ID: RegId = RegId(0x8030_0000_0900_0004);
const STA_LO: RegId = RegId(0x8030_0000_0a00_0000);
const STA_HI: RegId = RegId(0x8030_0000_0a00_0001);

fn values() -> Vec<(RegId, u64)> {
    vec![
        (regs::PC, 0x8020_1234),
        (regs::A0, 5),
        (regs::A1, 0x8030_0000),
        (regs::A2, 77),
        (regs::MODE, 1),
        (regs::SATP, 8 << 60),
        (regs::SSTATUS, 0x22),
        (regs::SIP, 0x200),
        (regs::SIE, 0x222),
        (regs::SCOUNTEREN, 7),
        (F0, 1),
        (FCSR, 0x1f),
        (F0_SINGLE, 1),
        (V0, 9),
        (VLENB_ID, 16),
        (STA_LO, 0x8040_0000),
        (STA_HI, 0),
        (RegId::isa_ext(13), 1),
        (RegId::isa_ext(17), 0),
        (regs::SBI_DBCN, 1),
        (regs::SATP_MODE, 9),
        (regs::MARCHID, 3),
        (regs::TIMER_FREQUENCY, 10_000_000),
        (regs::TIMER_TIME, 999),
        (regs::TIMER_COMPARE, 1000),
        (regs::TIMER_STATE, 0),
    ]
}

fn parked(first: First) -> Parked {
    let vcpu = Box::new(FakeVcpu::with(&values()));
    let stats = None;
    Parked { vcpu, first, stats }
}

/// A new vCPU: all registers are there, and most are 0.
fn new() -> FakeVcpu {
    let fixed = [
        VLENB_ID,
        regs::SATP_MODE,
        regs::TIMER_FREQUENCY,
        RegId::isa_ext(13),
    ];
    let value = |(id, value): &(RegId, u64)| (*id, if fixed.contains(id) { *value } else { 0 });
    FakeVcpu::with(&values().iter().map(value).collect::<Vec<_>>())
}

/// The same registers, but for one.
fn with(registers: &Registers, id: RegId, value: &[u8]) -> Registers {
    let all = registers.iter().chain([(id, value)]);
    let all = all.map(|(id, value)| (id.0, value.to_vec()));
    all.collect::<BTreeMap<_, _>>().into()
}

#[test]
fn all_registers_come_back() {
    let state = VcpuState::save(&parked(First::Enter)).unwrap();
    let json = serde_json::to_string(&state).unwrap();
    let read: VcpuState = serde_json::from_str(&json).unwrap();
    assert_eq!(read, state);
    let vcpu = new();
    assert_eq!(read.fit(&vcpu).unwrap(), Vec::<String>::new());
    read.load(&vcpu, 0).unwrap();
    for (id, value) in values() {
        let expected = match id {
            regs::SIP | F0_SINGLE | regs::TIMER_TIME => 0,
            _ => value,
        };
        assert_eq!(vcpu.get(id), expected, "{id}");
    }
    assert_eq!(vcpu.hart_state().unwrap(), HartState::Started);
    assert_eq!(read.first(false), First::Enter);
}

#[test]
fn what_the_host_lacks_is_named() {
    let state = VcpuState::save(&parked(First::Enter)).unwrap();
    let vcpu = new();
    for (id, value) in [
        (regs::SATP_MODE, 8),
        (VLENB_ID, 32),
        (regs::TIMER_FREQUENCY, 1),
    ] {
        vcpu.set_reg(id, value).unwrap();
    }
    assert_eq!(
        state.fit(&vcpu).unwrap(),
        [
            "config.satp_mode was 9 for the guest, and is 8 on this host",
            "timer.frequency was 10000000 for the guest, and is 1 on this host",
            "vector.vlenb was 16 for the guest, and is 32 on this host",
        ]
    );
    let fewer: Vec<_> = values()
        .into_iter()
        .filter(|(id, _)| *id != regs::A2)
        .collect();
    let lacks = state.fit(&FakeVcpu::with(&fewer)).unwrap();
    assert_eq!(
        lacks,
        ["the guest has a register core.a2, and this host's KVM does not have it"]
    );
}

#[test]
fn extensions_are_as_they_were() {
    let state = VcpuState::save(&parked(First::Enter)).unwrap();
    let vcpu = new();
    vcpu.set_reg(RegId::isa_ext(13), 0).unwrap();
    vcpu.set_reg(RegId::isa_ext(17), 1).unwrap();
    state.fit(&vcpu).unwrap();
    assert_eq!(vcpu.get(RegId::isa_ext(13)), 1);
    assert_eq!(vcpu.get(RegId::isa_ext(17)), 0);
    assert_eq!(vcpu.get(regs::SBI_DBCN), 1);
}

#[test]
fn a_hart_that_sleeps_resumes_where_it_asked_to() {
    let sleeper = Sleeper {
        enabled: 0x20,
        compare: 5,
        saved: vec![(0x70, 1)],
        is_reset: false,
    };
    let state = VcpuState::save(&parked(First::Sleep(sleeper))).unwrap();
    let vcpu = new();
    state.load(&vcpu, 3).unwrap();
    let expected = [
        (regs::PC, 0x8030_0000),
        (regs::A0, 3),
        (regs::A1, 77),
        (regs::SATP, 0),
        (regs::SSTATUS, 0),
    ];
    for (id, value) in expected {
        assert_eq!(vcpu.get(id), value, "{id}");
    }
    let First::Sleep(sleeper) = state.first(true) else {
        panic!("it sleeps on");
    };
    assert!(sleeper.is_reset);
    // Saved again before it wakes, it is the same.
    let first = First::Sleep(sleeper);
    let (vcpu, stats) = (Box::new(vcpu) as Box<dyn Vcpu>, None);
    let again = VcpuState::save(&Parked { vcpu, first, stats }).unwrap();
    assert_eq!(again.number(regs::PC), Some(0x8030_0000));
    assert_eq!(again.first(false), state.first(false));
}

#[test]
fn the_first_action_depends_on_the_host() {
    let mut state = VcpuState::save(&parked(First::Enter)).unwrap();
    state.started = false;
    assert_eq!(state.first(false), First::Enter);
    assert_eq!(state.first(true), First::WaitForStart);
    state.started = true;
    state.registers = with(&state.registers, regs::SIP, &2u64.to_le_bytes());
    assert_eq!(state.first(true), First::EnterNudged);
}

#[test]
fn hostile_registers_are_refused() {
    let good = VcpuState::save(&parked(First::Enter)).unwrap();
    // Registers that no host has are never written.
    let mut state = good.clone();
    state.registers = with(&state.registers, RegId(u64::MAX), &[1; 1 << 15]);
    assert!(!state.fit(&new()).unwrap().is_empty());
    let Hex(bytes) = good.registers.clone().into();
    assert_eq!(Registers::try_from(Hex(bytes.clone())), Ok(good.registers));
    let pc = [&regs::PC.0.to_le_bytes()[..], &[0; 8]].concat();
    let twice = [&pc[..], &pc].concat();
    let no_width = [0xff; 64].to_vec();
    // Each has one byte.
    let one = |id: u64| [&id.to_le_bytes()[..], &[0]].concat();
    let many = |count| (0..count).flat_map(one).collect::<Vec<u8>>();
    assert!(Registers::try_from(Hex(many(4096))).is_ok());
    for (bytes, line) in [
        (pc[..15].to_vec(), "a register has no value"),
        (pc[..7].to_vec(), "a register has no number"),
        (twice, "the registers are not in ascending order"),
        (no_width, "a register has no value"),
        (many(4097), "there are more registers than any hart has"),
    ] {
        assert_eq!(Registers::try_from(Hex(bytes)), Err(line));
    }
}
