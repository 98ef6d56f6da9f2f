//! A PLIC in userspace, for hosts without an AIA: RISC-V Platform-Level Interrupt Controller
//! Specification 1.0.0, with level-triggered gateways.
//!
//! `Core` is the controller itself, without input or output; [`Plic`] attaches it to the bus and to
//! the harts. As in QEMU's TCG, each hart has two contexts. The even one is for machine mode and
//! never delivers an interrupt; it is there because guests compute context numbers that way. The
//! odd one is for supervisor mode.

mod core;

use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

pub use self::core::SOURCES;
use self::core::{Core, PlicState};

use super::{HartSide, SavedRegister, hart_intc_phandle};
use crate::bus::{Device, FdtError, FdtWriter, IrqSink, MmioDevice};
use crate::hypervisor::{self, ExternalIrq};
use crate::snapshot::{LoadError, Parts, SaveError, Saved};
use crate::util::sync::lock;
use crate::util::{RateLimit, guest_warn};

/// The size of the registers in bytes, as in QEMU's virt machine.
pub const SIZE: u64 = 0x60_0000;

/// The largest number of harts: so many have both contexts within [`SIZE`].
pub const MAX_HARTS: u32 = 512;

const PHANDLE: u32 = 0x1000;
/// The numbers of the machine and supervisor external interrupts in a hart's local interrupt
/// controller.
const M_EXTERNAL: u32 = 11;
const S_EXTERNAL: u32 = 9;

/// The PLIC of a running machine.
pub struct Plic {
    state: Mutex<State>,
    base: u64,
    failures: RateLimit,
}

struct State {
    core: Core,
    harts: Vec<Hart>,
}

struct Hart {
    line: Arc<dyn ExternalIrq>,
    /// The current level of `line`.
    level: bool,
}

impl State {
    fn hart(&self, hart: u32) -> Option<&Hart> {
        self.harts.get(usize::try_from(hart).ok()?)
    }
}

impl Plic {
    /// A PLIC at guest-physical address `base`. `lines` are the wires to the external interrupts of
    /// the harts, at most [`MAX_HARTS`].
    pub fn new(base: u64, lines: Vec<Arc<dyn ExternalIrq>>) -> Self {
        let harts = lines.into_iter().map(|line| Hart { line, level: false });
        let harts: Vec<Hart> = harts.collect();
        Self {
            state: Mutex::new(State {
                core: Core::new(2 * harts.len()),
                harts,
            }),
            base,
            failures: RateLimit::named("PLIC"),
        }
    }

    /// Calls `access` on the controller. Then updates the harts' lines whose level has changed.
    fn with_core<T>(&self, access: impl FnOnce(&mut Core) -> T) -> T {
        let mut state = lock(&self.state);
        let State { core, harts } = &mut *state;
        let result = access(core);
        for (hart, context) in harts.iter_mut().zip(supervisor_contexts()) {
            let level = core.delivers(context);
            if level != hart.level {
                hart.level = level;
                if let Err(error) = hart.line.set_external(level) {
                    guest_warn!(self.failures, "{error}");
                }
            }
        }
        result
    }
}

/// The contexts that deliver interrupts: the supervisor contexts of hart 0, hart 1, and so on.
fn supervisor_contexts() -> impl Iterator<Item = usize> {
    (1..).step_by(2)
}

impl MmioDevice for Plic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.with_core(|core| core.read(offset, data));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.with_core(|core| core.write(offset, data));
    }
}

impl IrqSink for Plic {
    fn set_level(&self, source: u32, high: bool) {
        self.with_core(|core| core.set_level(source, high));
    }

    fn fdt_interrupt(&self, source: u32) -> Vec<u32> {
        vec![PHANDLE, source]
    }
}

impl HartSide for Plic {
    fn is_pending(&self, hart: u32, _: &[SavedRegister]) -> hypervisor::Result<bool> {
        let state = lock(&self.state);
        Ok(state.hart(hart).is_some_and(|hart| hart.level))
    }

    /// Returns nothing: rvmm itself keeps the registers, so KVM's reset of a hart does not change
    /// them.
    fn save(&self, _: u32) -> hypervisor::Result<Vec<SavedRegister>> {
        Ok(Vec::new())
    }

    /// Sets the level of the hart's line again, because KVM's reset clears it.
    fn restore(&self, hart: u32, _: &[SavedRegister]) -> hypervisor::Result<()> {
        let state = lock(&self.state);
        let hart = state.hart(hart);
        hart.map_or(Ok(()), |hart| hart.line.set_external(hart.level))
    }
}

impl Device for Plic {
    fn id(&self) -> &str {
        "plic"
    }

    fn describe(&self) -> Value {
        let harts = lock(&self.state).harts.len();
        json!({ "kind": "plic", "registers": self.base, "harts": harts, "sources": SOURCES })
    }

    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        let core = lock(&self.state).core.save();
        Ok(vec![Saved::of(&core)?])
    }

    /// Also sets the line of each hart, to low too: a hart's restored registers can have an
    /// external interrupt that is not pending any more.
    fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        let saved: PlicState = parts.take()?;
        let mut state = lock(&self.state);
        let State { core, harts } = &mut *state;
        core.load(saved)?;
        for (hart, context) in harts.iter_mut().zip(supervisor_contexts()) {
            hart.level = core.delivers(context);
            hart.line.set_external(hart.level)?;
        }
        Ok(())
    }

    fn fdt_node(&self, fdt: &mut FdtWriter) -> Result<(), FdtError> {
        let harts = (0..).take(lock(&self.state).harts.len());
        let contexts: Vec<u32> = harts
            .map(hart_intc_phandle)
            .flat_map(|intc| [intc, M_EXTERNAL, intc, S_EXTERNAL])
            .collect();
        let compatible = ["sifive,plic-1.0.0", "riscv,plic0"].map(String::from);
        let node = fdt.begin_node(&format!("interrupt-controller@{:x}", self.base))?;
        fdt.property_string_list("compatible", compatible.into())?;
        fdt.property_array_u64("reg", &[self.base, SIZE])?;
        fdt.property_null("interrupt-controller")?;
        fdt.property_u32("#interrupt-cells", 1)?;
        fdt.property_u32("#address-cells", 0)?;
        fdt.property_array_u32("interrupts-extended", &contexts)?;
        fdt.property_u32("riscv,ndev", SOURCES)?;
        fdt.property_phandle(PHANDLE)?;
        fdt.end_node(node)
    }
}

#[cfg(test)]
mod tests;
