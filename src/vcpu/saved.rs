//! The state of a vCPU in a snapshot: all registers that KVM lists, and what the hart does.
//!
//! KVM's list has no order in which registers can be written. [`VcpuState::load`] writes them in
//! an order that works on every kernel from Linux 6.12 on (`arch/riscv/kvm/vcpu_onereg.c`,
//! `vcpu_timer.c`, `vcpu_sbi_sta.c`).

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::first::{First, Sleeper};
use super::nudge::SOFTWARE;
use super::thread::Parked;
use crate::hypervisor::regs::{self, CYCLE_TIME_INSTRET, group};
use crate::hypervisor::{HartState, RegId, Result, Vcpu};
use crate::snapshot::{LoadError, State};
use crate::util::Hex;

/// The state of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// Whether the hart is started (SBI HSM).
    started: bool,
    /// If the guest has suspended the system: what wakes the hart.
    sleeps: Option<SleepState>,
    registers: Registers,
}

impl State for VcpuState {
    const KIND: &'static str = "vcpu";
    const VERSION: u32 = 2;
}

/// State of a hart that sleeps until an interrupt comes (SBI SUSP).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SleepState {
    /// `sie`.
    enabled: u64,
    /// The time at which the timer interrupts.
    compare: u64,
    /// Registers of the hart's interrupt controller: number and value.
    irqchip: Vec<(u64, u64)>,
}

/// The value of each register, in little-endian bytes, and KVM's id of the register.
///
/// In the snapshot they are one string of bytes: for each register its id, in 8 bytes, and its
/// value, as long as the id says. A vCPU has hundreds, and each start of a restored guest reads
/// them, so they stay where they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Hex", into = "Hex")]
struct Registers {
    bytes: Vec<u8>,
    /// Where the value of each register is, in the order of their ids.
    places: Vec<(u64, Range<usize>)>,
}

impl Registers {
    fn iter(&self) -> impl Iterator<Item = (RegId, &[u8])> {
        let places = self.places.iter();
        places.map(|(id, place)| (RegId(*id), &self.bytes[place.clone()]))
    }

    fn get(&self, id: RegId) -> Option<&[u8]> {
        let found = self.places.binary_search_by_key(&id.0, |(id, _)| *id);
        let (_, place) = &self.places[found.ok()?];
        Some(&self.bytes[place.clone()])
    }
}

impl TryFrom<Hex> for Registers {
    type Error = &'static str;

    fn try_from(Hex(bytes): Hex) -> std::result::Result<Self, &'static str> {
        let mut places = Vec::new();
        let (mut rest, mut last) = (bytes.as_slice(), None);
        while let Some((id, behind)) = rest.split_first_chunk() {
            let id = u64::from_le_bytes(*id);
            let width = RegId(id).width().filter(|width| *width <= behind.len());
            let width = width.ok_or("a register has no value")?;
            if last.replace(id) >= Some(id) {
                return Err("the registers are not in ascending order");
            }
            if places.len() == REGISTERS_MAX {
                return Err("there are more registers than any hart has");
            }
            let at = bytes.len() - behind.len();
            places.push((id, at..at + width));
            rest = &behind[width..];
        }
        match rest {
            [] => Ok(Self { bytes, places }),
            _ => Err("a register has no number"),
        }
    }
}

impl From<Registers> for Hex {
    fn from(registers: Registers) -> Self {
        Self(registers.bytes)
    }
}

impl From<BTreeMap<u64, Vec<u8>>> for Registers {
    fn from(values: BTreeMap<u64, Vec<u8>>) -> Self {
        let mut registers = Self::default();
        for (id, value) in values {
            registers.bytes.extend(id.to_le_bytes());
            let at = registers.bytes.len();
            registers.bytes.extend(value);
            registers.places.push((id, at..registers.bytes.len()));
        }
        registers
    }
}

/// The most registers that a vCPU may have in a snapshot. KVM has hundreds.
const REGISTERS_MAX: usize = 4096;

/// The number in a value of at most 64 bits.
fn number(value: &[u8]) -> Option<u64> {
    let mut bytes = [0; 8];
    bytes.get_mut(..value.len())?.copy_from_slice(value);
    Some(u64::from_le_bytes(bytes))
}

/// SEIP: the bit of the external interrupt in `sip`. The interrupt controller sets it.
const EXTERNAL: u64 = 1 << 9;
/// The index of `vlenb` among the vector registers.
const VLENB: u64 = 4;
/// Registers of SBI STA (subgroup 0 of group SBI_STATE): the guest's address of the shared memory.
const STA_LOW: u64 = 0;
const STA_HIGH: u64 = 1;

impl VcpuState {
    /// Saves a vCPU. Its pending resets were taken (see [`settle`](super::settle)).
    ///
    /// # Errors
    /// Fails if KVM cannot read a register.
    pub fn save(parked: &Parked) -> Result<Self> {
        let vcpu = parked.vcpu.as_ref();
        let mut registers = BTreeMap::new();
        let list = vcpu.reg_list()?;
        let has_doubles = list.iter().any(|id| id.group() == group::FP_D);
        for id in list {
            // The time is that of the machine.
            let is_saved = id != regs::TIMER_TIME && !(has_doubles && id.group() == group::FP_F);
            if let Some(bytes) = vcpu.reg_bytes(id)?.filter(|_| is_saved) {
                registers.insert(id.0, bytes);
            }
        }
        let sleeper = match &parked.first {
            First::Sleep(sleeper) => Some(sleeper),
            _ => None,
        };
        if sleeper.is_some_and(|sleeper| !sleeper.is_reset) {
            resume_after_sleep(&mut registers);
        }
        Ok(Self {
            started: sleeper.is_some() || vcpu.hart_state()? == HartState::Started,
            sleeps: sleeper.map(|sleeper| SleepState {
                enabled: sleeper.enabled,
                compare: sleeper.compare,
                irqchip: sleeper.saved.clone(),
            }),
            registers: registers.into(),
        })
    }

    /// What the first thread of the restored vCPU does. `hart` is the number of its hart.
    /// `host_resets_harts`: see [`restart`](super::restart).
    pub fn first(&self, host_resets_harts: bool) -> First {
        if let Some(sleep) = &self.sleeps {
            return First::Sleep(Sleeper {
                enabled: sleep.enabled,
                compare: sleep.compare,
                saved: sleep.irqchip.clone(),
                is_reset: true,
            });
        }
        let has_software = self.number(regs::SIP).unwrap_or_default() & SOFTWARE != 0;
        match self.started {
            true if has_software => First::EnterNudged,
            false if host_resets_harts => First::WaitForStart,
            _ => First::Enter,
        }
    }

    /// The value of a register of at most 64 bits.
    pub fn number(&self, id: RegId) -> Option<u64> {
        number(self.registers.get(id)?)
    }

    /// All registers and their values, in little-endian bytes.
    pub fn registers(&self) -> impl Iterator<Item = (RegId, &[u8])> {
        self.registers.iter()
    }

    /// Whether the hart is started.
    pub fn is_started(&self) -> bool {
        self.started
    }

    /// Turns the extensions of `vcpu`, which has never run, on or off as they were, and sets its
    /// ids. Returns what the guest needs and this host lacks, one line for each.
    ///
    /// An extension that the guest did not have and that KVM cannot turn off stays on: the guest
    /// does not know of it.
    ///
    /// # Errors
    /// Fails if KVM refuses to read a register.
    pub fn fit(&self, vcpu: &dyn Vcpu) -> Result<Vec<String>> {
        let mut lacks = Vec::new();
        for (id, bytes) in self.registers() {
            if !matches!(id.group(), group::ISA_EXT | group::SBI_EXT) || id.subgroup() != 0 {
                continue;
            }
            let saved = number(bytes).unwrap_or_default();
            let now = vcpu.reg(id)?.unwrap_or_default();
            let is_set = saved == now || vcpu.set_reg_bytes(id, bytes).is_ok();
            if saved != 0 && !is_set {
                lacks.push(format!(
                    "the guest uses {id}, and this host's KVM does not have it"
                ));
            }
        }
        for (id, bytes) in self.registers().filter(|(id, _)| must_be_equal(*id)) {
            let saved = number(bytes).unwrap_or_default();
            let now = vcpu.reg(id)?;
            if now != Some(saved) {
                let now = now.map_or("missing".into(), |now| now.to_string());
                lacks.push(format!(
                    "{id} was {saved} for the guest, and is {now} on this host"
                ));
            }
        }
        if lacks.is_empty() {
            let known = known(vcpu)?;
            let is_needed = |id: RegId, bytes: &[u8]| match id.group() {
                group::ISA_EXT | group::SBI_EXT | group::CONFIG => false,
                _ => bytes.iter().any(|byte| *byte != 0),
            };
            let missing = self
                .registers()
                .filter(|(id, bytes)| is_needed(*id, bytes) && !has(&known, *id));
            lacks.extend(missing.map(|(id, _)| {
                format!("the guest has a register {id}, and this host's KVM does not have it")
            }));
        }
        Ok(lacks)
    }

    /// Writes all registers of `vcpu`, which has never run and [fits](VcpuState::fit), and starts
    /// or stops its hart, which has the number `hart`. The machine's time has to be written after
    /// this, for one vCPU, and the interrupt controller's state too.
    ///
    /// # Errors
    /// Fails if KVM refuses a value.
    pub fn load(&self, vcpu: &dyn Vcpu, hart: u32) -> std::result::Result<(), LoadError> {
        let known = known(vcpu)?;
        let mut all: Vec<_> = self
            .registers()
            .filter(|(id, _)| has(&known, *id))
            .collect();
        all.sort_by_cached_key(|(id, _)| order(*id));
        for (id, bytes) in all {
            if order(id).is_none() || id == regs::TIMER_STATE && number(bytes) != Some(1) {
                continue;
            }
            if id == regs::SIP {
                let value = number(bytes).unwrap_or_default();
                vcpu.set_reg(id, value & !EXTERNAL)?;
            } else {
                vcpu.set_reg_bytes(id, bytes)?;
            }
        }
        if self.sleeps.is_some() {
            vcpu.set_reg(regs::A0, hart.into())?;
        }
        Ok(vcpu.set_hart_state(match self.started {
            true => HartState::Started,
            false => HartState::Stopped,
        })?)
    }
}

/// Makes the registers those with which a suspended hart resumes (SBI 3.0, "System Suspend
/// Extension"). The hart has made the call: a1 is the address, and a2 the value for a1. KVM has the
/// rest of the reset pending, which shows in no register.
fn resume_after_sleep(registers: &mut BTreeMap<u64, Vec<u8>>) {
    let value = |id: RegId| registers.get(&id.0).and_then(|bytes| number(bytes));
    let [address, opaque] = [regs::A1, regs::A2].map(|id| value(id).unwrap_or_default());
    for (id, value) in [
        (regs::PC, address),
        (regs::A1, opaque),
        (regs::SATP, 0),
        (regs::SSTATUS, 0),
        (regs::SCOUNTEREN, CYCLE_TIME_INSTRET),
    ] {
        registers.insert(id.0, value.to_le_bytes().into());
    }
}

/// The registers that the host's KVM has, sorted: a vCPU has hundreds.
fn known(vcpu: &dyn Vcpu) -> Result<Vec<RegId>> {
    let mut known = vcpu.reg_list()?;
    known.sort_unstable_by_key(|id| id.0);
    Ok(known)
}

/// Whether `known` has the register.
fn has(known: &[RegId], id: RegId) -> bool {
    known.binary_search_by_key(&id.0, |known| known.0).is_ok()
}

/// Whether a register's value is the host's, and cannot be changed for the guest.
fn must_be_equal(id: RegId) -> bool {
    let is_vlenb = id.group() == group::VECTOR && id.index() == VLENB;
    let is_fixed = [
        regs::ZICBOM_BLOCK_SIZE,
        regs::ZICBOZ_BLOCK_SIZE,
        regs::ZICBOP_BLOCK_SIZE,
        regs::SATP_MODE,
        regs::TIMER_FREQUENCY,
    ];
    is_vlenb || is_fixed.contains(&id)
}

/// The place of a register in the order in which registers are written. None if it is not written.
fn order(id: RegId) -> Option<(u64, u64, u64)> {
    let ids = [regs::MVENDORID, regs::MARCHID, regs::MIMPID];
    let place = match id.group() {
        _ if must_be_equal(id) => return None,
        group::CONFIG if !ids.contains(&id) => return None,
        group::ISA_EXT | group::SBI_EXT => return None,
        group::CONFIG => 0,
        group::CORE => 1,
        group::CSR => 2,
        group::FP_F | group::FP_D => 3,
        group::VECTOR => 4,
        group::SBI_STATE => 5,
        group::TIMER => 6,
        _ => 7,
    };
    let index = match (id.group(), id.subgroup(), id.index()) {
        // Linux 7.x forgets the lower half when the upper half is written after it.
        (group::SBI_STATE, 0, STA_HIGH) => STA_LOW,
        (group::SBI_STATE, 0, STA_LOW) => STA_HIGH,
        (.., index) => index,
    };
    Some((place, id.subgroup(), index))
}

#[cfg(test)]
mod tests;
