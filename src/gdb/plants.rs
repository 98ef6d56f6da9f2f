//! Breakpoints in guest RAM: each is a `c.ebreak` in place of an instruction's first two bytes.
//!
//! They are in RAM only while the guest runs. While it is stopped, RAM has the guest's own code, so
//! a debugger that reads memory sees that.

use std::collections::BTreeSet;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::step::Place;
use crate::hypervisor::{Result, regs};
use crate::memory::GuestMemory;
use crate::util::icache;
use crate::vcpu::paging::{Walk, walk};
use crate::vcpu::thread::Parked;

/// `c.ebreak`. Its two bytes replace the start of any instruction.
const EBREAK: u16 = 0x9002;

/// The breakpoints of a guest.
pub struct Plants {
    ram: Arc<GuestMemory>,
    wanted: Wanted,
    /// Some of the wanted ones are not in RAM.
    are_missing: bool,
    /// Those that are in RAM now.
    planted: Vec<Plant>,
}

/// The breakpoints that are wanted.
enum Wanted {
    /// At these virtual addresses, as each hart's page tables translate them.
    Everywhere(Vec<u64>),
    /// At these places.
    At(Vec<Place>),
}

/// A breakpoint in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plant {
    /// Its guest-physical address.
    gpa: u64,
    /// What it replaces.
    code: u16,
}

impl Plants {
    /// No breakpoints in this RAM.
    pub fn new(ram: &Arc<GuestMemory>) -> Self {
        Self {
            ram: Arc::clone(ram),
            wanted: Wanted::At(Vec::new()),
            are_missing: false,
            planted: Vec::new(),
        }
    }

    /// From the next [`Plants::plant`] on: breakpoints at these virtual addresses, as each hart's
    /// page tables translate them.
    pub fn want_everywhere(&mut self, addresses: &BTreeSet<u64>) {
        self.wanted = Wanted::Everywhere(addresses.iter().copied().collect());
    }

    /// From the next [`Plants::plant`] on: breakpoints at these places.
    pub fn want(&mut self, places: Vec<Place>) {
        self.wanted = Wanted::At(places);
    }

    /// Whether addresses are wanted for which no hart had RAM at the last [`Plants::plant`].
    pub fn are_missing(&self) -> bool {
        self.are_missing
    }

    /// Puts the wanted breakpoints into RAM, before `harts` run. A place without RAM is left out: a
    /// hart that gets there faults.
    ///
    /// # Errors
    /// Fails if KVM cannot read a register.
    pub fn plant(&mut self, harts: &[Parked]) -> Result<()> {
        self.are_missing = false;
        match &self.wanted {
            Wanted::Everywhere(addresses) if addresses.is_empty() => return Ok(()),
            Wanted::At(places) if places.is_empty() => return Ok(()),
            Wanted::Everywhere(addresses) => {
                let satps = harts.iter().map(|hart| hart.vcpu.reg(regs::SATP));
                let satps: Vec<u64> = satps
                    .map(|satp| Ok(satp?.unwrap_or_default()))
                    .collect::<Result<_>>()?;
                for address in addresses.clone() {
                    let is_planted = satps.iter().fold(false, |is_planted, satp| {
                        self.plant_at(Place {
                            address,
                            satp: *satp,
                        }) || is_planted
                    });
                    self.are_missing |= !is_planted;
                }
            }
            Wanted::At(places) => {
                for place in places.clone() {
                    self.plant_at(place);
                }
            }
        }
        icache::flush();
        Ok(())
    }

    /// Plants a breakpoint at `place`. Does nothing if there is one. Returns false if no RAM is
    /// mapped there.
    fn plant_at(&mut self, place: Place) -> bool {
        let Walk::At(gpa) = walk(&self.ram, place.satp, place.address) else {
            return false;
        };
        if self.planted.iter().any(|plant| plant.gpa == gpa) {
            return true;
        }
        let at = GuestAddress(gpa);
        let Ok(code) = self.ram.read_obj::<u16>(at) else {
            return false;
        };
        let is_planted = self.ram.write_obj(EBREAK.to_le(), at).is_ok();
        if is_planted {
            self.planted.push(Plant { gpa, code });
        }
        is_planted
    }

    /// Puts the guest's own code back. If the guest has written there meanwhile, its bytes stay.
    pub fn remove(&mut self) {
        if self.planted.is_empty() {
            return;
        }
        // The last first: two of them may overlap.
        for Plant { gpa, code } in self.planted.drain(..).rev() {
            let at = GuestAddress(gpa);
            let now = self.ram.read_obj::<u16>(at);
            if now.is_ok_and(|now| u16::from_le(now) == EBREAK) {
                // Cannot fail: it was read from there.
                let _ = self.ram.write_obj(code, at);
            }
        }
        icache::flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemConfig;
    use crate::hypervisor::fake::FakeVcpu;
    use crate::memory::{self, Backing};
    use crate::util::ByteSize;

    const RAM: u64 = 0x8000_0000;

    fn plants() -> Plants {
        let config = MemConfig::new(ByteSize::mib(1));
        let ram = memory::create(GuestAddress(RAM), config, Backing::Private).unwrap();
        ram.write_obj(0x1122_3344_5566_7788u64.to_le(), GuestAddress(RAM))
            .unwrap();
        Plants::new(&ram)
    }

    fn word(plants: &Plants) -> u64 {
        u64::from_le(plants.ram.read_obj(GuestAddress(RAM)).unwrap())
    }

    fn at(address: u64) -> Place {
        Place { address, satp: 0 }
    }

    #[test]
    fn code_comes_back() {
        let mut plants = plants();
        plants.want(vec![at(RAM), at(RAM + 4), at(RAM)]);
        plants.plant(&[]).unwrap();
        assert_eq!(word(&plants), 0x1122_9002_5566_9002);
        plants.remove();
        assert_eq!(word(&plants), 0x1122_3344_5566_7788);
        // Two that overlap, one of them inside an instruction.
        plants.want(vec![at(RAM), at(RAM + 1)]);
        plants.plant(&[]).unwrap();
        plants.remove();
        assert_eq!(word(&plants), 0x1122_3344_5566_7788);
    }

    #[test]
    fn what_the_guest_has_written_stays() {
        let mut plants = plants();
        plants.want(vec![at(RAM)]);
        plants.plant(&[]).unwrap();
        plants.ram.write_obj(0u64, GuestAddress(RAM)).unwrap();
        plants.remove();
        assert_eq!(word(&plants), 0);
    }

    /// Of two harts, one has page tables that are outside RAM.
    #[test]
    fn one_hart_that_has_the_address_is_enough() {
        let hart = |satp| {
            let vcpu = FakeVcpu::with(&[(regs::SATP, satp)]);
            Parked::of_new(Box::new(vcpu), 0, false, None)
        };
        let harts = [hart(8 << 60), hart(0)];
        let mut plants = plants();
        plants.want_everywhere(&[RAM].into());
        plants.plant(&harts[..1]).unwrap();
        assert!(plants.are_missing());
        assert_eq!(word(&plants), 0x1122_3344_5566_7788);
        plants.plant(&harts).unwrap();
        assert!(!plants.are_missing());
        assert_eq!(word(&plants), 0x1122_3344_5566_9002);
        // No RAM.
        plants.want_everywhere(&[0x1000_0000, RAM + (1 << 20) - 1].into());
        plants.plant(&harts).unwrap();
        assert!(plants.are_missing());
    }
}
