use super::*;
use crate::hypervisor::fake::FakeVm;

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
    assert_eq!(lock(&vm.tables).len(), 1, "the message is the same");
    router.connect([(&mut two, message(7))]);
    assert_eq!(lock(&vm.tables)[1], [(0, message(5)), (1, message(7))]);
    drop(one);
    assert_eq!(*lock(&vm.irqfds), [1]);
    assert_eq!(
        router.vector().unwrap().number,
        0,
        "a free number is used again"
    );
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
    assert!(!vector.is_pending(), "the kernel takes the signal");
}
