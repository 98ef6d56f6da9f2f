//! The property that all saved state has: what is loaded is saved again.
//!
//! [`survives`] starts from the state that a part saves. It changes single values in the JSON at
//! random, loads the result into a new part, and saves that. Either the part refuses the change, or
//! it saves what it has loaded.

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
/// Panics if a part saves other values than those it has loaded, or if it refuses all changes of
/// some value.
pub(crate) fn survives<P: Part + ?Sized, B: std::ops::Deref<Target = P>>(
    make: impl Fn() -> B,
    fixed: &[&str],
) {
    let first = make().save().unwrap();
    assert_eq!(reload(&make, &first).unwrap(), first, "without a change");
    let mut dice = Dice::new(7);
    for (at, saved) in first.iter().enumerate() {
        let state: Value = serde_json::from_slice(&saved.json).unwrap();
        let mut kept: BTreeMap<String, bool> = BTreeMap::new();
        for _ in 0..ROUNDS {
            let (mut other, path) = (state.clone(), pick(&state, &mut dice));
            let Some(path) = path else { break };
            if !change(other.pointer_mut(&path).unwrap(), &mut dice) {
                continue;
            }
            let mut all = first.clone();
            all[at].json = serde_json::to_vec(&other).unwrap();
            let kept = kept.entry(path.clone()).or_default();
            if let Ok(again) = reload(&make, &all) {
                *kept = true;
                assert_eq!(values(&again), values(&all), "after a change of {path}");
            }
        }
        let may_differ = |path: &str| fixed.iter().any(|end| path.ends_with(end));
        let lost = kept
            .iter()
            .filter(|(path, kept)| !**kept && !may_differ(path));
        let lost: Vec<_> = lost.map(|(path, _)| path).collect();
        assert!(lost.is_empty(), "always refused: {lost:?} in {state}");
    }
}

const ROUNDS: usize = 3000;

/// Loads `saved` into a new part, and returns what that saves.
fn reload<P: Part + ?Sized, B: std::ops::Deref<Target = P>>(
    make: impl Fn() -> B,
    saved: &[Saved],
) -> Result<Vec<Saved>, LoadError> {
    let (part, mut parts) = (make(), Parts::new(saved.to_vec()));
    part.load(&mut parts)?;
    parts.finish().unwrap();
    Ok(part.save().unwrap())
}

fn values(saved: &[Saved]) -> Vec<(&str, Value)> {
    let value = |saved: &Saved| serde_json::from_slice(&saved.json).unwrap();
    let each = saved.iter();
    each.map(|saved| (saved.kind.as_str(), value(saved)))
        .collect()
}

/// The path (RFC 6901) of a random number, truth value or list.
fn pick(state: &Value, dice: &mut Dice) -> Option<String> {
    let mut paths = Vec::new();
    collect(state, String::new(), &mut paths);
    (!paths.is_empty()).then(|| paths.swap_remove(dice.below(paths.len())))
}

fn collect(value: &Value, path: String, paths: &mut Vec<String>) {
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

/// Changes `value`, and returns whether it is another one now.
fn change(value: &mut Value, dice: &mut Dice) -> bool {
    let before = value.clone();
    match value {
        Value::Bool(on) => *on = !*on,
        Value::Number(_) | Value::Null => {
            // Small numbers are more frequent, because many registers have only a few bits.
            let widest = [5, 9, 65][dice.below(3)];
            let (bits, number) = (dice.below(widest), dice.next());
            *value = number
                .checked_shr(64 - u32::try_from(bits).unwrap())
                .unwrap_or(0)
                .into();
        }
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
