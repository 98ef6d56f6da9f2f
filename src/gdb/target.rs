//! The stopped guest, for gdbstub: reads and writes registers and memory, keeps breakpoints, and
//! notes how the guest is to go on.
//!
//! The machine lends it the vCPUs of a stopped guest for each packet of GDB, and takes them back.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::mem::take;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadRangeStepping, MultiThreadRangeSteppingOps, MultiThreadResume,
    MultiThreadResumeOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{
    SingleRegisterAccess, SingleRegisterAccessOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint, SwBreakpointOps,
    WatchKind,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use log::warn;
use vm_memory::{Bytes, GuestAddress};

use super::arch::{General, Register, Riscv};
use crate::hypervisor::{self, HartState, RegId, regs};
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::trace::Tracer;
use crate::util::icache;
use crate::vcpu::hart::Hart;
use crate::vcpu::paging::{Walk, walk};
use crate::vcpu::thread::Parked;

/// The most breakpoints.
const BREAKPOINTS_MAX: usize = 1024;

/// What `monitor` can do.
const COMMANDS: &str = "\
monitor info machine     where each hart is
monitor report           what each hart is doing, on rvmm's standard error
monitor reset            restart the guest, stopped
monitor trace on|off     record exits in the file of --trace, or do not
monitor physical on|off  addresses are guest-physical, or virtual
";

/// How a hart goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// It runs.
    Run,
    /// It executes one instruction.
    Step,
    /// It executes instructions as long as its pc is in this range.
    StepInside(Range<u64>),
}

/// How the guest goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// All harts run.
    All,
    /// Only this hart goes on, and the others stay where they are.
    Alone(usize, Action),
}

/// A command of GDB's `monitor` that the machine carries out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monitor {
    /// Restart the guest.
    Reset,
    /// Report what the harts are doing.
    Report,
}

/// The stopped guest.
pub struct Debugger {
    ram: Arc<GuestMemory>,
    /// The number of harts.
    count: usize,
    /// The vCPUs, in the order of their harts. Empty while the guest runs.
    harts: Vec<Parked>,
    /// Virtual addresses with a breakpoint.
    breakpoints: BTreeSet<u64>,
    /// How harts are to go on that GDB has named.
    actions: BTreeMap<usize, Action>,
    /// GDB wants the guest to go on.
    goes_on: bool,
    /// Addresses are guest-physical ones (`monitor physical on`).
    is_physical: bool,
    /// What the user has asked for with `monitor`, until the machine does it.
    asked: Option<Monitor>,
    /// The trace that `monitor trace` switches.
    tracer: Option<Tracer>,
}

impl Debugger {
    /// The debugger of a guest with this RAM and `count` harts. `tracer` is that of its trace.
    pub fn new(ram: &Arc<GuestMemory>, count: usize, tracer: Option<Tracer>) -> Self {
        Self {
            ram: Arc::clone(ram),
            count,
            harts: Vec::new(),
            breakpoints: BTreeSet::new(),
            actions: BTreeMap::new(),
            goes_on: false,
            is_physical: false,
            asked: None,
            tracer,
        }
    }

    /// Lends the vCPUs of a stopped guest: none if it runs.
    pub fn lend(&mut self, harts: Vec<Parked>) {
        self.harts = harts;
    }

    /// Returns the vCPUs.
    pub fn give_back(&mut self) -> Vec<Parked> {
        take(&mut self.harts)
    }

    /// Forgets what the last GDB has set.
    pub fn forget(&mut self) {
        self.breakpoints.clear();
        self.actions.clear();
        self.goes_on = false;
        self.is_physical = false;
    }

    /// If GDB wants the guest to go on: returns how. A hart that steps does so alone; if several
    /// are to step, the first does.
    pub fn take_resume(&mut self) -> Option<Resume> {
        if !take(&mut self.goes_on) {
            return None;
        }
        let mut actions = take(&mut self.actions).into_iter();
        // GDB names one hart if the others are to stay, as for a step over a breakpoint.
        let is_one = actions.len() == 1;
        let chosen = actions.find(|(_, action)| is_one || *action != Action::Run);
        Some(chosen.map_or(Resume::All, |(hart, action)| Resume::Alone(hart, action)))
    }

    /// What the user has asked the machine to do.
    pub fn take_asked(&mut self) -> Option<Monitor> {
        self.asked.take()
    }

    /// The virtual addresses with a breakpoint.
    pub fn breakpoints(&self) -> &BTreeSet<u64> {
        &self.breakpoints
    }

    fn hart(&self, tid: Tid) -> TargetResult<&Parked, Self> {
        self.harts.get(tid.get() - 1).ok_or(TargetError::NonFatal)
    }

    /// Calls `access` for each part of `length` bytes at `start` that is in one page, with its
    /// place in the bytes and its guest-physical address. Stops at the first part that is not
    /// mapped, and where `access` fails. Returns the number of bytes before it.
    fn by_page(
        &self,
        tid: Tid,
        start: u64,
        length: usize,
        mut access: impl FnMut(&GuestMemory, GuestAddress, Range<usize>) -> bool,
    ) -> TargetResult<usize, Self> {
        let satp = match self.is_physical {
            true => 0,
            false => read(self.hart(tid)?, regs::SATP)?,
        };
        let mut done = 0;
        while done < length {
            let address = start.wrapping_add(done as u64);
            let in_page = PAGE_SIZE - address % PAGE_SIZE;
            let count = usize::try_from(in_page).map_or(length, |room| room.min(length - done));
            let Walk::At(gpa) = walk(&self.ram, satp, address) else {
                break;
            };
            if !access(&self.ram, GuestAddress(gpa), done..done + count) {
                break;
            }
            done += count;
        }
        Ok(done)
    }
}

fn read(parked: &Parked, id: RegId) -> Result<u64, TargetError<hypervisor::Error>> {
    let value = parked.vcpu.reg(id).map_err(|_| TargetError::NonFatal)?;
    Ok(value.unwrap_or_default())
}

fn write(parked: &Parked, id: RegId, value: u64) -> Result<(), TargetError<hypervisor::Error>> {
    parked
        .vcpu
        .set_reg(id, value)
        .map_err(|_| TargetError::NonFatal)
}

impl Target for Debugger {
    type Arch = Riscv;
    type Error = hypervisor::Error;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Debugger {
    fn read_registers(&mut self, registers: &mut General, tid: Tid) -> TargetResult<(), Self> {
        let hart = self.hart(tid)?;
        for (index, register) in (1..).zip(registers.x.iter_mut().skip(1)) {
            *register = read(hart, RegId::core(index))?;
        }
        registers.pc = read(hart, regs::PC)?;
        Ok(())
    }

    fn write_registers(&mut self, registers: &General, tid: Tid) -> TargetResult<(), Self> {
        let hart = self.hart(tid)?;
        for (index, register) in (1..).zip(registers.x.iter().skip(1)) {
            write(hart, RegId::core(index), *register)?;
        }
        write(hart, regs::PC, registers.pc)
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let length = data.len();
        let done = self.by_page(tid, start, length, |ram, gpa, part| {
            ram.read_slice(&mut data[part], gpa).is_ok()
        })?;
        match done {
            0 if length > 0 => Err(TargetError::NonFatal),
            done => Ok(done),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let done = self.by_page(tid, start, data.len(), |ram, gpa, part| {
            ram.write_slice(&data[part], gpa).is_ok()
        })?;
        // It may be code.
        icache::flush();
        match done == data.len() {
            true => Ok(()),
            false => Err(TargetError::NonFatal),
        }
    }

    fn list_active_threads(&mut self, found: &mut dyn FnMut(Tid)) -> hypervisor::Result<()> {
        (1..=self.count)
            .filter_map(NonZeroUsize::new)
            .for_each(found);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for Debugger {
    fn read_register(
        &mut self,
        tid: Tid,
        register: Register,
        bytes: &mut [u8],
    ) -> TargetResult<usize, Self> {
        let value = match register.id {
            Some(id) => read(self.hart(tid)?, id)?,
            None => 0,
        };
        let room = bytes
            .get_mut(..register.width)
            .ok_or(TargetError::NonFatal)?;
        room.copy_from_slice(&value.to_le_bytes()[..register.width]);
        Ok(register.width)
    }

    fn write_register(
        &mut self,
        tid: Tid,
        register: Register,
        bytes: &[u8],
    ) -> TargetResult<(), Self> {
        let value = bytes.try_into().map(u64::from_le_bytes);
        let value = value.map_err(|_| TargetError::NonFatal)?;
        match register.id {
            Some(id) => write(self.hart(tid)?, id, value),
            None => Ok(()),
        }
    }
}

impl ThreadExtraInfo for Debugger {
    fn thread_extra_info(&self, tid: Tid, bytes: &mut [u8]) -> hypervisor::Result<usize> {
        let state = match self.hart(tid).map(|hart| hart.vcpu.hart_state()) {
            Ok(Ok(HartState::Started)) => "started",
            Ok(Ok(HartState::Stopped)) => "stopped",
            _ => "running",
        };
        let text = format!("hart {}, {state}", tid.get() - 1);
        let length = text.len().min(bytes.len());
        bytes[..length].copy_from_slice(&text.as_bytes()[..length]);
        Ok(length)
    }
}

impl MultiThreadResume for Debugger {
    fn resume(&mut self) -> hypervisor::Result<()> {
        // A client may send this while the guest runs. Then it has no effect.
        self.goes_on = !self.harts.is_empty();
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> hypervisor::Result<()> {
        self.actions.clear();
        Ok(())
    }

    fn set_resume_action_continue(
        &mut self,
        tid: Tid,
        signal: Option<Signal>,
    ) -> hypervisor::Result<()> {
        // With a signal, GDB names the hart of the last stop, and means all harts.
        if signal.is_none() {
            self.set_action(tid, Action::Run);
        }
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_range_step(&mut self) -> Option<MultiThreadRangeSteppingOps<'_, Self>> {
        Some(self)
    }
}

impl Debugger {
    /// Notes how a hart is to go on. A thread that is no hart is left out.
    fn set_action(&mut self, tid: Tid, action: Action) {
        let hart = tid.get() - 1;
        if hart < self.count {
            self.actions.insert(hart, action);
        }
    }
}

impl MultiThreadSingleStep for Debugger {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> hypervisor::Result<()> {
        self.set_action(tid, Action::Step);
        Ok(())
    }
}

impl MultiThreadRangeStepping for Debugger {
    fn set_resume_action_range_step(
        &mut self,
        tid: Tid,
        start: u64,
        end: u64,
    ) -> hypervisor::Result<()> {
        self.actions
            .insert(tid.get() - 1, Action::StepInside(start..end));
        Ok(())
    }
}

impl Breakpoints for Debugger {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Debugger {
    /// A breakpoint may be at an address that is not mapped yet.
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        if self.breakpoints.len() >= BREAKPOINTS_MAX {
            return Ok(false);
        }
        self.breakpoints.insert(address);
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.remove(&address))
    }
}

/// KVM on riscv64 has no watchpoints, so each is refused.
impl HwWatchpoint for Debugger {
    fn add_hw_watchpoint(&mut self, _: u64, _: u64, _: WatchKind) -> TargetResult<bool, Self> {
        warn!(
            "KVM on RISC-V has no watchpoints: with \"set can-use-hw-watchpoints 0\" GDB steps and \
             compares instead"
        );
        Ok(false)
    }

    fn remove_hw_watchpoint(&mut self, _: u64, _: u64, _: WatchKind) -> TargetResult<bool, Self> {
        Ok(false)
    }
}

impl MonitorCmd for Debugger {
    fn handle_monitor_cmd(
        &mut self,
        command: &[u8],
        mut out: ConsoleOutput<'_>,
    ) -> hypervisor::Result<()> {
        let command = String::from_utf8_lossy(command);
        let words: Vec<&str> = command.split_whitespace().collect();
        let answer = match words[..] {
            ["info", "machine"] => self.machine(),
            ["report"] => {
                self.asked = Some(Monitor::Report);
                "rvmm prints the report on its standard error\n".into()
            }
            ["reset"] => {
                self.asked = Some(Monitor::Reset);
                "the guest is reset, and stopped at its first instruction: use \"flushregs\"\n"
                    .into()
            }
            ["physical", switch @ ("on" | "off")] => {
                self.is_physical = switch == "on";
                let kind = ["virtual", "guest-physical"][usize::from(self.is_physical)];
                format!("addresses are {kind} now\n")
            }
            ["trace", switch @ ("on" | "off")] => self.switch_trace(switch == "on"),
            _ => COMMANDS.into(),
        };
        // Cannot fail: the output is kept in memory.
        let _ = out.write_str(&answer);
        Ok(())
    }
}

impl Debugger {
    fn switch_trace(&self, on: bool) -> String {
        match &self.tracer {
            Some(tracer) => {
                tracer.switch(on);
                let state = ["paused", "recorded"][usize::from(on)];
                format!("the trace is {state} now\n")
            }
            None => "there is no trace: start rvmm with --trace FILE\n".into(),
        }
    }

    /// What `monitor info machine` prints: where each hart is.
    fn machine(&self) -> String {
        let mut text = String::new();
        for (number, parked) in (0..).zip(&self.harts) {
            let line = match Hart::read(number, parked.vcpu.as_ref()) {
                Ok(hart) if hart.is_stopped => "stopped".to_owned(),
                Ok(hart) => format!("at {:#x}, satp {:#x}", hart.pc, hart.satp),
                Err(error) => error.to_string(),
            };
            let _ = writeln!(text, "hart {number}: {line}");
        }
        text
    }
}
