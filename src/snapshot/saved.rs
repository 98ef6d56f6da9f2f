//! The state that one part of a machine saves, as versioned JSON.
//!
//! A part's saved state is a type of its own, beside the struct that it saves, and never that
//! struct itself. So a change of the struct does not change the format.

use std::any::Any;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::hypervisor;

/// A type of saved state. Types that implement this should deny unknown fields, and have no
/// optional ones: what is saved is restored, or the snapshot is refused.
pub trait State: Serialize + DeserializeOwned + 'static {
    /// What the state is of, such as `uart16550`. At most 31 bytes.
    const KIND: &'static str;
    /// The version of the type. It changes whenever the type changes.
    const VERSION: u32;
}

/// Why the state of a part cannot be saved.
#[derive(Debug, Error)]
pub enum SaveError {
    /// KVM refused to read a register.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// The state cannot be written as JSON, or the host refused something.
    #[error("{0}")]
    Other(String),
}

/// Why saved state cannot be taken over. The caller adds the name of the part.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The snapshot has no state of this kind for the part.
    #[error("there is no {kind} state")]
    Missing {
        /// [`State::KIND`].
        kind: &'static str,
    },
    /// A newer or older rvmm has written the state.
    #[error("its {kind} state has version {found}, and this rvmm knows only version {known}")]
    Version {
        /// [`State::KIND`].
        kind: &'static str,
        /// [`State::VERSION`].
        known: u32,
        /// The version in the snapshot.
        found: u32,
    },
    /// The state is not of the type.
    #[error("its {kind} state cannot be read: {reason}")]
    Malformed {
        /// [`State::KIND`].
        kind: &'static str,
        /// The first mistake.
        reason: String,
    },
    /// State of a kind that the part does not have.
    #[error("it has no {kind} state, but the snapshot has such")]
    Unknown {
        /// The kind in the snapshot.
        kind: String,
    },
    /// The state is that of another machine: this part cannot have it.
    #[error("{0}")]
    Unfit(String),
    /// KVM refused to write a register.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// The host refused something.
    #[error("{0}")]
    Other(String),
}

/// Saved state of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// [`State::KIND`].
    pub kind: String,
    /// [`State::VERSION`].
    pub version: u32,
    /// The state as JSON.
    pub json: Vec<u8>,
}

impl Saved {
    /// Writes `state` as JSON.
    ///
    /// # Errors
    /// Fails if the type cannot be written as JSON, which is a bug in rvmm.
    pub fn of<S: State>(state: &S) -> Result<Self, SaveError> {
        let json = serde_json::to_vec(state);
        Ok(Self {
            kind: S::KIND.into(),
            version: S::VERSION,
            json: json.map_err(|error| SaveError::Other(format!("{}: {error}", S::KIND)))?,
        })
    }

    /// Reads the state, which is of kind `S`.
    ///
    /// # Errors
    /// Fails if it has another version, or is not an `S`.
    fn read<S: State>(&self) -> Result<S, LoadError> {
        let (kind, known, found) = (S::KIND, S::VERSION, self.version);
        if known != found {
            return Err(LoadError::Version { kind, known, found });
        }
        serde_json::from_slice(&self.json).map_err(|error| LoadError::Malformed {
            kind,
            reason: error.to_string(),
        })
    }
}

/// The saved state of one part of a machine, of several kinds. The part takes all of it.
#[derive(Debug, Default)]
pub struct Parts(Vec<Part>);

#[derive(Debug)]
struct Part {
    saved: Saved,
    /// The state, if it was read already.
    read: Option<Box<dyn Any>>,
}

impl Parts {
    /// The parts that were saved.
    pub fn new(saved: Vec<Saved>) -> Self {
        let mut parts = Self::default();
        saved.into_iter().for_each(|saved| parts.add(saved));
        parts
    }

    /// Adds a part.
    pub fn add(&mut self, saved: Saved) {
        self.0.push(Part { saved, read: None });
    }

    /// What is not taken yet.
    pub fn iter(&self) -> impl Iterator<Item = &Saved> {
        self.0.iter().map(|part| &part.saved)
    }

    /// Takes the state of type `S`.
    ///
    /// # Errors
    /// Fails if there is none, or if it has another version or is not an `S`.
    pub fn take<S: State>(&mut self) -> Result<S, LoadError> {
        let at = self.0.iter().position(|part| part.saved.kind == S::KIND);
        let at = at.ok_or(LoadError::Missing { kind: S::KIND })?;
        let Part { saved, read } = self.0.remove(at);
        match read.map(|read| read.downcast()) {
            Some(Ok(read)) => Ok(*read),
            _ => saved.read(),
        }
    }

    /// Reads the state of type `S`, and leaves it to be taken, which does not read it again.
    ///
    /// # Errors
    /// As for [`Parts::take`].
    pub fn peek<S: State>(&mut self) -> Result<&S, LoadError> {
        let missing = LoadError::Missing { kind: S::KIND };
        let part = self.0.iter_mut().find(|part| part.saved.kind == S::KIND);
        let Some(Part { saved, read }) = part else {
            return Err(missing);
        };
        let read = match read {
            Some(read) => read,
            None => read.insert(Box::new(saved.read::<S>()?)),
        };
        read.downcast_ref().ok_or(missing)
    }

    /// Checks that everything was taken.
    ///
    /// # Errors
    /// Fails if something is left.
    pub fn finish(self) -> Result<(), LoadError> {
        match self.0.into_iter().next() {
            Some(Part { saved, .. }) => Err(LoadError::Unknown { kind: saved.kind }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Lamp {
        on: bool,
        color: [u8; 3],
    }

    impl State for Lamp {
        const KIND: &'static str = "lamp";
        const VERSION: u32 = 2;
    }

    fn lamp() -> Saved {
        let (on, color) = (true, [1, 2, 3]);
        Saved::of(&Lamp { on, color }).unwrap()
    }

    fn refused(saved: Saved) -> String {
        let error = Parts::new(vec![saved]).take::<Lamp>().unwrap_err();
        error.to_string()
    }

    #[test]
    fn what_is_saved_is_taken_once() {
        let mut parts = Parts::new(vec![lamp()]);
        assert_eq!(parts.iter().count(), 1);
        assert_eq!(parts.peek::<Lamp>().unwrap().color, [1, 2, 3]);
        assert_eq!(parts.take::<Lamp>().unwrap().color, [1, 2, 3]);
        let missing = parts.take::<Lamp>().unwrap_err().to_string();
        assert_eq!(missing, "there is no lamp state");
        assert!(parts.peek::<Lamp>().is_err());
        parts.finish().unwrap();
    }

    #[test]
    fn nothing_may_be_left() {
        let left = Parts::new(vec![lamp()]).finish().unwrap_err();
        assert_eq!(
            left.to_string(),
            "it has no lamp state, but the snapshot has such"
        );
    }

    #[test]
    fn other_state_is_refused() {
        let version = 3;
        let newer = refused(Saved { version, ..lamp() });
        assert_eq!(
            newer,
            "its lamp state has version 3, and this rvmm knows only version 2"
        );
        for (json, reason) in [
            (r#"{"on":true,"color":[1,2,3],"x":1}"#, "unknown field `x`"),
            (r#"{"on":true}"#, "missing field `color`"),
            (r#"{"on":true,"color":[1,2]}"#, "invalid length 2"),
            (r#"{"on":true,"color":[1,2,3]}!"#, "trailing characters"),
            ("", "EOF"),
        ] {
            let json = json.into();
            let line = refused(Saved { json, ..lamp() });
            assert!(line.contains(reason), "{line}");
        }
    }
}
