//! The features of the guest's harts, as KVM reports them, for the `cpu` nodes of the device tree.

use crate::hypervisor::{RegId, Result, Vcpu, extensions, regs};

/// The canonical order of single-letter extensions. The Z extensions are sorted by it too, by their
/// second letter (The RISC-V Instruction Set Manual, volume I, chapter "ISA Extension Naming
/// Conventions").
const CANONICAL: &str = "iemafdqlcbkjtpvnh";

/// The features of one hart. All harts are alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct HartFacts {
    /// Extensions in canonical order: single letters, then Z, then S.
    pub(crate) extensions: Vec<&'static str>,
    /// The largest `satp.MODE`: 8 for Sv39, 9 for Sv48, 10 for Sv57, 0 for none.
    pub(crate) satp_mode: u64,
    /// Frequency of the `time` CSR, in Hz.
    pub(crate) timebase: u64,
    /// Block size of cbo.clean, cbo.flush and cbo.inval, in bytes.
    pub(crate) cbom_block: Option<u64>,
    /// Block size of cbo.zero, in bytes.
    pub(crate) cboz_block: Option<u64>,
    /// Block size of the prefetch instructions, in bytes.
    pub(crate) cbop_block: Option<u64>,
}

impl HartFacts {
    /// Reads the features of `vcpu` from KVM.
    ///
    /// # Errors
    /// Fails if KVM cannot read one of the registers. A register that the host lacks is no error.
    pub(crate) fn of(vcpu: &dyn Vcpu) -> Result<Self> {
        let mut names = Vec::new();
        for (index, name) in (0u64..).zip(extensions::ISA) {
            if vcpu.reg(RegId::isa_ext(index))? == Some(1) {
                names.push(name);
            }
        }
        names.sort_by_key(|name| canonical_key(name));
        // Read a block size only if its extension is present: some kernels return 0 without it.
        let block = |extension: &str, register| -> Result<Option<u64>> {
            let size = if names.contains(&extension) {
                vcpu.reg(register)?
            } else {
                None
            };
            Ok(size.filter(|size| *size > 0))
        };
        Ok(Self {
            satp_mode: vcpu.reg(regs::SATP_MODE)?.unwrap_or(0),
            timebase: vcpu.reg(regs::TIMER_FREQUENCY)?.unwrap_or(0),
            cbom_block: block("zicbom", regs::ZICBOM_BLOCK_SIZE)?,
            cboz_block: block("zicboz", regs::ZICBOZ_BLOCK_SIZE)?,
            cbop_block: block("zicbop", regs::ZICBOP_BLOCK_SIZE)?,
            extensions: names,
        })
    }

    /// Removes extension `name`, and all extensions that depend on it, from the guest's device
    /// tree.
    pub(crate) fn hide(&mut self, name: &str) {
        let goes = |known: &&str| *known == name || needs(known, name);
        let gone: Vec<&str> = self.extensions.iter().copied().filter(goes).collect();
        self.extensions.retain(|known| !gone.contains(known));
        for name in gone {
            self.forget_block_size(name);
        }
    }

    fn forget_block_size(&mut self, name: &str) {
        match name {
            "zicbom" => self.cbom_block = None,
            "zicboz" => self.cboz_block = None,
            "zicbop" => self.cbop_block = None,
            _ => {}
        }
    }

    /// The `riscv,isa` string, such as `rv64imafdc_zicsr_sstc`.
    pub(crate) fn isa_string(&self) -> String {
        let mut isa = String::from("rv64");
        for name in &self.extensions {
            if name.len() > 1 {
                isa.push('_');
            }
            isa.push_str(name);
        }
        isa
    }

    /// The `mmu-type` string.
    pub(crate) fn mmu_type(&self) -> &'static str {
        match self.satp_mode {
            8 => "riscv,sv39",
            9 => "riscv,sv48",
            10 => "riscv,sv57",
            _ => "riscv,none",
        }
    }
}

/// Whether `extension` depends on `base` (The RISC-V Instruction Set Manual, volume I).
fn needs(extension: &str, base: &str) -> bool {
    match base {
        "f" => matches!(extension, "d" | "v" | "zfa" | "zcd" | "zcf") || needs_float(extension),
        "d" => matches!(extension, "v" | "zcd") || extension.starts_with("zv"),
        "v" => extension.starts_with("zv"),
        "c" => matches!(extension, "zca" | "zcb" | "zcd" | "zcf" | "zcmop" | "zclsd"),
        "zca" => matches!(extension, "c" | "zcb" | "zcd" | "zcf" | "zcmop" | "zclsd"),
        "a" => matches!(extension, "zaamo" | "zalrsc" | "zabha" | "zacas"),
        _ => false,
    }
}

fn needs_float(extension: &str) -> bool {
    extension.starts_with("zfh") || extension.starts_with("zfb") || extension.starts_with("zv")
}

/// Sorts single letters first, then Z extensions by their second letter, then S extensions.
fn canonical_key(name: &'static str) -> (usize, usize, &'static str) {
    let rank = |letter: Option<char>| {
        let letter = letter.unwrap_or('z');
        CANONICAL.find(letter).unwrap_or(CANONICAL.len())
    };
    let mut letters = name.chars();
    match (name.len(), letters.next()) {
        (1, first) => (0, rank(first), name),
        (_, Some('z')) => (1, rank(letters.next()), name),
        _ => (2, 0, name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_stand_in_canonical_order() {
        let mut names = vec![
            "zba", "sstc", "c", "zicsr", "a", "svinval", "i", "zfa", "zicbom", "m", "zca", "zvbb",
            "v", "d", "f", "ssaia", "zacas",
        ];
        names.sort_by_key(|name| canonical_key(name));
        let facts = HartFacts {
            extensions: names,
            ..HartFacts::default()
        };
        assert_eq!(
            facts.isa_string(),
            "rv64imafdcv_zicbom_zicsr_zacas_zfa_zca_zba_zvbb_ssaia_sstc_svinval"
        );
    }

    #[test]
    fn the_table_has_kvms_numbers() {
        for (index, name) in [
            (5, "i"),
            (14, "ssaia"),
            (32, "zkr"),
            (61, "zawrs"),
            (77, "zalasr"),
        ] {
            assert_eq!(extensions::ISA[index], name);
        }
    }

    #[test]
    fn the_mmu_type_is_the_bindings_string() {
        for (mode, name) in [
            (8, "riscv,sv39"),
            (9, "riscv,sv48"),
            (10, "riscv,sv57"),
            (0, "riscv,none"),
        ] {
            let facts = HartFacts {
                satp_mode: mode,
                ..HartFacts::default()
            };
            assert_eq!(facts.mmu_type(), name);
        }
    }

    #[test]
    fn what_needs_a_hidden_extension_goes_too() {
        let names = ["f", "d", "v", "zicbom", "zfa", "zcd", "zvbb", "zbb"];
        let left = |hidden| {
            let mut facts = HartFacts {
                extensions: names.to_vec(),
                cbom_block: Some(64),
                ..HartFacts::default()
            };
            facts.hide(hidden);
            (facts.extensions, facts.cbom_block)
        };
        assert_eq!(left("f").0, ["zicbom", "zbb"]);
        assert_eq!(left("d").0, ["f", "zicbom", "zfa", "zbb"]);
        assert_eq!(left("v").0, ["f", "d", "zicbom", "zfa", "zcd", "zbb"]);
        assert_eq!(left("zicbom").1, None);
        assert_eq!(left("zbb").1, Some(64));
    }
}
