//! The in-kernel AIA: an APLIC, which turns wired interrupts into messages, and an IMSIC for each
//! hart.
//!
//! The specification is RISC-V Advanced Interrupt Architecture 1.0. `arch/riscv/kvm/aia_device.c`
//! demands the order of the set-up: the AIA is created before the vCPUs, and configured after them.

use std::sync::Arc;

use serde_json::{Value, json};
use vm_memory::GuestAddress;

use super::msi::MsiRouter;
use super::{HartSide, Messages, SavedRegister, hart_intc_phandle};
use crate::bus::{Device, FdtError, FdtWriter, IrqSink};
use crate::hypervisor::{Aia, AiaConfig, AiaMode, Result, Vm};
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

/// Registers of an IMSIC's interrupt file, by their numbers in `siselect` (AIA 1.0, section 3.8).
const EIDELIVERY: u64 = 0x70;
const EITHRESHOLD: u64 = 0x72;
/// `eip0` and `eie0` have the pending and the enabled bits of identities 0 to 63. On RV64, the
/// register number of each further 64 identities is higher by 2.
const EIP0: u64 = 0x80;
const EIE0: u64 = 0xc0;
/// The value of `eidelivery` with which interrupts of the file reach the hart.
const DELIVERS: u64 = 1;

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
    ids: u32,
    guest_files: bool,
    lossy: bool,
    /// The number of wired sources that the device tree describes.
    sources: u32,
    failures: RateLimit,
}

impl InKernelAia {
    /// Configures and starts `aia`. To be called when all `harts` vCPUs of `vm` exist.
    ///
    /// Uses the host's guest interrupt files if it has them (mode AUTO). Uses KVM's emulation if
    /// not, or if `emulate` is true.
    ///
    /// # Errors
    /// Fails if KVM refuses a step.
    pub fn start(
        vm: Arc<dyn Vm>,
        aia: Box<dyn Aia>,
        placement: Placement,
        harts: u32,
        emulate: bool,
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
        let ids = aia.config(AiaConfig::Ids)?;
        aia.place_aplic(placement.aplic)?;
        for hart in 0..harts {
            let base = placement.imsic.0 + u64::from(hart) * IMSIC_SIZE;
            aia.place_imsic(hart, GuestAddress(base))?;
        }
        aia.init()?;
        let mode = if auto { "AUTO" } else { "EMUL" };
        let lossy = is_lossy(aia.as_ref())?;
        let sources = if lossy { SOURCES_LOSSY } else { SOURCES };
        guest_info!(
            RateLimit::named("PLIC or AIA"),
            "in-kernel AIA: mode {mode}, {ids} interrupt identities, {sources} wired sources"
        );
        if lossy {
            guest_info!(
                RateLimit::named("AIA is lossy"),
                "in-kernel AIA: this host's KVM loses the upper half of every 64 identities of an \
                 emulated IMSIC (lr.w in aia_imsic.c): the guest gets so few \
                 interrupts that 31 are enough"
            );
        }
        Ok(Self {
            vm,
            aia,
            placement,
            harts,
            ids,
            guest_files: auto,
            lossy,
            sources,
            failures: RateLimit::named("AIA"),
        })
    }

    /// Whether messages go to the host's guest interrupt files.
    pub fn has_guest_files(&self) -> bool {
        self.guest_files
    }

    /// The number of interrupt identities of each hart's file.
    pub fn identities(&self) -> u32 {
        self.ids
    }

    /// The number of the last wired source that the device tree describes.
    pub fn sources(&self) -> u32 {
        self.sources
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
        let usable = if self.lossy && !self.guest_files {
            LOSSY_IDENTITIES
        } else {
            self.ids
        };
        usable.saturating_sub(RESERVED_IDENTITIES)
    }

    /// Whether KVM's emulated interrupt files lose identities.
    pub fn is_lossy(&self) -> bool {
        self.lossy
    }

    /// The offsets of the words of `eip` and `eie` from the first, in register numbers: 0, 2, 4 and
    /// so on.
    fn words(&self) -> impl Iterator<Item = u64> {
        (0..=u64::from(self.ids) / 64).map(|word| 2 * word)
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
        fdt.property_u32("riscv,num-ids", self.ids)?;
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
        fdt.property_u32("riscv,num-sources", self.sources)?;
        fdt.property_phandle(APLIC_PHANDLE)?;
        fdt.end_node(node)
    }
}

/// Whether KVM's emulated IMSIC file drops enable bits above bit 31 in each 64-bit word. Linux up
/// to at least 7.2 handles them as 32-bit words. KVM uses the emulated file in mode EMUL, and in
/// mode AUTO when no guest interrupt file is free.
fn is_lossy(aia: &dyn Aia) -> Result<bool> {
    const PROBE: u64 = (1 << 40) | (1 << 5);
    aia.set_imsic(0, EIE0, PROBE)?;
    let kept = aia.imsic(0, EIE0)?;
    aia.set_imsic(0, EIE0, 0)?;
    Ok(kept != PROBE)
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
        for word in self.words() {
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
        let words = self.words().flat_map(|word| [EIE0 + word, EIP0 + word]);
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
}

impl Device for InKernelAia {
    fn id(&self) -> &str {
        "aia"
    }

    fn describe(&self) -> Value {
        json!({
            "kind": "aia",
            "aplic": self.placement.aplic.0,
            "imsic": self.placement.imsic.0,
            "harts": self.harts,
            "identities": self.ids,
            "guest_files": self.guest_files,
            "sources": self.sources,
        })
    }

    fn fdt_node(&self, fdt: &mut FdtWriter) -> std::result::Result<(), FdtError> {
        self.aplic_node(fdt)?;
        self.imsic_node(fdt)
    }
}

#[cfg(test)]
mod tests {
    use super::hart_bits;

    #[test]
    fn hart_bits_number_every_hart() {
        for (harts, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (512, 9)] {
            assert_eq!(hart_bits(harts), bits, "{harts} harts");
        }
    }
}
