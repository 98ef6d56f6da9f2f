//! Tracks which pages of guest RAM change, for snapshots that have only the changes.
//!
//! KVM logs what the guest writes, and `memory`'s log has what rvmm writes. What vhost writes is in
//! neither, so rvmm serves the queues itself while pages are tracked.

use anyhow::{Context, Result};

use crate::hypervisor::{RAM, Vm};
use crate::memory::{GuestMemory, dirty_log};

/// Starts to track, with no page marked. No vCPU may run, and the devices must be paused.
///
/// # Errors
/// Fails if KVM or the host refuses. Nothing is tracked then.
pub(super) fn start(vm: &dyn Vm, ram: &GuestMemory, has_huge_pages: bool) -> Result<()> {
    let failed = "Failed to track the changes of guest RAM";
    dirty_log(ram).start().context(failed)?;
    let logged = log_guest(vm, ram, has_huge_pages);
    if logged.is_err() {
        // It is off again also if the memory for its bits cannot be given back.
        let _ = dirty_log(ram).stop();
    }
    logged.context(failed)
}

fn log_guest(vm: &dyn Vm, ram: &GuestMemory, has_huge_pages: bool) -> Result<()> {
    if has_huge_pages {
        // Linux 6.12 cannot log a huge page that the guest has touched (see Vm::set_dirty_log). A
        // new memslot has no touched pages.
        vm.remove_memslot(RAM)?;
        vm.map_ram(ram)?;
    }
    vm.set_dirty_log(RAM, true)?;
    Ok(())
}

/// Stops to track.
///
/// # Errors
/// Fails if KVM or the host refuses.
pub(super) fn stop(vm: &dyn Vm, ram: &GuestMemory) -> Result<()> {
    vm.set_dirty_log(RAM, false)?;
    dirty_log(ram).stop()?;
    Ok(())
}

/// Returns the pages that have changed since the last call or the start, one bit for each page, and
/// clears the marks. The pages must be read after this call.
///
/// # Errors
/// Fails if KVM refuses.
pub(super) fn take(vm: &dyn Vm, ram: &GuestMemory) -> Result<Vec<u64>> {
    let mut pages = vm.dirty_log(RAM)?;
    let own = dirty_log(ram).take();
    pages.resize(pages.len().max(own.len()), 0);
    for (word, own) in pages.iter_mut().zip(own) {
        *word |= own;
    }
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemConfig;
    use crate::hypervisor::fake::FakeVm;
    use crate::memory::{self, Backing};
    use crate::util::ByteSize;
    use crate::util::sync::lock;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn both_logs_count() {
        let (vm, base) = (FakeVm::default(), GuestAddress(0x8000_0000));
        let config = MemConfig::new(ByteSize::mib(1));
        let ram = memory::create(base, config, Backing::Private).unwrap();
        vm.map_ram(&ram).unwrap();
        for has_huge_pages in [false, true] {
            start(&vm, &ram, has_huge_pages).unwrap();
            assert_eq!(take(&vm, &ram).unwrap(), [0; 4]);
            lock(&vm.dirty).insert(RAM.into(), vec![0b101]);
            ram.write_obj(1u8, GuestAddress(base.0 + 0x1000)).unwrap();
            ram.write_obj(1u8, GuestAddress(base.0 + 0xf_f000)).unwrap();
            assert_eq!(take(&vm, &ram).unwrap(), [0b111, 0, 0, 1 << 63]);
            assert_eq!(take(&vm, &ram).unwrap(), [0; 4]);
            stop(&vm, &ram).unwrap();
            assert!(take(&vm, &ram).is_err());
        }
    }
}
