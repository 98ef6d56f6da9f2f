//! The PLIC's saved state. The levels of the harts' lines follow from it.

use serde::{Deserialize, Serialize};

use super::{Context, Core, PRIORITY_MASK, WORDS};
use crate::snapshot::{LoadError, State};
use crate::util::Hex;

/// What [`Core`] saves. A word has a bit for each source, the lowest for the lowest source.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in super::super) struct PlicState {
    /// A byte for each source, from source 0, which is none.
    priorities: Hex,
    pending: [u32; WORDS],
    levels: [u32; WORDS],
    in_service: [u32; WORDS],
    contexts: Vec<ContextState>,
}

/// What [`Context`] saves.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ContextState {
    enables: [u32; WORDS],
    threshold: u32,
}

impl State for PlicState {
    const KIND: &'static str = "plic";
    const VERSION: u32 = 1;
}

impl Core {
    pub(in super::super) fn save(&self) -> PlicState {
        let priorities = self.priorities.iter().map(|p| p.to_le_bytes()[0]);
        let contexts = self.contexts.iter().map(|context| ContextState {
            enables: context.enables,
            threshold: context.threshold,
        });
        PlicState {
            priorities: Hex(priorities.collect()),
            pending: self.pending,
            levels: self.levels,
            in_service: self.in_service,
            contexts: contexts.collect(),
        }
    }

    /// Takes over the state of another PLIC, which must have the same number of contexts.
    ///
    /// # Errors
    /// Fails if this PLIC can never be in this state. Nothing has changed then.
    pub(in super::super) fn load(&mut self, state: PlicState) -> Result<(), LoadError> {
        self.check(&state).map_err(LoadError::Unfit)?;
        let Hex(priorities) = state.priorities;
        for (own, saved) in self.priorities.iter_mut().zip(priorities) {
            *own = saved.into();
        }
        self.pending = state.pending;
        self.levels = state.levels;
        self.in_service = state.in_service;
        let contexts = state.contexts.into_iter().map(|context| Context {
            enables: context.enables,
            threshold: context.threshold,
        });
        self.contexts = contexts.collect();
        Ok(())
    }

    /// Checks that this PLIC can be in this state. Returns the reason why not.
    fn check(&self, state: &PlicState) -> Result<(), String> {
        let Hex(priorities) = &state.priorities;
        for (what, own, saved) in [
            ("contexts", self.contexts.len(), state.contexts.len()),
            ("priorities", self.priorities.len(), priorities.len()),
        ] {
            if own != saved {
                return Err(format!("it has {own} {what}, and the snapshot has {saved}"));
            }
        }
        let thresholds = state.contexts.iter().map(|context| context.threshold);
        let mut limited = thresholds.chain(priorities.iter().copied().map(u32::from));
        if let Some(number) = limited.find(|number| number & !PRIORITY_MASK != 0) {
            return Err(format!(
                "a priority or threshold is {number}, and {PRIORITY_MASK} is the limit"
            ));
        }
        let enables = state.contexts.iter().map(|context| &context.enables);
        let words = [&state.pending, &state.levels, &state.in_service];
        let mut of_sources = words.into_iter().chain(enables);
        if priorities.first() != Some(&0) || of_sources.any(|words| words[0] & 1 != 0) {
            return Err("there is state of source 0, which does not exist".into());
        }
        Ok(())
    }
}
