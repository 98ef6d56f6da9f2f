//! The registers of the APLIC, as KVM's attributes show them (AIA 1.0, section 4.5).

use super::SOURCES;
use super::state::WireState;
use crate::hypervisor::{Aia, Result};

/// Registers by their offsets. Those of sources begin with source 1.
const DOMAINCFG: u32 = 0;
const SOURCECFG: u32 = 4;
const SETIP: u32 = 0x1c00;
const SETIE: u32 = 0x1e00;
const TARGET: u32 = 0x3004;

/// `domaincfg.IE`: the APLIC sends messages.
const IE: u32 = 1 << 8;
/// The source mode Edge1. A source of this mode takes every write to `setip`.
const EDGE1: u32 = 4;

/// Bits for sources 0 to 63, in two registers.
struct Bits([u32; 2]);

impl Bits {
    fn read(aia: &dyn Aia, first: u32) -> Result<Self> {
        Ok(Self([aia.aplic(first)?, aia.aplic(first + 4)?]))
    }

    fn write(&self, aia: &dyn Aia, first: u32) -> Result<()> {
        aia.set_aplic(first, self.0[0])?;
        aia.set_aplic(first + 4, self.0[1])
    }

    fn of<'a>(wires: impl Iterator<Item = &'a WireState>) -> Self {
        let bits = wires.fold(0u64, |bits, wire| bits | (1 << (wire.source % 64)));
        let [low, high] = [bits & 0xffff_ffff, bits >> 32];
        Self([low, high].map(|half| u32::try_from(half).unwrap_or_default()))
    }

    fn has(&self, source: u32) -> bool {
        let word = self.0[usize::from(source >= 32)];
        word & (1 << (source % 32)) != 0
    }
}

/// The offset of the register of `source` among those that begin at `first`.
fn register(first: u32, source: u32) -> u32 {
    first + 4 * (source - 1)
}

/// Lets the APLIC send messages, or forbids it. If it may, it sends for each source that is pending
/// and enabled.
pub(super) fn set_delivers(aia: &dyn Aia, delivers: bool) -> Result<()> {
    aia.set_aplic(DOMAINCFG, if delivers { IE } else { 0 })
}

/// Reads whether the APLIC sends messages, and the sources that are not as after a reset. The
/// messages that are due are sent before.
pub(super) fn save(aia: &dyn Aia) -> Result<(bool, Vec<WireState>)> {
    let delivers = aia.aplic(DOMAINCFG)? & IE != 0;
    if delivers {
        // KVM can miss a message if its source is raised while a hart sets IE
        // (kvm_riscv_aia_aplic_inject in aia_aplic.c). Any write makes it look once more.
        set_delivers(aia, true)?;
    }
    let (enabled, pending) = (Bits::read(aia, SETIE)?, Bits::read(aia, SETIP)?);
    let mut wires = Vec::new();
    for source in 1..=SOURCES {
        let wire = WireState {
            source,
            mode: aia.aplic(register(SOURCECFG, source))?,
            target: aia.aplic(register(TARGET, source))?,
            enabled: enabled.has(source),
            pending: pending.has(source),
        };
        let is_reset = wire.mode == 0 && wire.target == 0 && !wire.enabled && !wire.pending;
        if !is_reset {
            wires.push(wire);
        }
    }
    Ok((delivers, wires))
}

/// Writes the sources. The APLIC has to be as after a reset, but for the inputs of the sources,
/// which the devices have set. It sends nothing before [`set_delivers`].
///
/// KVM ignores a write to `setip` for a source whose mode is a level, unless its input has that
/// level. But a source can be pending without: KVM leaves it so when the input changes
/// (`aia_aplic.c`). A change of the mode leaves the pending bits as they are, so a pending source
/// has another mode while its bit is set.
pub(super) fn load(aia: &dyn Aia, wires: &[WireState]) -> Result<()> {
    let pending = || wires.iter().filter(|wire| wire.pending);
    for wire in pending() {
        aia.set_aplic(register(SOURCECFG, wire.source), EDGE1)?;
    }
    Bits::of(pending()).write(aia, SETIP)?;
    for wire in wires {
        // Linux sets the target of every source, and the mode of a few.
        if wire.mode != 0 || wire.pending {
            aia.set_aplic(register(SOURCECFG, wire.source), wire.mode)?;
        }
        aia.set_aplic(register(TARGET, wire.source), wire.target)?;
    }
    let enabled = wires.iter().filter(|wire| wire.enabled);
    Bits::of(enabled).write(aia, SETIE)
}
