//! Readable names of registers: the group and the register, such as `csr.satp`. The tables are in
//! the order of the numbers in `arch/riscv/include/uapi/asm/kvm.h`.

use std::fmt;

use super::RegId;
use crate::hypervisor::extensions::{ISA, SBI};

const CONFIG: &[&str] = &[
    "isa",
    "zicbom_block_size",
    "mvendorid",
    "marchid",
    "mimpid",
    "zicboz_block_size",
    "satp_mode",
    "zicbop_block_size",
];
const CORE: &[&str] = &[
    "pc", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1", "a0", "a1", "a2", "a3", "a4", "a5",
    "a6", "a7", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "t3", "t4", "t5",
    "t6", "mode",
];
const CSR: &[&str] = &[
    "sstatus",
    "sie",
    "stvec",
    "sscratch",
    "sepc",
    "scause",
    "stval",
    "sip",
    "satp",
    "scounteren",
    "senvcfg",
];
const AIA: &[&str] = &[
    "siselect", "iprio1", "iprio2", "sieh", "siph", "iprio1h", "iprio2h",
];
const TIMER: &[&str] = &["frequency", "time", "compare", "state"];
const VECTOR: &[&str] = &["vstart", "vl", "vtype", "vcsr", "vlenb", "datap"];
const STA: &[&str] = &["shmem_lo", "shmem_hi"];
const FWFT: &[&str] = &[
    "misaligned_deleg.enable",
    "misaligned_deleg.flags",
    "misaligned_deleg.value",
    "pointer_masking.enable",
    "pointer_masking.flags",
    "pointer_masking.value",
];

/// Numbered registers, such as `v0` to `v31`: how many there are, and the prefix before the number.
type Numbered = (usize, &'static str);

/// The names of a group: its own name, the names of its first registers, and the numbered registers
/// behind those.
type Names = (&'static str, &'static [&'static str], Numbered);

/// The names of the registers of a group. `None` if rvmm does not know the group.
fn names(group: u64, subgroup: u64) -> Option<Names> {
    const NONE: Numbered = (0, "");
    Some(match (group, subgroup) {
        (0x01, 0) => ("config", CONFIG, NONE),
        (0x02, 0) => ("core", CORE, NONE),
        (0x03, 0) => ("csr", CSR, NONE),
        (0x03, 1) => ("csr", AIA, NONE),
        (0x03, 2) => ("csr", &["sstateen0"], NONE),
        (0x04, 0) => ("timer", TIMER, NONE),
        (0x05, 0) => ("fp_f", &[], (32, "f")),
        (0x06, 0) => ("fp_d", &[], (32, "f")),
        (0x07, 0) => ("isa_ext", &ISA, NONE),
        (0x07, 1) => ("isa_ext", &[], (usize::MAX, "enable")),
        (0x07, 2) => ("isa_ext", &[], (usize::MAX, "disable")),
        (0x08, 0) => ("sbi_ext", &SBI, NONE),
        (0x08, 1) => ("sbi_ext", &[], (usize::MAX, "enable")),
        (0x08, 2) => ("sbi_ext", &[], (usize::MAX, "disable")),
        (0x09, 0) => ("vector", VECTOR, (32, "v")),
        (0x0a, 0) => ("sbi_sta", STA, NONE),
        (0x0a, 1) => ("sbi_fwft", FWFT, NONE),
        _ => return None,
    })
}

/// Group and name, such as `csr.satp`. A register without a known name has its number in place of
/// the name, as in `csr.77`. If the group is unknown too, this is the whole id in hexadecimal.
impl fmt::Display for RegId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = names(self.group(), self.subgroup()).filter(|_| self.is_riscv());
        let Some((group, registers, (count, prefix))) = known else {
            return write!(f, "{:#x}", self.0);
        };
        let index = usize::try_from(self.index()).unwrap_or(usize::MAX);
        if let Some(name) = registers.get(index) {
            return write!(f, "{group}.{name}");
        }
        match index - registers.len() {
            number if number < count => write!(f, "{group}.{prefix}{number}"),
            32 if prefix == "f" => write!(f, "{group}.fcsr"),
            _ if self.subgroup() == 0 => write!(f, "{group}.{index}"),
            _ => write!(f, "{group}.{}.{index}", self.subgroup()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::regs;

    #[test]
    fn registers_have_group_and_name() {
        const U64: u64 = 0x8030_0000_0000_0000;
        const U32: u64 = 0x8020_0000_0000_0000;
        const U128: u64 = 0x8040_0000_0000_0000;
        for (id, name) in [
            (regs::PC, "core.pc"),
            (regs::A1, "core.a1"),
            (RegId::core(31), "core.t6"),
            (regs::MODE, "core.mode"),
            (regs::SATP, "csr.satp"),
            (RegId::csr(77), "csr.77"),
            (RegId(U64 | 0x0301_0003), "csr.sieh"),
            (RegId(U64 | 0x0301_0009), "csr.1.9"),
            (RegId(U64 | 0x0302_0000), "csr.sstateen0"),
            (regs::TIMER_COMPARE, "timer.compare"),
            (RegId(U32 | 0x0500_001f), "fp_f.f31"),
            (RegId(U32 | 0x0600_0020), "fp_d.fcsr"),
            (RegId::isa_ext(15), "isa_ext.v"),
            (RegId(U64 | 0x0702_0001), "isa_ext.disable1"),
            (regs::SBI_DBCN, "sbi_ext.dbcn"),
            (RegId(U64 | 0x0900_0004), "vector.vlenb"),
            (RegId(U128 | 0x0900_0025), "vector.v31"),
            (RegId(U64 | 0x0a00_0001), "sbi_sta.shmem_hi"),
            (RegId(U64 | 0x0a01_0005), "sbi_fwft.pointer_masking.value"),
            (RegId(U64 | 0x0b00_0001), "0x803000000b000001"),
            (RegId(0x6030_0000_0200_0000), "0x6030000002000000"),
        ] {
            assert_eq!(id.to_string(), name);
        }
    }
}
