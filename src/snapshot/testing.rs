//! The property that all saved state has: what is loaded is saved again.
//!
//! [`survives`] starts from the state that a part saves. It changes single values in the JSON at
//! random, loads the result into a new part, and saves that. Each value must come back.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{LoadError, Parts, SaveError, Saved};

/// A part of a machine that saves and loads state.
pub(crate) trait Part {
    fn save(&self) -> Result<Vec<Saved>, SaveError>;
    fn load(&self, parts: &mut Parts) -> Result<(), LoadError>;
}

/// Random numbers (xorshift64*), the same at each run.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2).wrapping_add(1))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap()
    }
}

/// Checks the property for the parts that `make` makes. Each is made in a state that has
/// interesting values, such as by a driver that has set it up; it has to be paused. `fixed` are the
/// values, by the end of their path, that the part may refuse to change, such as sizes.
///
/// # Panics
/// Panics if a part saves other bytes than those it has loaded, or if some value never survived a
/// change.
pub(crate) fn survives<P: Part + ?Sized, B: std::ops::Deref<Target = P>>(
    make: impl Fn() -> B,
    fixed: &[&str],
) {
    survives_from(&make().save().unwrap(), make, fixed);
}

/// As [`survives`], for parts that load state only while they are new. `first` is the state with
/// interesting values, which another part has saved. `make` makes new parts.
///
/// # Panics
/// As [`survives`]. Also panics if a new part does not load `first`, or does not save it again.
pub(crate) fn survives_from<P: Part + ?Sized, B: std::ops::Deref<Target = P>>(
    first: &[Saved],
    make: impl Fn() -> B,
    fixed: &[&str],
) {
    let same = loaded(first.to_vec(), &make()).expect("it loads what it has saved");
    assert_eq!(text(&same), text(first));
    let mut dice = Dice::new(7);
    let may_differ = |path: &str| fixed.iter().any(|end| path.ends_with(end));
    for (at, saved) in first.iter().enumerate() {
        let state: Value = serde_json::from_slice(&saved.json).unwrap();
        let mut kept: BTreeMap<String, bool> = BTreeMap::new();
        let mut paths = Vec::new();
        collect(&state, String::new(), &mut paths);
        let least = (ROUNDS_EACH * paths.len()).min(ROUNDS);
        let lost = |kept: &BTreeMap<String, bool>| -> Vec<String> {
            let lost = kept.iter().filter(|(_, kept)| !**kept);
            let lost = lost.map(|(path, _)| path.clone());
            lost.filter(|path| !may_differ(path)).collect()
        };
        for round in 0..ROUNDS_MAX {
            if round >= least && lost(&kept).is_empty() {
                break;
            }
            let (mut other, path) = (state.clone(), &paths[dice.below(paths.len())]);
            if !change(other.pointer_mut(path).unwrap(), &mut dice) {
                continue;
            }
            let mut all = first.to_vec();
            all[at].json = serde_json::to_vec(&other).unwrap();
            let kept = kept.entry(path.clone()).or_default();
            let Some(again) = loaded(all, &make()) else {
                continue;
            };
            let value: Value = serde_json::from_slice(&again[at].json).unwrap();
            *kept |= value == other;
            // What was saved after a load loads, and is saved the same.
            let twice = loaded(again.clone(), &make()).unwrap();
            let (once, twice) = (text(&again), text(&twice));
            assert_eq!(once, twice, "after {path} in {other}");
        }
        let lost = lost(&kept);
        assert!(lost.is_empty(), "never kept: {lost:?} in {state}");
    }
}

/// Rounds for each value of a kind of state.
const ROUNDS_EACH: usize = 30;
/// Rounds for each kind of state, if it has many values.
const ROUNDS: usize = 3000;
/// Rounds at most, if some value was not kept so far.
const ROUNDS_MAX: usize = 20 * ROUNDS;

/// What `part` saves after it has loaded `saved`. `None` if it refuses that.
fn loaded<P: Part + ?Sized>(
    saved: Vec<Saved>,
    part: &impl std::ops::Deref<Target = P>,
) -> Option<Vec<Saved>> {
    let mut parts = Parts::new(saved);
    part.load(&mut parts).ok()?;
    parts.finish().unwrap();
    Some(part.save().unwrap())
}

fn text(saved: &[Saved]) -> Vec<String> {
    let text = |saved: &Saved| String::from_utf8(saved.json.clone()).unwrap();
    saved.iter().map(text).collect()
}

/// Adds the paths (RFC 6901) of all numbers, truth values, strings and lists in `value`, which is
/// at `path`.
pub(crate) fn collect(value: &Value, path: String, paths: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let key = key.replace('~', "~0").replace('/', "~1");
                collect(value, format!("{path}/{key}"), paths);
            }
        }
        Value::Array(list) => {
            paths.push(path.clone());
            for (index, value) in list.iter().enumerate() {
                collect(value, format!("{path}/{index}"), paths);
            }
        }
        Value::Number(_) | Value::Bool(_) | Value::String(_) | Value::Null => paths.push(path),
    }
}

/// A number in place of `before`: of any length, small, or with another value of one bit.
fn number(before: Option<u64>, dice: &mut Dice) -> u64 {
    match dice.below(3) {
        0 => {
            let bits = dice.below(65);
            let shift = 64 - u32::try_from(bits).unwrap();
            dice.next().checked_shr(shift).unwrap_or(0)
        }
        1 => dice.below(20) as u64,
        _ => {
            let bits = [8, 16, 32, 64][dice.below(4)];
            before.unwrap_or(0) ^ (1 << dice.below(bits))
        }
    }
}

/// Changes `value`, and returns whether it is another one now.
pub(crate) fn change(value: &mut Value, dice: &mut Dice) -> bool {
    let before = value.clone();
    match value {
        Value::Bool(on) => *on = !*on,
        Value::Number(_) | Value::Null => *value = number(value.as_u64(), dice).into(),
        Value::Array(list) => {
            let length = list.len();
            match dice.below(3) {
                0 if length > 0 => drop(list.remove(dice.below(length))),
                1 if length > 0 => list.push(list[dice.below(length)].clone()),
                _ => list.push(dice.below(256).into()),
            }
        }
        Value::String(text) => {
            let digit = char::from_digit(u32::try_from(dice.below(16)).unwrap(), 16).unwrap();
            let mut letters: Vec<char> = text.chars().collect();
            match dice.below(4) {
                0 => letters.truncate(letters.len().saturating_sub(2)),
                1 => letters.extend([digit; 2]),
                _ if letters.is_empty() => {}
                _ => {
                    let at = dice.below(letters.len());
                    letters[at] = digit;
                }
            }
            *text = letters.into_iter().collect();
        }
        Value::Object(_) => {}
    }
    *value != before
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::super::State;
    use super::*;
    use crate::util::sync::lock;
    use std::sync::Mutex;

    #[derive(Clone, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct SavedLamp {
        on: bool,
        level: u8,
    }

    impl State for SavedLamp {
        const KIND: &'static str = "lamp";
        const VERSION: u32 = 1;
    }

    struct Lamp {
        state: Mutex<SavedLamp>,
        forgets_level: bool,
    }

    impl Part for Lamp {
        fn save(&self) -> Result<Vec<Saved>, SaveError> {
            Ok(vec![Saved::of(&*lock(&self.state))?])
        }

        fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
            let saved: SavedLamp = parts.take()?;
            let mut state = lock(&self.state);
            state.on = saved.on;
            if !self.forgets_level {
                state.level = saved.level;
            }
            Ok(())
        }
    }

    fn lamp(forgets_level: bool) -> impl Fn() -> Box<Lamp> {
        move || {
            let state = Mutex::new(SavedLamp { on: true, level: 7 });
            Box::new(Lamp {
                state,
                forgets_level,
            })
        }
    }

    #[test]
    fn a_part_that_keeps_everything_passes() {
        survives(lamp(false), &[]);
        survives(lamp(true), &["/level"]);
    }

    #[test]
    #[should_panic(expected = "never kept: [\"/level\"]")]
    fn a_part_that_forgets_a_value_is_found() {
        survives(lamp(true), &[]);
    }
}
