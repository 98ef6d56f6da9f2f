//! The interrupt file of one hart, as KVM's attributes show it.
//!
//! KVM of Linux up to at least 7.2 reads and writes a file that it emulates by `lr.w` and `sc.w`
//! (imsic_mrif_atomic_rmw in `aia_imsic.c`), although each register has 64 bits. A write changes
//! only the lower half. A read returns the lower half, and copies of its highest bit above. The
//! upper half exists all the same: messages set pending bits there, and it moves with a file from a
//! guest interrupt file of the host to an emulated one, and back.

use super::state::ImsicState;
use crate::hypervisor::{Aia, Result};
use crate::snapshot::LoadError;

/// Registers of an interrupt file, by their numbers in `siselect` (AIA 1.0, section 3.8).
pub(super) const EIDELIVERY: u64 = 0x70;
pub(super) const EITHRESHOLD: u64 = 0x72;
/// `eip0` and `eie0` have the pending and the enabled bits of identities 0 to 63. On RV64, the
/// register number of each further 64 identities is higher by 2.
pub(super) const EIP0: u64 = 0x80;
pub(super) const EIE0: u64 = 0xc0;
/// The value of `eidelivery` with which interrupts of the file reach the hart.
pub(super) const DELIVERS: u64 = 1;

/// The bits of each word of `eip` and `eie` that KVM shows and changes: all, or the lower half.
pub(super) const WHOLE: u64 = u64::MAX;
pub(super) const LOWER_HALF: u64 = 0xffff_ffff;

/// An identity in the upper half of `eie0`.
const UPPER: u64 = 1 << 40;

/// Whether KVM's emulated files have only [`LOWER_HALF`]. To be called before any vCPU runs: then
/// each file is an emulated one. Linux has files of guest interrupts in their place in mode AUTO,
/// once the vCPU runs, and as long as the host has free ones.
pub(super) fn is_lossy(aia: &dyn Aia) -> Result<bool> {
    const PROBE: u64 = UPPER | (1 << 5);
    aia.set_imsic(0, EIE0, PROBE)?;
    let kept = aia.imsic(0, EIE0)?;
    aia.set_imsic(0, EIE0, 0)?;
    Ok(kept != PROBE)
}

/// The offsets of the words of `eip` and `eie` from the first, in register numbers: 0, 2, 4 and so
/// on.
pub(super) fn words(identities: u32) -> impl Iterator<Item = u64> {
    (0..=u64::from(identities) / 64).map(|word| 2 * word)
}

/// The interrupt file of one hart. Its vCPU must not be in KVM_RUN.
pub(super) struct File<'a> {
    pub(super) aia: &'a dyn Aia,
    pub(super) hart: u32,
    pub(super) identities: u32,
}

impl File<'_> {
    fn read(&self, register: u64) -> Result<u64> {
        self.aia.imsic(self.hart, register)
    }

    fn write(&self, register: u64, value: u64) -> Result<()> {
        self.aia.set_imsic(self.hart, register, value)
    }

    /// Tries which bits of the file KVM shows and changes. Leaves it as it was: a bit that KVM does
    /// not change stays, and one that it changes is set back.
    pub(super) fn shown(&self) -> Result<u64> {
        let before = self.read(EIE0)?;
        self.write(EIE0, before ^ UPPER)?;
        let changed = self.read(EIE0)?;
        self.write(EIE0, before)?;
        Ok(if changed == before ^ UPPER {
            WHOLE
        } else {
            LOWER_HALF
        })
    }

    /// Reads the state, of which KVM shows the bits in `shown`.
    pub(super) fn save(&self, shown: u64) -> Result<ImsicState> {
        let threshold = u32::try_from(self.read(EITHRESHOLD)?).unwrap_or(u32::MAX);
        Ok(ImsicState {
            delivers: self.read(EIDELIVERY)? == DELIVERS,
            // An emulated file keeps values above the largest identity. They mean the same as 0.
            threshold: if threshold > self.identities {
                0
            } else {
                threshold
            },
            enabled: self.set_bits(EIE0, shown)?,
            pending: self.set_bits(EIP0, shown)?,
        })
    }

    /// The identities whose bits are set in the words that begin with `first`.
    fn set_bits(&self, first: u64, shown: u64) -> Result<Vec<u32>> {
        let mut set = Vec::new();
        for (word, low) in words(self.identities).zip((0..).step_by(64)) {
            let bits = self.read(first + word)? & shown;
            set.extend(
                (0..64)
                    .filter(|bit| bits & (1 << bit) != 0)
                    .map(|bit| low + bit),
            );
        }
        Ok(set)
    }

    /// Writes the state, of which KVM changes the bits in `shown`. The file has to be as after a
    /// reset; interrupts that are pending nevertheless stay so. `send` sends the hart a message
    /// with this identity: that sets a pending bit in any file, whole or not.
    ///
    /// # Errors
    /// Fails if KVM refuses a write, or does not keep an enabled identity.
    pub(super) fn load(
        &self,
        state: &ImsicState,
        shown: u64,
        send: impl Fn(u32) -> Result<()>,
    ) -> std::result::Result<(), LoadError> {
        self.write(EITHRESHOLD, state.threshold.into())?;
        for (word, low) in words(self.identities).zip((0..).step_by(64)) {
            let of_word = |identity: &&u32| (low..low + 64).contains(*identity);
            let enabled = state.enabled.iter().filter(of_word);
            let enabled = enabled.fold(0u64, |bits, identity| bits | (1 << (identity - low)));
            self.write(EIE0 + word, enabled)?;
            let lost = enabled & !(self.read(EIE0 + word)? & shown);
            if lost != 0 {
                return Err(self.cannot_enable(low + lost.trailing_zeros(), shown));
            }
        }
        state.pending.iter().copied().try_for_each(send)?;
        self.write(EIDELIVERY, state.delivers.into())?;
        Ok(())
    }

    fn cannot_enable(&self, identity: u32, shown: u64) -> LoadError {
        let why = if shown == WHOLE {
            ""
        } else {
            ": it has no guest interrupt file for this hart, and KVM's emulated ones lose the \
             upper half of every 64 identities"
        };
        let hart = self.hart;
        LoadError::Unfit(format!(
            "this host cannot enable interrupt identity {identity} of hart {hart}{why}"
        ))
    }
}
