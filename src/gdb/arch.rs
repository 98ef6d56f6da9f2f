//! A hart as GDB sees it: its registers by GDB's numbers, and the target description.
//!
//! GDB numbers x0 to x31 from 0, pc is 32, f0 to f31 begin at 33, and a CSR is 65 plus its number
//! (`gdb/riscv-tdep.h`). The target description names those that KVM has.

use std::fmt::Write;
use std::num::NonZeroUsize;
use std::sync::OnceLock;

use gdbstub::arch::{Arch, RegId as RegisterNumber, Registers};

use crate::hypervisor::{RegId, regs};
use crate::vcpu::hart::{NAMES, REGISTERS};

/// The number of pc.
const PC: usize = 32;
/// The number of f0.
const FLOATS: usize = 33;
/// The number of CSR 0.
const CSRS: usize = 65;
/// Bytes of each register.
const WIDTH: usize = 8;

/// The CSRs that KVM has: the name, the number, and KVM's register.
const KVM_CSRS: [(&str, u16, RegId); 11] = [
    ("sstatus", 0x100, regs::SSTATUS),
    ("sie", 0x104, regs::SIE),
    ("stvec", 0x105, regs::STVEC),
    ("scounteren", 0x106, regs::SCOUNTEREN),
    ("senvcfg", 0x10a, RegId::csr(10)),
    ("sscratch", 0x140, RegId::csr(3)),
    ("sepc", 0x141, regs::SEPC),
    ("scause", 0x142, regs::SCAUSE),
    ("stval", 0x143, regs::STVAL),
    ("sip", 0x144, regs::SIP),
    ("satp", 0x180, regs::SATP),
];

/// The architecture.
#[derive(Debug)]
pub enum Riscv {}

impl Arch for Riscv {
    type Usize = u64;
    type Registers = General;
    type BreakpointKind = usize;
    type RegId = Register;

    fn target_description_xml() -> Option<&'static str> {
        static TEXT: OnceLock<String> = OnceLock::new();
        Some(TEXT.get_or_init(description))
    }
}

/// The registers that GDB reads at each stop: x0 to x31, and pc.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct General {
    /// x0 to x31.
    pub x: [u64; REGISTERS],
    /// The program counter.
    pub pc: u64,
}

impl Registers for General {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.pc
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        let all = self.x.iter().chain([&self.pc]);
        let bytes = all.flat_map(|value| value.to_le_bytes());
        bytes.for_each(|byte| write_byte(Some(byte)));
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        if bytes.len() != WIDTH * (REGISTERS + 1) {
            return Err(());
        }
        let registers = self.x.iter_mut().chain([&mut self.pc]);
        for (register, bytes) in registers.zip(bytes.chunks_exact(WIDTH)) {
            *register = u64::from_le_bytes(bytes.try_into().map_err(|_| ())?);
        }
        Ok(())
    }
}

/// One register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register {
    /// KVM's register. None for x0, which is 0.
    pub id: Option<RegId>,
    /// Its width in bytes for GDB.
    pub width: usize,
}

impl RegisterNumber for Register {
    fn from_raw_id(number: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        let id = match number {
            0 => None,
            1..REGISTERS => Some(RegId::core(number as u64)),
            PC => Some(regs::PC),
            FLOATS..CSRS => Some(RegId::float((number - FLOATS) as u64)),
            _ => {
                let csr = number.checked_sub(CSRS)?;
                let known = KVM_CSRS
                    .iter()
                    .find(|(_, number, _)| usize::from(*number) == csr);
                Some(known?.2)
            }
        };
        let register = Self { id, width: WIDTH };
        Some((register, NonZeroUsize::new(WIDTH)))
    }
}

/// The target description: XML with three features that GDB knows.
fn description() -> String {
    let mut text = String::from(
        "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\">\
         <target version=\"1.0\"><architecture>riscv:rv64</architecture>",
    );
    let mut feature = |name: &str, registers: &mut dyn Iterator<Item = (String, usize, &str)>| {
        // Writing to a string cannot fail.
        let _ = write!(text, "<feature name=\"org.gnu.gdb.riscv.{name}\">");
        for (name, number, kind) in registers {
            let bits = 8 * WIDTH;
            let _ = write!(
                text,
                "<reg name=\"{name}\" bitsize=\"{bits}\" regnum=\"{number}\" type=\"{kind}\"/>"
            );
        }
        text.push_str("</feature>");
    };
    let general = NAMES.iter().enumerate().map(|(number, name)| {
        let kind = match *name {
            "sp" | "gp" | "tp" | "s0" => "data_ptr",
            "ra" => "code_ptr",
            _ => "int",
        };
        // GDB's name of s0.
        let name = if *name == "s0" { "fp" } else { *name };
        (name.to_owned(), number, kind)
    });
    let pc = ("pc".to_owned(), PC, "code_ptr");
    feature("cpu", &mut general.chain([pc]));
    let floats =
        (0..REGISTERS).map(|number| (format!("f{number}"), FLOATS + number, "ieee_double"));
    feature("fpu", &mut floats.into_iter());
    let csrs = KVM_CSRS
        .iter()
        .map(|(name, number, _)| ((*name).to_owned(), CSRS + usize::from(*number), "int"));
    feature("csr", &mut csrs.into_iter());
    text.push_str("</target>");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_have_gdbs_numbers() {
        let register = |number| Register::from_raw_id(number).map(|(register, _)| register.id);
        assert_eq!(register(0), Some(None));
        assert_eq!(register(10), Some(Some(regs::A0)));
        assert_eq!(register(32), Some(Some(regs::PC)));
        assert_eq!(register(33), Some(Some(RegId::float(0))));
        assert_eq!(register(65 + 0x180), Some(Some(regs::SATP)));
        assert_eq!(register(65 + 0x300), None, "mstatus");
        assert_eq!(register(usize::MAX), None);
    }

    #[test]
    fn general_registers_are_bytes_and_back() {
        let mut general = General {
            pc: 0x8020_0000,
            ..General::default()
        };
        general.x[2] = 0x1234;
        let mut bytes = Vec::new();
        general.gdb_serialize(|byte| bytes.push(byte.unwrap()));
        assert_eq!(bytes.len(), 33 * 8);
        assert_eq!(bytes[16..18], [0x34, 0x12]);
        let mut back = General::default();
        back.gdb_deserialize(&bytes).unwrap();
        assert_eq!(back, general);
        assert!(back.gdb_deserialize(&bytes[1..]).is_err());
        bytes.extend([0; 8]);
        assert!(back.gdb_deserialize(&bytes).is_err());
    }

    #[test]
    fn the_description_has_all_features() {
        let text = description();
        for part in [
            "<feature name=\"org.gnu.gdb.riscv.cpu\"><reg name=\"zero\" bitsize=\"64\"",
            "<reg name=\"pc\" bitsize=\"64\" regnum=\"32\" type=\"code_ptr\"/>",
            "<reg name=\"f31\" bitsize=\"64\" regnum=\"64\" type=\"ieee_double\"/>",
            "<reg name=\"satp\" bitsize=\"64\" regnum=\"449\" type=\"int\"/>",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert_eq!(
            text.matches("<feature").count(),
            text.matches("</feature>").count()
        );
    }
}
