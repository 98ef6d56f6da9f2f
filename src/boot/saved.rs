//! What a snapshot has of the guest's start: its device tree, and where the boot files were loaded.

use std::ops::Range;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::load::rng_seed;
use super::placement::Placement;
use crate::memory::GuestMemory;
use crate::snapshot::State;
use crate::util::Hex;

/// The device tree and the places of the boot files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BootState {
    /// The flattened device tree that the guest got.
    tree: Hex,
    kernel: Range<u64>,
    entry: u64,
    initrd: Option<Range<u64>>,
    fdt: Range<u64>,
}

impl State for BootState {
    const KIND: &'static str = "boot";
    const VERSION: u32 = 1;
}

impl BootState {
    /// The state to save.
    pub(crate) fn of(tree: &[u8], placement: &Placement) -> Self {
        Self {
            tree: Hex(tree.to_vec()),
            kernel: placement.kernel.clone(),
            entry: placement.entry,
            initrd: placement.initrd.clone(),
            fdt: placement.fdt.clone(),
        }
    }

    /// The device tree, and where the boot files were loaded.
    pub(crate) fn into_parts(self) -> (Vec<u8>, Placement) {
        let placement = Placement {
            kernel: self.kernel,
            entry: self.entry,
            initrd: self.initrd,
            fdt: self.fdt,
        };
        (self.tree.0, placement)
    }
}

/// The name of the property with the entropy, in the device tree's strings.
const SEED: &[u8] = b"rng-seed\0";

/// Gives the guest another `rng-seed`, if its kernel has not read the old one yet: Linux wipes it
/// when it reads it. `tree` is the device tree, which was loaded at `at`. Returns whether there is
/// a new seed.
///
/// # Errors
/// Fails if the host has no entropy, or if RAM cannot be written.
pub(crate) fn renew_seed(ram: &GuestMemory, tree: &[u8], at: u64) -> Result<bool> {
    let Some(seed) = find_seed(tree) else {
        return Ok(false);
    };
    let place = GuestAddress(at.saturating_add(seed.start as u64));
    let mut there = vec![0; seed.len()];
    let is_unread = ram.read_slice(&mut there, place).is_ok() && there == tree[seed];
    if is_unread {
        let fresh = rng_seed()?;
        let fresh = &fresh[..there.len().min(fresh.len())];
        let written = ram.write_slice(fresh, place);
        written.context("Failed to write a new rng-seed to guest RAM")?;
    }
    Ok(is_unread)
}

/// The place of the seed's bytes in a flattened device tree (Devicetree Specification 0.4, chapter
/// 5). None if there is no seed, or if the tree is not valid.
fn find_seed(tree: &[u8]) -> Option<Range<usize>> {
    const PROPERTY: u32 = 3;
    let word = |at: usize| {
        let bytes = tree.get(at..)?.first_chunk()?;
        Some(u32::from_be_bytes(*bytes))
    };
    let field = |number: usize| usize::try_from(word(4 * number)?).ok();
    let (structs, strings) = (field(2)?, field(3)?);
    let names = tree.get(strings..)?;
    let name = names.windows(SEED.len()).position(|name| name == SEED)?;
    let end = structs.checked_add(field(9)?)?;
    // A property is its token, the length of its value, the place of its name, and the value. A
    // value could look like that too, so the length has to be a seed's.
    let is_seed = |at: usize| {
        let found = [word(at), word(at + 4), word(at + 8)];
        let size = u32::try_from(super::fdt::RNG_SEED_SIZE).ok();
        found == [Some(PROPERTY), size, u32::try_from(name).ok()]
    };
    let at = (structs..end.min(tree.len()))
        .step_by(4)
        .find(|at| is_seed(*at))?
        + 12;
    Some(at..at + super::fdt::RNG_SEED_SIZE).filter(|seed| seed.end <= tree.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::fdt::RNG_SEED_SIZE;
    use crate::config::MemConfig;
    use crate::memory::{self, Backing};
    use crate::util::ByteSize;
    use vm_fdt::FdtWriter;

    const AT: u64 = 0x8000_1000;

    fn tree() -> Vec<u8> {
        let mut fdt = FdtWriter::new().unwrap();
        let root = fdt.begin_node("").unwrap();
        fdt.property_u32("before", 7).unwrap();
        let chosen = fdt.begin_node("chosen").unwrap();
        fdt.property("rng-seed", &[0xab; RNG_SEED_SIZE]).unwrap();
        fdt.end_node(chosen).unwrap();
        fdt.end_node(root).unwrap();
        fdt.finish().unwrap()
    }

    fn loaded(tree: &[u8]) -> std::sync::Arc<GuestMemory> {
        let config = MemConfig::new(ByteSize::mib(1));
        let ram = memory::create(GuestAddress(0x8000_0000), config, Backing::Private).unwrap();
        ram.write_slice(tree, GuestAddress(AT)).unwrap();
        ram
    }

    fn read(ram: &GuestMemory, tree: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; tree.len()];
        ram.read_slice(&mut bytes, GuestAddress(AT)).unwrap();
        bytes
    }

    #[test]
    fn a_seed_that_was_not_read_is_another_one() {
        let tree = tree();
        let ram = loaded(&tree);
        assert!(renew_seed(&ram, &tree, AT).unwrap());
        let after = read(&ram, &tree);
        let seed = find_seed(&tree).unwrap();
        assert_ne!(after[seed.clone()], tree[seed.clone()]);
        assert_eq!(after[..seed.start], tree[..seed.start]);
        assert_eq!(after[seed.end..], tree[seed.end..]);
    }

    #[test]
    fn memory_that_is_the_guests_is_left_alone() {
        let tree = tree();
        let ram = loaded(&tree);
        let seed = find_seed(&tree).unwrap();
        let first = GuestAddress(AT + seed.start as u64);
        ram.write_slice(&[0; RNG_SEED_SIZE], first).unwrap();
        let before = read(&ram, &tree);
        assert!(!renew_seed(&ram, &tree, AT).unwrap());
        assert_eq!(read(&ram, &tree), before);
        assert!(!renew_seed(&ram, &tree, u64::MAX - 8).unwrap());
    }

    #[test]
    fn a_tree_that_is_none_has_no_seed() {
        let tree = tree();
        for length in 0..tree.len() {
            let _ = find_seed(&tree[..length]);
        }
        for at in 0..40 {
            let mut bad = tree.clone();
            bad[at] ^= 0xff;
            let _ = find_seed(&bad);
        }
        assert_eq!(find_seed(b""), None);
    }
}
