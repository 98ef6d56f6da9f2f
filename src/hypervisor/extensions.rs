//! The names of the ISA and SBI extensions that KVM can switch. The numbers are those of
//! `arch/riscv/include/uapi/asm/kvm.h`. The names of ISA extensions are those of
//! `Documentation/devicetree/bindings/riscv/extensions.yaml`.

use super::RegId;

/// ISA extensions by `KVM_RISCV_ISA_EXT_*` number.
pub const ISA: [&str; 78] = [
    "a",
    "c",
    "d",
    "f",
    "h",
    "i",
    "m",
    "svpbmt",
    "sstc",
    "svinval",
    "zihintpause",
    "zicbom",
    "zicboz",
    "zbb",
    "ssaia",
    "v",
    "svnapot",
    "zba",
    "zbs",
    "zicntr",
    "zicsr",
    "zifencei",
    "zihpm",
    "smstateen",
    "zicond",
    "zbc",
    "zbkb",
    "zbkc",
    "zbkx",
    "zknd",
    "zkne",
    "zknh",
    "zkr",
    "zksed",
    "zksh",
    "zkt",
    "zvbb",
    "zvbc",
    "zvkb",
    "zvkg",
    "zvkned",
    "zvknha",
    "zvknhb",
    "zvksed",
    "zvksh",
    "zvkt",
    "zfh",
    "zfhmin",
    "zihintntl",
    "zvfh",
    "zvfhmin",
    "zfa",
    "ztso",
    "zacas",
    "sscofpmf",
    "zimop",
    "zca",
    "zcb",
    "zcd",
    "zcf",
    "zcmop",
    "zawrs",
    "smnpm",
    "ssnpm",
    "svade",
    "svadu",
    "svvptc",
    "zabha",
    "ziccrse",
    "zaamo",
    "zalrsc",
    "zicbop",
    "zfbfmin",
    "zvfbfmin",
    "zvfbfwma",
    "zclsd",
    "zilsd",
    "zalasr",
];

/// SBI extensions by `KVM_RISCV_SBI_EXT_*` number. BASE is not among them: it cannot be switched
/// off.
pub const SBI: [&str; 14] = [
    "v01",
    "time",
    "ipi",
    "rfence",
    "srst",
    "hsm",
    "pmu",
    "experimental",
    "vendor",
    "dbcn",
    "sta",
    "susp",
    "fwft",
    "mpxy",
];

/// The register that switches ISA extension `name`. `None` if KVM does not know the name.
pub fn isa_register(name: &str) -> Option<RegId> {
    index(&ISA, name).map(RegId::isa_ext)
}

/// The register that switches SBI extension `name`. `None` if KVM does not know the name.
pub fn sbi_register(name: &str) -> Option<RegId> {
    index(&SBI, name).map(RegId::sbi_ext)
}

fn index(table: &[&str], name: &str) -> Option<u64> {
    let at = table.iter().position(|known| *known == name)?;
    u64::try_from(at).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_kvms_numbers() {
        assert_eq!(isa_register("v"), Some(RegId::isa_ext(15)));
        assert_eq!(isa_register("zawrs"), Some(RegId::isa_ext(61)));
        assert_eq!(isa_register("zalasr"), Some(RegId::isa_ext(77)));
        assert_eq!(isa_register("V"), None);
        assert_eq!(sbi_register("dbcn"), Some(super::super::regs::SBI_DBCN));
        assert_eq!(sbi_register("mpxy"), Some(RegId::sbi_ext(13)));
        assert_eq!(sbi_register("base"), None);
    }
}
