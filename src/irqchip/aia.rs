//! The in-kernel AIA: an APLIC, which turns wired interrupts into messages, and an IMSIC for each
//! hart.
//!
//! The specification is RISC-V Advanced Interrupt Architecture 1.0. `arch/riscv/kvm/aia_device.c`
//! demands the order of the set-up: the AIA is created before the vCPUs, and configured after them.
//!
//! A snapshot has the registers of the AIA, and what the guest was told of it ([`Promise`]).
//! `imsic` explains what KVM does not show of an interrupt file that it emulates.

mod aplic;
mod imsic;
mod state;

use std::sync::Arc;

use serde_json::{Value, json};
use vm_memory::GuestAddress;

use self::imsic::{
    DELIVERS, EIDELIVERY, EIE0, EIP0, EITHRESHOLD, File, LOWER_HALF, WHOLE, is_lossy,
};
pub use self::state::Promise;
use self::state::{AiaState, ImsicState};
use super::msi::MsiRouter;
use super::{HartSide, Messages, SavedRegister, hart_intc_phandle};
use crate::bus::{Device, FdtError, FdtWriter, IrqSink};
use crate::hypervisor::{Aia, AiaConfig, AiaMode, MsiMessage, Result, Vm};
use crate::snapshot::{LoadError, Parts, SaveError, Saved};
use crate::util::{RateLimit, guest_info, guest_warn};

/// The number of wired sources of the APLIC. rvmm uses sources below 36, as QEMU's virt machine
/// does. KVM allows no more sources than there are interrupt identities, which are at least 63.
pub const SOURCES: u32 = 63;

/// The number of wired sources in the device tree on a host with the lossy IMSIC. A guest that uses
/// all of them, each with an identity of its own, and one more identity for IPIs, needs no more
/// than 31 identities.
pub const SOURCES_LOSSY: u32 = 30;

/// The number of identities that work in a lossy file: 1 to 31. A guest takes the lowest ones
/// first.
const LOSSY_IDENTITIES: u32 = 31;

/// The number of identities that Linux takes before it takes any for messages: one for IPIs, one
/// each for the wires of the UART, the clock and the generation ID, and four for PCI's wires, which
/// it maps also if the devices use messages.
const RESERVED_IDENTITIES: u32 = 8;

/// The size of the APLIC's registers for one domain in bytes, as KVM has it.
pub const APLIC_SIZE: u64 = 0x4000;

/// The size of the IMSIC's page for one hart in bytes.
pub const IMSIC_SIZE: u64 = 0x1000;

const APLIC_PHANDLE: u32 = 0x1000;
const IMSIC_PHANDLE: u32 = 0x1001;

/// The number of the supervisor external interrupt in a hart's local interrupt controller.
const S_EXTERNAL: u32 = 9;
/// IRQ_TYPE_EDGE_RISING and IRQ_TYPE_LEVEL_HIGH of the device tree's interrupt bindings.
const EDGE_RISING: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// The guest-physical addresses of the controllers.
#[derive(Clone, Copy, Debug)]
pub struct Placement {
    /// The address of the APLIC's registers, [`APLIC_SIZE`] bytes.
    pub aplic: GuestAddress,
    /// The address of hart 0's IMSIC page. The pages of the other harts follow. It has to be
    /// aligned to the number of harts, rounded up to a power of two, times [`IMSIC_SIZE`].
    pub imsic: GuestAddress,
}

/// The in-kernel AIA of a running machine.
pub struct InKernelAia {
    vm: Arc<dyn Vm>,
    aia: Box<dyn Aia>,
    placement: Placement,
    harts: u32,
    promise: Promise,
    guest_files: bool,
    lossy: bool,
    failures: RateLimit,
}

impl InKernelAia {
    /// Configures and starts `aia`. To be called when all `harts` vCPUs of `vm` exist.
    ///
    /// Uses the host's guest interrupt files if it has them (mode AUTO). Uses KVM's emulation if
    /// not, or if `emulate` is true.
    ///
    /// `promise` is what a guest that is to be restored was told; `None` for a new guest. If this
    /// host cannot keep the promise, [`Device::load`] says so.
    ///
    /// # Errors
    /// Fails if KVM refuses a step.
    pub fn start(
        vm: Arc<dyn Vm>,
        aia: Box<dyn Aia>,
        placement: Placement,
        harts: u32,
        emulate: bool,
        promise: Option<Promise>,
    ) -> Result<Self> {
        let set_mode = |mode: AiaMode| aia.set_config(AiaConfig::Mode, mode as u32);
        // KVM accepts AUTO only if the host has guest interrupt files.
        let auto = !emulate && set_mode(AiaMode::Auto).is_ok();
        if !auto {
            set_mode(AiaMode::Emulated)?;
        }
        aia.set_config(AiaConfig::Sources, SOURCES)?;
        aia.set_config(AiaConfig::GuestBits, 0)?;
        aia.set_config(AiaConfig::HartBits, hart_bits(harts))?;
        let most = aia.config(AiaConfig::Ids)?;
        let identities = promise.map_or(most, |promise| promise.identities.min(most));
        if identities != most {
            aia.set_config(AiaConfig::Ids, identities)?;
        }
        aia.place_aplic(placement.aplic)?;
        for hart in 0..harts {
            let base = placement.imsic.0 + u64::from(hart) * IMSIC_SIZE;
            aia.place_imsic(hart, GuestAddress(base))?;
        }
        aia.init()?;
        let lossy = is_lossy(aia.as_ref())?;
        let new = Promise {
            identities,
            sources: if lossy { SOURCES_LOSSY } else { SOURCES },
            whole: auto || !lossy,
        };
        let promise = promise.map_or(new, |promise| Promise {
            identities,
            ..promise
        });
        let started = Self {
            vm,
            aia,
            placement,
            harts,
            promise,
            guest_files: auto,
            lossy,
            failures: RateLimit::named("AIA"),
        };
        started.log();
        Ok(started)
    }

    fn log(&self) {
        let mode = if self.guest_files { "AUTO" } else { "EMUL" };
        let Promise {
            identities,
            sources,
            ..
        } = self.promise;
        guest_info!(
            RateLimit::named("PLIC or AIA"),
            "in-kernel AIA: mode {mode}, {identities} interrupt identities, {sources} wired sources"
        );
        if self.lossy {
            guest_info!(
                RateLimit::named("AIA is lossy"),
                "in-kernel AIA: this host's KVM loses the upper half of every 64 identities of an \
                 emulated IMSIC (lr.w in aia_imsic.c): the guest gets so few \
                 interrupts that 31 are enough"
            );
        }
    }

    /// Whether messages go to the host's guest interrupt files.
    pub fn has_guest_files(&self) -> bool {
        self.guest_files
    }

    /// The number of interrupt identities of each hart's file.
    pub fn identities(&self) -> u32 {
        self.promise.identities
    }

    /// The number of the last wired source that the device tree describes.
    pub fn sources(&self) -> u32 {
        self.promise.sources
    }

    /// How messages reach the harts.
    pub fn messages(&self) -> Messages {
        Messages {
            router: MsiRouter::new(Arc::clone(&self.vm)),
            phandle: IMSIC_PHANDLE,
            vectors: self.message_identities(),
        }
    }

    /// The number of identities in one hart's file that are left for messages. So many messages
    /// work even if the guest sends all of them to one hart.
    ///
    /// If the host has guest interrupt files, this counts the identities of those, and each queue
    /// can have a vector of its own. If there are more vCPUs than files, KVM uses the lossy
    /// emulation for the others, and messages may be lost there.
    fn message_identities(&self) -> u32 {
        let usable = if self.promise.whole {
            self.promise.identities
        } else {
            LOSSY_IDENTITIES
        };
        usable.saturating_sub(RESERVED_IDENTITIES)
    }

    /// Whether KVM's emulated interrupt files lose identities.
    pub fn is_lossy(&self) -> bool {
        self.lossy
    }

    fn file(&self, hart: u32) -> File<'_> {
        File {
            aia: self.aia.as_ref(),
            hart,
            identities: self.promise.identities,
        }
    }

    /// The address of the page of `hart`.
    fn page(&self, hart: u32) -> u64 {
        self.placement.imsic.0 + u64::from(hart) * IMSIC_SIZE
    }

    /// The bits of each word that KVM shows and changes of the file of `hart`.
    fn shown(&self, hart: u32) -> Result<u64> {
        match (self.lossy, self.guest_files) {
            (false, _) => Ok(WHOLE),
            (true, false) => Ok(LOWER_HALF),
            (true, true) => self.file(hart).shown(),
        }
    }

    /// The state of the file of `hart`. None if KVM does not show all of it: then the guest may
    /// have enabled identities while the hart had a guest interrupt file of the host, which it does
    /// not have now.
    ///
    /// On a host without such files nothing is hidden that a guest can find out: it cannot enable
    /// these identities, or read whether they are pending.
    fn save_file(&self, hart: u32) -> Result<Option<ImsicState>> {
        let shown = self.shown(hart)?;
        let state = self.file(hart).save(shown)?;
        let is_hidden = self.guest_files && shown != WHOLE && !state.is_reset();
        Ok((!is_hidden).then_some(state))
    }

    fn load_file(&self, hart: u32, state: &ImsicState) -> std::result::Result<(), LoadError> {
        let shown = self.shown(hart)?;
        let address = self.page(hart);
        self.file(hart).load(state, shown, |data| {
            self.vm.signal_msi(MsiMessage { address, data })
        })
    }

    /// Checks that this host can give a guest with `state` what it was promised, and has used.
    fn check_host(&self, state: &AiaState) -> std::result::Result<(), LoadError> {
        let (asked, most) = (state.promise.identities, self.promise.identities);
        if asked > most {
            return Err(LoadError::Unfit(format!(
                "the guest was given {asked} interrupt identities, and this host has {most}"
            )));
        }
        if !self.lossy || self.guest_files {
            return Ok(());
        }
        let is_used = state.imsics.iter().any(ImsicState::uses_upper_half);
        if state.promise.whole || is_used {
            return Err(LoadError::Unfit(format!(
                "the guest may use all of {asked} interrupt identities, and only \
                 {LOSSY_IDENTITIES} work here: it needs a host with guest interrupt files"
            )));
        }
        Ok(())
    }

    fn imsic_node(&self, fdt: &mut FdtWriter) -> std::result::Result<(), FdtError> {
        let base = self.placement.imsic.0;
        let size = u64::from(self.harts) * IMSIC_SIZE;
        let files: Vec<u32> = (0..self.harts)
            .flat_map(|hart| [hart_intc_phandle(hart), S_EXTERNAL])
            .collect();
        let node = fdt.begin_node(&format!("interrupt-controller@{base:x}"))?;
        fdt.property_string("compatible", "riscv,imsics")?;
        fdt.property_array_u64("reg", &[base, size])?;
        fdt.property_null("interrupt-controller")?;
        fdt.property_u32("#interrupt-cells", 0)?;
        fdt.property_u32("#address-cells", 0)?;
        fdt.property_null("msi-controller")?;
        fdt.property_u32("#msi-cells", 0)?;
        fdt.property_array_u32("interrupts-extended", &files)?;
        fdt.property_u32("riscv,num-ids", self.promise.identities)?;
        fdt.property_phandle(IMSIC_PHANDLE)?;
        fdt.end_node(node)
    }

    fn aplic_node(&self, fdt: &mut FdtWriter) -> std::result::Result<(), FdtError> {
        let base = self.placement.aplic.0;
        let node = fdt.begin_node(&format!("interrupt-controller@{base:x}"))?;
        fdt.property_string("compatible", "riscv,aplic")?;
        fdt.property_array_u64("reg", &[base, APLIC_SIZE])?;
        fdt.property_null("interrupt-controller")?;
        fdt.property_u32("#interrupt-cells", 2)?;
        fdt.property_u32("#address-cells", 0)?;
        fdt.property_u32("msi-parent", IMSIC_PHANDLE)?;
        fdt.property_u32("riscv,num-sources", self.promise.sources)?;
        fdt.property_phandle(APLIC_PHANDLE)?;
        fdt.end_node(node)
    }
}

/// The number of bits that are needed to number `harts` harts.
fn hart_bits(harts: u32) -> u32 {
    harts.next_power_of_two().trailing_zeros()
}

impl IrqSink for InKernelAia {
    fn set_level(&self, source: u32, high: bool) {
        if let Err(error) = self.vm.set_irq_line(source, high) {
            guest_warn!(
                self.failures,
                "{error}: {:?}",
                std::error::Error::source(&error)
            );
        }
    }

    fn fdt_interrupt(&self, source: u32) -> Vec<u32> {
        vec![APLIC_PHANDLE, source, LEVEL_HIGH]
    }

    fn fdt_edge_interrupt(&self, source: u32) -> Vec<u32> {
        vec![APLIC_PHANDLE, source, EDGE_RISING]
    }
}

impl HartSide for InKernelAia {
    fn is_pending(&self, hart: u32, saved: &[SavedRegister]) -> Result<bool> {
        let of = |number| saved.iter().find(|(register, _)| *register == number);
        let value = |number| of(number).map_or(0, |(_, value)| *value);
        if value(EIDELIVERY) != DELIVERS {
            return Ok(false);
        }
        let threshold = value(EITHRESHOLD);
        for word in imsic::words(self.promise.identities) {
            let enabled = value(EIE0 + word);
            // Each register costs a system call, and most words have no enabled identity.
            if enabled == 0 {
                continue;
            }
            let pending = self.aia.imsic(hart, EIP0 + word)? & enabled;
            let first = 32 * word + u64::from(pending.trailing_zeros());
            if pending != 0 {
                return Ok(threshold == 0 || first < threshold);
            }
        }
        Ok(false)
    }

    fn save(&self, hart: u32) -> Result<Vec<SavedRegister>> {
        let words =
            imsic::words(self.promise.identities).flat_map(|word| [EIE0 + word, EIP0 + word]);
        let registers = [EIDELIVERY, EITHRESHOLD].into_iter().chain(words);
        registers
            .map(|register| Ok((register, self.aia.imsic(hart, register)?)))
            .collect()
    }

    fn restore(&self, hart: u32, saved: &[SavedRegister]) -> Result<()> {
        for (register, value) in saved.iter().filter(|(_, value)| *value != 0) {
            let is_pending = (EIP0..EIE0).contains(register);
            // Keep the interrupts that became pending since the reset.
            let now = if is_pending {
                self.aia.imsic(hart, *register)?
            } else {
                0
            };
            self.aia.set_imsic(hart, *register, now | value)?;
        }
        Ok(())
    }

    fn to_settle_before_save(&self) -> Result<Vec<u32>> {
        let mut harts = Vec::new();
        for hart in 0..self.harts {
            if self.save_file(hart)?.is_none() {
                harts.push(hart);
            }
        }
        Ok(harts)
    }

    fn to_settle_before_load(&self, parts: &mut Parts) -> std::result::Result<Vec<u32>, LoadError> {
        let AiaState { imsics, .. } = parts.peek()?;
        let mut harts = Vec::new();
        for (hart, state) in (0..self.harts).zip(imsics) {
            let may_get_file = self.lossy && self.guest_files;
            if may_get_file && state.enables_upper_half() && self.shown(hart)? != WHOLE {
                harts.push(hart);
            }
        }
        Ok(harts)
    }
}

impl Device for InKernelAia {
    fn id(&self) -> &str {
        "aia"
    }

    /// # Errors
    /// Fails if KVM does not show the whole state: see [`HartSide::to_settle_before_save`].
    fn save(&self) -> std::result::Result<Vec<Saved>, SaveError> {
        let (delivers, wires) = aplic::save(self.aia.as_ref())?;
        let mut imsics = Vec::new();
        for hart in 0..self.harts {
            let state = self.save_file(hart)?;
            imsics.push(state.ok_or_else(|| {
                SaveError::Other(format!(
                    "this host has no guest interrupt file for hart {hart}, and KVM does not show \
                     all interrupts of an emulated one: use fewer harts, or --irqchip aia-emul"
                ))
            })?);
        }
        let state = AiaState {
            promise: self.promise,
            delivers,
            wires,
            imsics,
        };
        Ok(vec![Saved::of(&state)?])
    }

    /// The registers of the vCPUs have to be loaded before, and all other devices. The AIA has to
    /// be started with the promise in the state, and [`HartSide::to_settle_before_load`] names the
    /// vCPUs that must have a guest interrupt file.
    fn load(&self, parts: &mut Parts) -> std::result::Result<(), LoadError> {
        let state: AiaState = parts.take()?;
        self.check_host(&state)?;
        state.check(self.promise, self.harts)?;
        aplic::load(self.aia.as_ref(), &state.wires)?;
        for (hart, imsic) in (0..).zip(&state.imsics) {
            self.load_file(hart, imsic)?;
        }
        // What the APLIC sends now becomes pending in files that are loaded.
        aplic::set_delivers(self.aia.as_ref(), state.delivers)?;
        Ok(())
    }

    fn describe(&self) -> Value {
        json!({
            "kind": "aia",
            "aplic": self.placement.aplic.0,
            "imsic": self.placement.imsic.0,
            "harts": self.harts,
            "identities": self.promise.identities,
            "guest_files": self.guest_files,
            "sources": self.promise.sources,
        })
    }

    fn fdt_node(&self, fdt: &mut FdtWriter) -> std::result::Result<(), FdtError> {
        self.aplic_node(fdt)?;
        self.imsic_node(fdt)
    }
}

#[cfg(test)]
mod tests;
