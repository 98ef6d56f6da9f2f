//! Memslots: pieces of host memory that the guest can access. Each has a name. See
//! KVM_SET_USER_MEMORY_REGION in `Documentation/virt/kvm/api.rst`.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use rustix::io::Errno;
use vm_memory::GuestAddress;

use crate::memory::{Mapping, PAGE_SIZE, words_of};

/// Memory for the guest. It stays mapped as long as this value or a clone of it lives.
#[derive(Clone, Debug)]
pub struct Memslot {
    /// The name that identifies the memslot, also in messages, such as "RAM".
    pub name: &'static str,
    /// The guest-physical address, a multiple of the page size.
    pub gpa: GuestAddress,
    /// The memory. Its size has to be a multiple of the page size.
    pub mapping: Arc<Mapping>,
    /// If true, a store of the guest causes an exit,
    /// [`VmExit::MmioWrite`](super::VmExit::MmioWrite).
    pub readonly: bool,
}

/// A memslot with its number in the kernel.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The kernel's number for the memslot.
    pub number: u32,
    /// The memslot.
    pub memslot: Memslot,
    /// Whether the kernel logs the pages that the guest writes.
    pub logged: bool,
}

impl Placed {
    /// The number of words in the kernel's dirty bitmap.
    pub fn words(&self) -> usize {
        words_of(self.memslot.mapping.size())
    }

    /// The first page, and the number of pages, that `words` words of the bitmap stand for, from
    /// word `first` on. KVM_CLEAR_DIRTY_LOG takes only whole words, except for the last one of a
    /// memslot.
    ///
    /// # Errors
    /// EINVAL if `words` is 0, or if the bitmap has fewer words.
    pub fn pages(&self, first: usize, words: usize) -> io::Result<(u64, u32)> {
        const WORD: usize = u64::BITS as usize;
        let end = first.checked_add(words);
        let end = end.filter(|end| *end <= self.words() && words > 0);
        let end = end.ok_or(Errno::INVAL)?;
        let all = self.memslot.mapping.size() / usize::try_from(PAGE_SIZE).unwrap_or(usize::MAX);
        let count = all.min(end * WORD) - first * WORD;
        let count = u32::try_from(count).map_err(|_| Errno::INVAL)?;
        Ok(((first * WORD) as u64, count))
    }
}

/// The memslots of one machine.
#[derive(Debug, Default)]
pub struct Memslots(BTreeMap<u32, Placed>);

impl Memslots {
    /// Gives `memslot` the lowest free number. The caller passes the result to the kernel, and then
    /// to [`Memslots::insert`].
    ///
    /// # Errors
    /// EEXIST if another memslot has this name. ENOSPC if no number is free.
    pub fn place(&self, memslot: Memslot) -> io::Result<Placed> {
        if self.find(memslot.name).is_ok() {
            return Err(Errno::EXIST.into());
        }
        let free = (0..u32::MAX).find(|number| !self.0.contains_key(number));
        Ok(Placed {
            number: free.ok_or(Errno::NOSPC)?,
            memslot,
            logged: false,
        })
    }

    /// Adds `placed`, which the kernel knows now, or replaces the memslot with the same number.
    pub fn insert(&mut self, placed: Placed) {
        self.0.insert(placed.number, placed);
    }

    /// The memslot with this name.
    ///
    /// # Errors
    /// ENOENT if no memslot has this name.
    pub fn find(&self, name: &str) -> io::Result<&Placed> {
        let found = self.0.values().find(|placed| placed.memslot.name == name);
        found.ok_or_else(|| Errno::NOENT.into())
    }

    /// Removes the memslot with this number. Its memory is unmapped when no other reference is
    /// left.
    pub fn remove(&mut self, number: u32) {
        self.0.remove(&number);
    }

    /// All memslots, in the order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = &Placed> {
        self.0.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemConfig;
    use crate::memory::{self, Backing};
    use crate::util::ByteSize;
    use vm_memory::GuestMemoryBackend;

    fn memslot(name: &'static str, pages: u64) -> Memslot {
        let size = ByteSize(pages * PAGE_SIZE);
        let gpa = GuestAddress(0x2000_0000);
        let ram = memory::create(gpa, MemConfig::new(size), Backing::Private).unwrap();
        Memslot {
            name,
            gpa,
            mapping: ram.iter().next().unwrap().get_mmap(),
            readonly: true,
        }
    }

    #[test]
    fn numbers_come_back_and_names_are_unique() {
        let mut slots = Memslots::default();
        for (name, number) in [("RAM", 0), ("flash", 1), ("ROM", 2)] {
            let placed = slots.place(memslot(name, 1)).unwrap();
            assert_eq!(placed.number, number);
            slots.insert(placed);
        }
        assert!(slots.place(memslot("ROM", 1)).is_err());
        assert_eq!(slots.find("flash").unwrap().number, 1);
        slots.remove(1);
        assert!(slots.find("flash").is_err());
        assert_eq!(slots.place(memslot("other", 1)).unwrap().number, 1);
        assert_eq!(slots.iter().count(), 2);
    }

    #[test]
    fn words_are_of_whole_pages_to_the_end() {
        let mut slots = Memslots::default();
        slots.insert(slots.place(memslot("RAM", 130)).unwrap());
        let slot = slots.find("RAM").unwrap();
        assert_eq!(slot.words(), 3);
        for (first, words, pages) in [
            (0, 1, Some((0, 64))),
            (0, 3, Some((0, 130))),
            (1, 2, Some((64, 66))),
            (2, 1, Some((128, 2))),
            (0, 0, None),
            (2, 2, None),
            (3, 1, None),
            (usize::MAX, 2, None),
        ] {
            assert_eq!(slot.pages(first, words).ok(), pages, "{words} from {first}");
        }
    }
}
