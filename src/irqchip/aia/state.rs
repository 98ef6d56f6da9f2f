//! What an in-kernel AIA saves.

use serde::{Deserialize, Serialize};

use super::{SOURCES, SOURCES_LOSSY};
use crate::snapshot::{LoadError, Parts, State};

/// What a guest was told of its AIA when it started. A restored guest has to find the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Promise {
    /// The number of interrupt identities of each hart's file.
    pub identities: u32,
    /// The number of the last wired source that the device tree describes.
    pub sources: u32,
    /// Whether every identity works. If not, only 1 to 31 do, and the guest was given so few
    /// interrupts that they are enough.
    pub whole: bool,
}

impl Promise {
    /// The promise in `parts`, the state that an AIA has saved. Leaves the state there.
    ///
    /// # Errors
    /// Fails if there is no such state, or if no AIA of rvmm makes this promise.
    pub fn of(parts: &mut Parts) -> Result<Self, LoadError> {
        let AiaState { promise, .. } = parts.peek()?;
        promise.check()?;
        Ok(*promise)
    }

    fn check(self) -> Result<(), LoadError> {
        let Self {
            identities,
            sources,
            ..
        } = self;
        // The limits of aia_config in aia_device.c.
        if !(63..2048).contains(&identities) || identities % 64 != 63 {
            let line = format!("no IMSIC has {identities} interrupt identities");
            return Err(LoadError::Unfit(line));
        }
        if ![SOURCES, SOURCES_LOSSY].contains(&sources) {
            let line = format!("no APLIC of rvmm has {sources} wired sources");
            return Err(LoadError::Unfit(line));
        }
        Ok(())
    }
}

/// The state of an in-kernel AIA.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AiaState {
    pub(super) promise: Promise,
    /// Whether the APLIC sends messages: `domaincfg.IE`.
    pub(super) delivers: bool,
    /// The sources of the APLIC that are not as after a reset, in ascending order.
    pub(super) wires: Vec<WireState>,
    /// The IMSIC of each hart.
    pub(super) imsics: Vec<ImsicState>,
}

impl State for AiaState {
    const KIND: &'static str = "aia";
    const VERSION: u32 = 2;
}

/// The state of one wired source of the APLIC (AIA 1.0, section 4.5). The level of its input is
/// state of the device. In the snapshot it is a list, because most machines have dozens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    from = "(u32, u32, u32, bool, bool)",
    into = "(u32, u32, u32, bool, bool)"
)]
pub(super) struct WireState {
    /// The number of the source, from 1.
    pub(super) source: u32,
    /// The field SM of `sourcecfg`.
    pub(super) mode: u32,
    /// `target`.
    pub(super) target: u32,
    pub(super) enabled: bool,
    pub(super) pending: bool,
}

impl From<(u32, u32, u32, bool, bool)> for WireState {
    fn from((source, mode, target, enabled, pending): (u32, u32, u32, bool, bool)) -> Self {
        Self {
            source,
            mode,
            target,
            enabled,
            pending,
        }
    }
}

impl From<WireState> for (u32, u32, u32, bool, bool) {
    fn from(wire: WireState) -> Self {
        let WireState {
            source,
            mode,
            target,
            enabled,
            pending,
        } = wire;
        (source, mode, target, enabled, pending)
    }
}

/// The state of one hart's IMSIC (AIA 1.0, section 3.8).
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ImsicState {
    /// `eidelivery`.
    pub(super) delivers: bool,
    /// `eithreshold`.
    pub(super) threshold: u32,
    /// The identities whose bits in `eie` are set, in ascending order.
    pub(super) enabled: Vec<u32>,
    /// The identities whose bits in `eip` are set, in ascending order.
    pub(super) pending: Vec<u32>,
}

/// The bits of `target` that exist: identity, guest and hart.
const TARGET: u32 = !(1 << 11);
/// The largest value of the field SM.
const MODE_MAX: u32 = 7;

impl AiaState {
    /// Checks that an AIA with this promise and so many harts can have this state.
    ///
    /// # Errors
    /// Fails with what is wrong.
    pub(super) fn check(&self, promise: Promise, harts: u32) -> Result<(), LoadError> {
        let unfit = |line| Err(LoadError::Unfit(line));
        self.promise.check()?;
        if self.promise != promise {
            return unfit(format!(
                "the guest was promised {:?} of its AIA, and this machine has {promise:?}",
                self.promise
            ));
        }
        if u32::try_from(self.imsics.len()) != Ok(harts) {
            let found = self.imsics.len();
            return unfit(format!(
                "it has the IMSICs of {found} harts, and this machine has {harts}"
            ));
        }
        if !is_ascending(self.wires.iter().map(|wire| wire.source), SOURCES) {
            return unfit(format!(
                "its wired sources are not ascending numbers from 1 to {SOURCES}"
            ));
        }
        for wire in &self.wires {
            if wire.mode > MODE_MAX || wire.target & !TARGET != 0 {
                return unfit(format!("no APLIC can have {wire:?}"));
            }
            if self.delivers && wire.enabled && wire.pending {
                let source = wire.source;
                return unfit(format!("the message of wired source {source} was not sent"));
            }
        }
        for (hart, imsic) in self.imsics.iter().enumerate() {
            imsic.check(hart, promise.identities)?;
        }
        Ok(())
    }
}

impl ImsicState {
    fn check(&self, hart: usize, identities: u32) -> Result<(), LoadError> {
        let lists = [&self.enabled, &self.pending];
        if !lists
            .iter()
            .all(|list| is_ascending(list.iter().copied(), identities))
        {
            return Err(LoadError::Unfit(format!(
                "the interrupt identities of hart {hart} are not ascending numbers from 1 to \
                 {identities}"
            )));
        }
        if self.threshold > identities {
            return Err(LoadError::Unfit(format!(
                "the threshold of hart {hart} is {}, and there are {identities} interrupt \
                 identities",
                self.threshold
            )));
        }
        Ok(())
    }

    /// Whether an identity of the upper half of a word is enabled: KVM's emulated files lose it.
    pub(super) fn enables_upper_half(&self) -> bool {
        self.enabled.iter().any(is_upper)
    }

    /// Whether an identity of the upper half of a word is enabled or pending.
    pub(super) fn uses_upper_half(&self) -> bool {
        self.enables_upper_half() || self.pending.iter().any(is_upper)
    }

    /// Whether the state is that after a reset.
    pub(super) fn is_reset(&self) -> bool {
        let is_empty = self.enabled.is_empty() && self.pending.is_empty();
        is_empty && !self.delivers && self.threshold == 0
    }
}

fn is_upper(identity: &u32) -> bool {
    identity % 64 >= 32
}

/// Whether `numbers` are ascending, from 1 at least to `most` at most.
fn is_ascending(numbers: impl Iterator<Item = u32>, most: u32) -> bool {
    let mut last = 0;
    for number in numbers {
        if number <= last || number > most {
            return false;
        }
        last = number;
    }
    true
}
