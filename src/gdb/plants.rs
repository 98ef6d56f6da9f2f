//! Breakpoints in guest RAM: each is a `c.ebreak` in place of an instruction's first two bytes.
//!
//! They are in RAM only while the guest runs. While it is stopped, RAM has the guest's own code, so
//! a debugger that reads memory sees that.

use vm_memory::{Bytes, GuestAddress};

use super::step::Place;
use crate::memory::GuestMemory;
use crate::vcpu::paging::{Walk, walk};

/// `c.ebreak`. Its two bytes replace the start of any instruction.
const EBREAK: u16 = 0x9002;

/// The breakpoints that are in RAM now.
#[derive(Debug, Default)]
pub struct Plants(Vec<Plant>);

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plant {
    /// Its guest-physical address.
    gpa: u64,
    /// What it replaces.
    code: u16,
}

impl Plants {
    /// Plants a breakpoint at `place`. Does nothing if there is one. Returns false if no RAM is
    /// mapped there: a hart that gets there faults.
    pub fn plant(&mut self, ram: &GuestMemory, place: Place) -> bool {
        let Walk::At(gpa) = walk(ram, place.satp, place.address) else {
            return false;
        };
        if self.has(gpa) {
            return true;
        }
        let at = GuestAddress(gpa);
        let Ok(code) = ram.read_obj::<u16>(at) else {
            return false;
        };
        let is_planted = ram.write_obj(EBREAK.to_le(), at).is_ok();
        if is_planted {
            self.0.push(Plant { gpa, code });
        }
        is_planted
    }

    /// Whether there is a breakpoint at the guest-physical address `gpa`.
    pub fn has(&self, gpa: u64) -> bool {
        self.0.iter().any(|plant| plant.gpa == gpa)
    }

    /// Puts the guest's own code back. If the guest has written there meanwhile, its bytes stay.
    pub fn remove_all(&mut self, ram: &GuestMemory) {
        // The last first: two of them may overlap.
        for Plant { gpa, code } in self.0.drain(..).rev() {
            let at = GuestAddress(gpa);
            let is_ours = ram
                .read_obj::<u16>(at)
                .is_ok_and(|now| u16::from_le(now) == EBREAK);
            if is_ours {
                // Cannot fail: it was read from there.
                let _ = ram.write_obj(code, at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemConfig;
    use crate::memory::{self, Backing};
    use crate::util::ByteSize;
    use std::sync::Arc;

    const RAM: u64 = 0x8000_0000;

    fn ram() -> Arc<GuestMemory> {
        let config = MemConfig::new(ByteSize::mib(1));
        let ram = memory::create(GuestAddress(RAM), config, Backing::Private).unwrap();
        ram.write_obj(0x1122_3344_5566_7788u64.to_le(), GuestAddress(RAM))
            .unwrap();
        ram
    }

    fn word(ram: &GuestMemory) -> u64 {
        u64::from_le(ram.read_obj(GuestAddress(RAM)).unwrap())
    }

    fn at(address: u64) -> Place {
        Place { address, satp: 0 }
    }

    #[test]
    fn code_comes_back() {
        let (ram, mut plants) = (ram(), Plants::default());
        assert!(plants.plant(&ram, at(RAM)));
        assert!(plants.plant(&ram, at(RAM + 4)));
        assert!(plants.plant(&ram, at(RAM)), "twice");
        assert_eq!(word(&ram), 0x1122_9002_5566_9002);
        assert!(plants.has(RAM + 4) && !plants.has(RAM + 2));
        plants.remove_all(&ram);
        assert_eq!(word(&ram), 0x1122_3344_5566_7788);
        assert!(!plants.has(RAM));
        // Two that overlap, one of them inside an instruction.
        assert!(plants.plant(&ram, at(RAM)) && plants.plant(&ram, at(RAM + 1)));
        plants.remove_all(&ram);
        assert_eq!(word(&ram), 0x1122_3344_5566_7788);
    }

    #[test]
    fn what_the_guest_has_written_stays() {
        let (ram, mut plants) = (ram(), Plants::default());
        assert!(plants.plant(&ram, at(RAM)));
        ram.write_obj(0u64, GuestAddress(RAM)).unwrap();
        plants.remove_all(&ram);
        assert_eq!(word(&ram), 0);
    }

    #[test]
    fn there_is_no_breakpoint_outside_ram() {
        let (ram, mut plants) = (ram(), Plants::default());
        assert!(!plants.plant(&ram, at(0x1000_0000)));
        assert!(!plants.plant(&ram, at(RAM + (1 << 20) - 1)));
        let unmapped = Place {
            address: 0x1000,
            satp: (8 << 60) | (RAM >> 12),
        };
        assert!(!plants.plant(&ram, unmapped));
        plants.remove_all(&ram);
    }
}
