//! The saved state of an interface. The tap of a restored machine is another one, so everything
//! that the device had set up in the tap is set up again when it starts.

use std::sync::atomic::Ordering;

use log::warn;
use serde::{Deserialize, Serialize};

use super::{Net, lock};
use crate::snapshot::{LoadError, Parts, SaveError, Saved, State};

/// What the driver knows of its interface, and has asked of it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedNet {
    /// The tap's MTU when the machine was built. 0 if it is unknown.
    mtu: u16,
    pairs: u16,
    /// The number of pairs that get packets.
    pairs_in_use: u16,
    /// The tap was deleted.
    link_gone: bool,
}

impl State for SavedNet {
    const KIND: &'static str = "virtio-net";
    const VERSION: u32 = 1;
}

impl Net {
    pub(super) fn save_state(&self) -> Result<Vec<Saved>, SaveError> {
        let shared = &self.shared;
        let state = SavedNet {
            mtu: self.mtu.load(Ordering::Acquire),
            pairs: self.pairs(),
            pairs_in_use: shared.pairs_in_use.load(Ordering::Acquire),
            link_gone: shared.link.is_gone(),
        };
        Ok(vec![Saved::of(&state)?])
    }

    /// The guest keeps the MTU that it has seen.
    pub(super) fn load_state(&self, parts: &mut Parts) -> Result<(), LoadError> {
        let SavedNet {
            mtu,
            pairs: there,
            pairs_in_use,
            link_gone,
        } = parts.take()?;
        let (here, shared) = (self.pairs(), &self.shared);
        let (name, tap) = (&shared.name, &shared.tap);
        if there != here {
            return Err(LoadError::Unfit(format!(
                "it has {there} pairs of queues in the snapshot, and {here} with tap {tap:?} now"
            )));
        }
        if !(1..=here).contains(&pairs_in_use) {
            return Err(LoadError::Unfit(format!(
                "it has {here} pairs of queues, and cannot use {pairs_in_use}"
            )));
        }
        let of_tap = self.mtu.swap(mtu, Ordering::AcqRel);
        if (1..mtu).contains(&of_tap) {
            warn!(
                "{name}: the guest's MTU is {mtu}, and that of tap {tap} is {of_tap}: larger \
                 packets may be lost"
            );
        }
        shared.pairs_in_use.store(pairs_in_use, Ordering::Release);
        lock(&shared.link.0).gone = link_gone;
        self.is_loaded.store(true, Ordering::Release);
        Ok(())
    }
}
