use super::*;
use crate::hypervisor::{Aia, Doorbell, Result, Vcpu};
use crate::memory::GuestMemory;
use crate::util::ByteSize;
use vm_memory::GuestAddress;

/// A machine that keeps what it was told of interrupts and doorbells.
#[derive(Default)]
pub(crate) struct FakeVm {
    /// Each table of routes.
    pub(crate) tables: Mutex<Vec<Vec<(u32, MsiMessage)>>>,
    /// Connected interrupt numbers.
    pub(crate) irqfds: Mutex<Vec<u32>>,
    /// Connected doorbells.
    pub(crate) doorbells: Mutex<Vec<Doorbell>>,
    /// Levels that wires were set to.
    pub(crate) levels: Mutex<Vec<(u32, bool)>>,
}

impl Vm for FakeVm {
    fn check_ram(&self, _: GuestAddress, _: ByteSize) -> Result<()> {
        Ok(())
    }
    fn gpa_bits(&self) -> u32 {
        41
    }
    fn max_vcpus(&self) -> u32 {
        1
    }
    fn map_ram(&self, _: Arc<GuestMemory>) -> Result<()> {
        Ok(())
    }
    fn create_vcpu(&self, _: u32) -> Result<Box<dyn Vcpu>> {
        unreachable!("no vCPU")
    }
    fn create_aia(&self) -> Result<Option<Box<dyn Aia>>> {
        Ok(None)
    }
    fn set_irq_line(&self, source: u32, high: bool) -> Result<()> {
        lock(&self.levels).push((source, high));
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
}

fn message(data: u32) -> MsiMessage {
    MsiMessage {
        address: 0x2800_0000,
        data,
    }
}

#[test]
fn the_table_changes_only_with_a_message() {
    let vm = Arc::new(FakeVm::default());
    let router = MsiRouter::new(Arc::clone(&vm) as _);
    let (mut one, mut two) = (router.vector().unwrap(), router.vector().unwrap());
    router.connect([(&mut one, message(5)), (&mut two, message(6))]);
    assert_eq!(*lock(&vm.tables), [[(0, message(5)), (1, message(6))]]);
    assert_eq!(*lock(&vm.irqfds), [0, 1]);
    one.disconnect();
    router.connect([(&mut one, message(5))]);
    assert_eq!(lock(&vm.tables).len(), 1, "the same message again");
    router.connect([(&mut two, message(7))]);
    assert_eq!(lock(&vm.tables)[1], [(0, message(5)), (1, message(7))]);
    drop(one);
    assert_eq!(*lock(&vm.irqfds), [1]);
    assert_eq!(router.vector().unwrap().number, 0, "a number comes back");
}

#[test]
fn signals_stay_until_they_can_go() {
    let router = MsiRouter::new(Arc::new(FakeVm::default()));
    let mut vector = router.vector().unwrap();
    assert!(!vector.is_pending());
    vector.signal();
    vector.signal();
    assert!(vector.is_pending());
    router.connect([(&mut vector, message(1))]);
    assert!(!vector.is_pending(), "the kernel has it now");
}
