//! A hypervisor for unit tests, which works on any host. It records the calls of the code under
//! test. Tests change its behaviour by its fields.

mod aia;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;
use vm_memory::{GuestAddress, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

use super::memslot::Memslots;
use super::{
    Aia, Counter, Doorbell, Error, ExternalIrq, HartState, Hypervisor, Kicker, Memslot, MsiMessage,
    RegId, Result, Vcpu, Vm, VmEntry, VmExit, Waiting,
};
use crate::util::ByteSize;
use crate::util::sync::lock;
pub(crate) use aia::FakeAia;

/// A record of calls, in their order.
type Steps = Arc<Mutex<Vec<String>>>;

/// Registers by id. A test keeps a clone to see their values.
pub(crate) type Registers = Arc<Mutex<HashMap<RegId, u64>>>;

/// Registers with these values.
pub(crate) fn registers(values: &[(RegId, u64)]) -> Registers {
    Arc::new(Mutex::new(values.iter().copied().collect()))
}

/// A fake virtual machine.
pub(crate) struct FakeVm {
    pub(crate) memslots: Mutex<Memslots>,
    /// The dirty logs that the fake kernel returns, by the names of the memslots.
    pub(crate) dirty: Mutex<HashMap<String, Vec<u64>>>,
    /// Each table of routes that was set.
    pub(crate) tables: Mutex<Vec<Vec<(u32, MsiMessage)>>>,
    /// Connected interrupt numbers.
    pub(crate) irqfds: Mutex<Vec<u32>>,
    /// Connected doorbells.
    pub(crate) doorbells: Mutex<Vec<Doorbell>>,
    /// The levels that wires were set to: source and level.
    pub(crate) levels: Mutex<Vec<(u32, bool)>>,
    /// The vCPUs that were created, and the calls to the AIA.
    pub(crate) steps: Steps,
    /// The AIA. `None` for a host without one.
    pub(crate) aia: Option<FakeAia>,
    /// Makes the vCPU of a hart.
    pub(crate) vcpu: Box<dyn Fn(u32) -> FakeVcpu + Send + Sync>,
}

/// The default has no AIA, and its vCPUs panic when they run.
impl Default for FakeVm {
    fn default() -> Self {
        Self {
            memslots: Mutex::default(),
            dirty: Mutex::default(),
            tables: Mutex::default(),
            irqfds: Mutex::default(),
            doorbells: Mutex::default(),
            levels: Mutex::default(),
            steps: Steps::default(),
            aia: None,
            vcpu: Box::new(|_| FakeVcpu::default()),
        }
    }
}

impl FakeVm {
    /// Reads `length` bytes of the guest's memory.
    pub(crate) fn read(&self, gpa: u64, length: usize) -> Vec<u8> {
        let memslots = lock(&self.memslots);
        let slot = memslots.iter().find_map(|placed| {
            let Memslot {
                gpa: at, mapping, ..
            } = &placed.memslot;
            let offset = usize::try_from(gpa.checked_sub(at.0)?).ok()?;
            mapping.get_slice(offset, length).ok()
        });
        let mut bytes = vec![0; length];
        slot.unwrap().copy_to(&mut bytes);
        bytes
    }
}

fn refused(act: &str, errno: Errno) -> Error {
    Error::refused(act, io::Error::from(errno))
}

/// After a reset, the machine is the same `FakeVm`. `create_vm` clears most of its records.
impl Hypervisor for Arc<FakeVm> {
    fn capabilities(&self) -> Vec<(&'static str, i32)> {
        Vec::new()
    }
    fn create_vm(&self) -> Result<Arc<dyn Vm>> {
        *lock(&self.memslots) = Memslots::default();
        lock(&self.tables).clear();
        lock(&self.irqfds).clear();
        lock(&self.doorbells).clear();
        lock(&self.levels).clear();
        Ok(self.clone())
    }
}

impl Vm for FakeVm {
    fn check_ram(&self, _: GuestAddress, _: ByteSize) -> Result<()> {
        Ok(())
    }
    fn gpa_bits(&self) -> u32 {
        59
    }
    fn max_vcpus(&self) -> u32 {
        8
    }
    fn add_memslot(&self, memslot: Memslot) -> Result<()> {
        let mut memslots = lock(&self.memslots);
        let placed = memslots.place(memslot);
        memslots.insert(placed.map_err(|e| Error::refused("add a memslot", e))?);
        Ok(())
    }
    fn remove_memslot(&self, name: &str) -> Result<()> {
        let mut memslots = lock(&self.memslots);
        let placed = memslots.find(name).map(|placed| placed.number);
        memslots.remove(placed.map_err(|e| Error::refused("remove a memslot", e))?);
        Ok(())
    }
    fn set_dirty_log(&self, name: &str, on: bool) -> Result<()> {
        let mut memslots = lock(&self.memslots);
        let placed = memslots.find(name).cloned();
        let mut placed = placed.map_err(|e| Error::refused("log a memslot", e))?;
        placed.logged = on;
        memslots.insert(placed);
        Ok(())
    }
    fn dirty_log(&self, name: &str) -> Result<Vec<u64>> {
        let memslots = lock(&self.memslots);
        let placed = memslots.find(name).ok().filter(|placed| placed.logged);
        let placed = placed.ok_or_else(|| refused("read a dirty log", Errno::NOENT))?;
        let mut log = lock(&self.dirty).remove(name).unwrap_or_default();
        log.resize(placed.words(), 0);
        Ok(log)
    }
    fn clear_dirty_log_by_hand(&self) -> Result<bool> {
        Ok(false)
    }
    fn clear_dirty_log(&self, _: &str, _: usize, _: &[u64]) -> Result<()> {
        Err(refused("clear a dirty log", Errno::INVAL))
    }
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>> {
        lock(&self.steps).push(format!("vCPU {id}"));
        Ok(Box::new((self.vcpu)(id)))
    }
    fn create_aia(&self) -> Result<Option<Box<dyn Aia>>> {
        lock(&self.steps).push("AIA".into());
        let on = |aia: &FakeAia| FakeAia {
            steps: Arc::clone(&self.steps),
            ..aia.clone()
        };
        Ok(self.aia.as_ref().map(|aia| Box::new(on(aia)) as _))
    }
    fn set_irq_line(&self, source: u32, high: bool) -> Result<()> {
        lock(&self.levels).push((source, high));
        if let Some(aia) = &self.aia {
            aia.set_input(source, high);
        }
        Ok(())
    }
    fn connect_doorbell(&self, doorbell: Doorbell, _: &EventFd) -> Result<()> {
        assert!(!lock(&self.doorbells).contains(&doorbell));
        lock(&self.doorbells).push(doorbell);
        Ok(())
    }
    fn disconnect_doorbell(&self, doorbell: Doorbell, _: &EventFd) -> Result<()> {
        assert!(lock(&self.doorbells).contains(&doorbell));
        lock(&self.doorbells).retain(|known| *known != doorbell);
        Ok(())
    }
    fn connect_irqfd(&self, gsi: u32, _: &EventFd) -> Result<()> {
        assert!(!lock(&self.irqfds).contains(&gsi));
        lock(&self.irqfds).push(gsi);
        Ok(())
    }
    fn disconnect_irqfd(&self, gsi: u32, _: &EventFd) -> Result<()> {
        assert!(lock(&self.irqfds).contains(&gsi));
        lock(&self.irqfds).retain(|known| *known != gsi);
        Ok(())
    }
    fn set_msi_routes(&self, routes: &[(u32, MsiMessage)]) -> Result<()> {
        lock(&self.tables).push(routes.to_vec());
        Ok(())
    }
    fn signal_msi(&self, message: MsiMessage) -> Result<()> {
        let aia = self.aia.as_ref();
        let aia = aia.ok_or_else(|| refused("send a message", Errno::INVAL))?;
        aia.receive(message)
    }
}

/// A fake vCPU.
pub(crate) struct FakeVcpu {
    /// The registers that have a value of their own.
    pub(crate) registers: Registers,
    /// The value of all other registers. `None` if the vCPU does not have them.
    pub(crate) others: Option<u64>,
    pub(crate) state: Arc<Mutex<HartState>>,
    /// Called by [`Vcpu::run`].
    pub(crate) on_run: Box<dyn FnMut(VmEntry) -> VmExit + Send>,
    /// Called before the hart's state is read.
    pub(crate) on_state: Box<dyn Fn() + Send>,
    /// The entries that were passed to [`Vcpu::complete`].
    pub(crate) completed: Arc<Mutex<Vec<VmEntry>>>,
    /// Whether the kicker requests an immediate exit.
    pub(crate) kicked: Arc<AtomicBool>,
    pub(crate) counters: Vec<Counter>,
    /// The wire to the external interrupt.
    pub(crate) wire: Arc<Wire>,
}

/// The default hart is started and has no registers. It panics when it runs.
impl Default for FakeVcpu {
    fn default() -> Self {
        Self {
            registers: Registers::default(),
            others: None,
            state: Arc::new(Mutex::new(HartState::Started)),
            on_run: Box::new(|entry| panic!("a fake vCPU ran without on_run, with {entry:?}")),
            on_state: Box::new(|| {}),
            completed: Arc::default(),
            kicked: Arc::default(),
            counters: Vec::new(),
            wire: Arc::default(),
        }
    }
}

impl FakeVcpu {
    /// A hart with these registers.
    pub(crate) fn with(values: &[(RegId, u64)]) -> Self {
        Self {
            registers: registers(values),
            ..Self::default()
        }
    }

    /// The value of a register. Panics if the vCPU does not have it.
    pub(crate) fn get(&self, id: RegId) -> u64 {
        self.reg(id).unwrap().unwrap()
    }
}

impl Vcpu for FakeVcpu {
    fn run(&mut self, entry: VmEntry) -> Result<VmExit> {
        Ok((self.on_run)(entry))
    }
    fn complete(&mut self, entry: VmEntry) -> Result<()> {
        lock(&self.completed).push(entry);
        Ok(())
    }
    fn reg(&self, id: RegId) -> Result<Option<u64>> {
        Ok(lock(&self.registers).get(&id).copied().or(self.others))
    }
    fn set_reg(&self, id: RegId, value: u64) -> Result<()> {
        lock(&self.registers).insert(id, value);
        Ok(())
    }
    fn reg_bytes(&self, id: RegId) -> Result<Option<Vec<u8>>> {
        let bytes = |value: u64| {
            let mut bytes = value.to_le_bytes().to_vec();
            bytes.resize(id.width().unwrap(), 0);
            bytes
        };
        Ok(self.reg(id)?.map(bytes))
    }
    fn set_reg_bytes(&self, id: RegId, bytes: &[u8]) -> Result<()> {
        assert_eq!(id.width(), Some(bytes.len()), "{id}");
        let mut value = [0; 8];
        let kept = bytes.len().min(8);
        value[..kept].copy_from_slice(&bytes[..kept]);
        self.set_reg(id, u64::from_le_bytes(value))
    }
    fn reg_list(&self) -> Result<Vec<RegId>> {
        let mut ids: Vec<_> = lock(&self.registers).keys().copied().collect();
        ids.sort_by_key(|id| id.0);
        Ok(ids)
    }
    fn set_guest_debug(&self, _: bool) -> Result<()> {
        Ok(())
    }
    fn external_irq(&self) -> Result<Arc<dyn ExternalIrq>> {
        Ok(self.wire.clone())
    }
    fn hart_state(&self) -> Result<HartState> {
        (self.on_state)();
        Ok(*lock(&self.state))
    }
    fn set_hart_state(&self, state: HartState) -> Result<()> {
        *lock(&self.state) = state;
        Ok(())
    }
    fn counters(&self) -> Result<Vec<Counter>> {
        Ok(self.counters.clone())
    }
    fn waiting(&self) -> Result<Box<dyn Waiting>> {
        Ok(Box::new(Awake))
    }
    fn kicker(&self) -> Result<Box<dyn Kicker>> {
        Ok(Box::new(Flag(Arc::clone(&self.kicked))))
    }
}

/// Records every level that a hart's external interrupt was set to.
#[derive(Default)]
pub(crate) struct Wire(pub(crate) Mutex<Vec<bool>>);

impl ExternalIrq for Wire {
    fn set_external(&self, high: bool) -> Result<()> {
        lock(&self.0).push(high);
        Ok(())
    }
}

/// Reports that the vCPU never waits for an interrupt.
struct Awake;

impl Waiting for Awake {
    fn waits(&self) -> bool {
        false
    }
}

struct Flag(Arc<AtomicBool>);

impl Kicker for Flag {
    fn set_immediate_exit(&self, on: bool) {
        self.0.store(on, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemConfig;
    use crate::hypervisor::{RAM, regs};
    use crate::memory::{self, Backing};
    use vm_memory::Bytes;

    #[test]
    fn ram_is_a_memslot_like_others() {
        let (vm, base) = (FakeVm::default(), GuestAddress(0x8000_0000));
        let ram = memory::create(base, MemConfig::new(ByteSize::mib(1)), Backing::Private).unwrap();
        vm.map_ram(&ram).unwrap();
        assert!(vm.map_ram(&ram).is_err(), "two memslots have one name");
        ram.write_slice(b"seen", GuestAddress(base.0 + 9)).unwrap();
        assert_eq!(vm.read(base.0 + 9, 4), b"seen");
        assert!(vm.dirty_log(RAM).is_err(), "the log is off");
        vm.set_dirty_log(RAM, true).unwrap();
        lock(&vm.dirty).insert(RAM.into(), vec![5]);
        assert_eq!(vm.dirty_log(RAM).unwrap(), [5, 0, 0, 0]);
        assert_eq!(vm.dirty_log(RAM).unwrap(), [0; 4]);
        vm.remove_memslot(RAM).unwrap();
        assert!(vm.set_dirty_log(RAM, true).is_err());
    }

    #[test]
    fn registers_are_numbers_and_bytes() {
        let fcsr = RegId(0x8020_0000_0600_0020);
        let mut vcpu = FakeVcpu::with(&[(regs::PC, 0x1234), (fcsr, 3)]);
        assert_eq!(vcpu.reg_list().unwrap(), [fcsr, regs::PC]);
        assert_eq!(vcpu.reg_bytes(fcsr).unwrap().unwrap(), [3, 0, 0, 0]);
        vcpu.set_reg_bytes(regs::PC, &[7, 0, 0, 0, 0, 0, 0, 1])
            .unwrap();
        assert_eq!(vcpu.get(regs::PC), (1 << 56) | 7);
        assert_eq!(vcpu.reg_bytes(regs::SATP).unwrap(), None);
        vcpu.complete(VmEntry::MmioRead(1)).unwrap();
        assert_eq!(*lock(&vcpu.completed), [VmEntry::MmioRead(1)]);
    }
}
