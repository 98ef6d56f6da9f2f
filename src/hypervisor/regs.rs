//! KVM's ids of vCPU registers (ONE_REG) for rv64, from `arch/riscv/include/uapi/asm/kvm.h`. They
//! are defined here because the bindings have them only on riscv64, and do not have the index
//! macros.

mod names;

use std::io;

use rustix::io::Errno;

/// The id of one register of a vCPU. Its `Display` form is a name, such as `csr.satp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RegId(pub u64);

const RISCV: u64 = 0x8000_0000_0000_0000;
const SIZE_U64: u64 = 3 << 52;

/// The bits of an id that hold the architecture (KVM_REG_ARCH_MASK).
const ARCH: u64 = 0xff00_0000_0000_0000;
/// The largest width that KVM defines, as log2 of the bytes: KVM_REG_SIZE_U2048.
const WIDTH_MAX: u32 = 8;

impl RegId {
    /// The width of the register in bytes. `None` if KVM does not define the width in the id.
    pub const fn width(self) -> Option<usize> {
        let log2 = ((self.0 >> 52) & 0xf) as u32;
        if log2 <= WIDTH_MAX {
            Some(1 << log2)
        } else {
            None
        }
    }

    /// Whether the id is one of a RISC-V vCPU.
    pub const fn is_riscv(self) -> bool {
        self.0 & ARCH == RISCV
    }

    /// The register's group, KVM_REG_RISCV_*: 3 for CSRs, for example.
    pub const fn group(self) -> u64 {
        (self.0 >> 24) & 0xff
    }

    /// The register's subgroup, KVM_REG_RISCV_*: 1 for the CSRs of the AIA, for example.
    pub const fn subgroup(self) -> u64 {
        (self.0 >> 16) & 0xff
    }

    /// The register's number in its group and subgroup.
    pub const fn index(self) -> u64 {
        self.0 & 0xffff
    }

    const fn u64(kind: u64, index: u64) -> Self {
        Self(RISCV | SIZE_U64 | (kind << 24) | index)
    }

    /// A register of group CONFIG.
    pub const fn config(index: u64) -> Self {
        Self::u64(0x01, index)
    }

    /// A register of group CORE: 0 is pc, 1 to 31 are x1 to x31, 32 is the privilege mode.
    pub const fn core(index: u64) -> Self {
        Self::u64(0x02, index)
    }

    /// A register of group CSR, subgroup GENERAL.
    pub const fn csr(index: u64) -> Self {
        Self::u64(0x03, index)
    }

    /// f0 to f31, of the D extension (KVM_REG_RISCV_FP_D).
    pub const fn float(index: u64) -> Self {
        Self::u64(0x06, index)
    }

    /// A register of group TIMER.
    pub const fn timer(index: u64) -> Self {
        Self::u64(0x04, index)
    }

    /// A register of group ISA_EXT, which switches one extension: 1 is on, 0 is off. `index` is a
    /// `KVM_RISCV_ISA_EXT_*`.
    pub const fn isa_ext(index: u64) -> Self {
        Self::u64(0x07, index)
    }

    /// A register of group SBI_EXT, which switches one extension: 1 is on, 0 is off. `index` is a
    /// `KVM_RISCV_SBI_EXT_*`.
    pub const fn sbi_ext(index: u64) -> Self {
        Self::u64(0x08, index)
    }
}

/// The groups of registers, KVM_REG_RISCV_*.
pub mod group {
    /// What the hart is: ISA, block sizes, ids.
    pub const CONFIG: u64 = 0x01;
    /// pc, x1 to x31, privilege mode.
    pub const CORE: u64 = 0x02;
    /// CSRs, in three subgroups: general, AIA and Smstateen.
    pub const CSR: u64 = 0x03;
    /// The guest's time, and the hart's timer.
    pub const TIMER: u64 = 0x04;
    /// f0 to f31 with 32 bits, and fcsr. They are the lower halves of those of [`FP_D`].
    pub const FP_F: u64 = 0x05;
    /// f0 to f31 with 64 bits, and fcsr.
    pub const FP_D: u64 = 0x06;
    /// Switches of ISA extensions.
    pub const ISA_EXT: u64 = 0x07;
    /// Switches of SBI extensions.
    pub const SBI_EXT: u64 = 0x08;
    /// The vector CSRs, and v0 to v31.
    pub const VECTOR: u64 = 0x09;
    /// State of SBI extensions: STA (subgroup 0) and FWFT (subgroup 1).
    pub const SBI_STATE: u64 = 0x0a;
}

/// The block size of `cbo.clean`, `cbo.flush` and `cbo.inval` in bytes.
pub const ZICBOM_BLOCK_SIZE: RegId = RegId::config(1);
/// `mvendorid`, which the guest reads by an SBI call.
pub const MVENDORID: RegId = RegId::config(2);
/// `marchid`.
pub const MARCHID: RegId = RegId::config(3);
/// `mimpid`.
pub const MIMPID: RegId = RegId::config(4);
/// The block size of `cbo.zero` in bytes.
pub const ZICBOZ_BLOCK_SIZE: RegId = RegId::config(5);
/// The largest `satp.MODE` that the guest may use.
pub const SATP_MODE: RegId = RegId::config(6);
/// The block size of the prefetch instructions in bytes (Linux 7.x).
pub const ZICBOP_BLOCK_SIZE: RegId = RegId::config(7);

/// The program counter.
pub const PC: RegId = RegId::core(0);
/// a0, x10.
pub const A0: RegId = RegId::core(10);
/// a1, x11.
pub const A1: RegId = RegId::core(11);
/// a2, x12.
pub const A2: RegId = RegId::core(12);

/// The privilege mode: 0 user, 1 supervisor.
pub const MODE: RegId = RegId::core(32);

/// `sstatus`.
pub const SSTATUS: RegId = RegId::csr(0);
/// `sie`.
pub const SIE: RegId = RegId::csr(1);
/// `stvec`.
pub const STVEC: RegId = RegId::csr(2);
/// `sepc`.
pub const SEPC: RegId = RegId::csr(4);
/// `scause`.
pub const SCAUSE: RegId = RegId::csr(5);
/// `stval`.
pub const STVAL: RegId = RegId::csr(6);
/// `sip`, without the pending bits of the hart's timer and IMSIC.
pub const SIP: RegId = RegId::csr(7);
/// `satp`.
pub const SATP: RegId = RegId::csr(8);
/// `scounteren`.
pub const SCOUNTEREN: RegId = RegId::csr(9);
/// The value of `scounteren` with CY, TM and IR set, so that U-mode may read `cycle`, `time` and
/// `instret`. KVM before Linux 7.x starts harts with this value.
pub const CYCLE_TIME_INSTRET: u64 = 0b111;

/// The frequency of the `time` CSR in Hz.
pub const TIMER_FREQUENCY: RegId = RegId::timer(0);
/// The guest's `time`.
pub const TIMER_TIME: RegId = RegId::timer(1);
/// The `time` from which on the hart's timer interrupt is pending: the value of `stimecmp`, or of
/// the SBI call.
pub const TIMER_COMPARE: RegId = RegId::timer(2);

/// Whether the hart's timer counts to [`TIMER_COMPARE`] inside KVM: 1 if it does. Always 0 if the
/// hart has Sstc.
pub const TIMER_STATE: RegId = RegId::timer(3);

/// KVM_RISCV_SBI_EXT_V01: the legacy calls, extension ids 0 to 8.
pub const SBI_V01: RegId = RegId::sbi_ext(0);
/// KVM_RISCV_SBI_EXT_EXPERIMENTAL: extension ids 0x08000000 to 0x08FFFFFF.
pub const SBI_EXPERIMENTAL: RegId = RegId::sbi_ext(7);
/// KVM_RISCV_SBI_EXT_VENDOR: extension ids 0x09000000 to 0x09FFFFFF.
pub const SBI_VENDOR: RegId = RegId::sbi_ext(8);
/// KVM_RISCV_SBI_EXT_SUSP: system suspend (Linux 7.x).
pub const SBI_SUSP: RegId = RegId::sbi_ext(11);
/// KVM_RISCV_SBI_EXT_DBCN: the debug console.
pub const SBI_DBCN: RegId = RegId::sbi_ext(9);

/// Reads a list of register ids. `ask` makes the kernel fill the list, as KVM_GET_REG_LIST does:
/// the caller sets the first word to the number of ids that there is room for behind it; the kernel
/// sets it to the number of ids that there are, also if it fails with E2BIG because those are too
/// many.
///
/// # Errors
/// Returns the error of `ask`. EIO if the number that the kernel returns makes no sense.
pub fn read_list(mut ask: impl FnMut(&mut [u64]) -> io::Result<()>) -> io::Result<Vec<RegId>> {
    let mut list = vec![0; LIST_USUAL + 1];
    loop {
        let room = list.len() - 1;
        list[0] = room as u64;
        let asked = ask(&mut list);
        let count = usize::try_from(list[0]).map_err(|_| Errno::IO)?;
        match asked {
            Ok(()) => {
                let ids = list.get(1..).and_then(|ids| ids.get(..count));
                let ids = ids.ok_or(Errno::IO)?;
                return Ok(ids.iter().copied().map(RegId).collect());
            }
            Err(error) if Errno::from_io_error(&error) != Some(Errno::TOOBIG) => return Err(error),
            // There can be more ids than at the last call, if an extension was switched on since.
            Err(_) if count > room && count <= LIST_MAX => list = vec![0; count + 1],
            Err(_) => return Err(Errno::IO.into()),
        }
    }
}

/// Room for the ids of most vCPUs: then one call is enough.
const LIST_USUAL: usize = 255;
/// The largest number of ids that [`read_list`] accepts: far more than a vCPU has.
const LIST_MAX: usize = 1 << 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_in_the_id() {
        for (size, width) in [(0, Some(1)), (2, Some(4)), (3, Some(8)), (5, Some(32))] {
            let id = RegId(RISCV | (size << 52) | 0x0900_0006);
            assert_eq!(id.width(), width);
            assert_eq!((id.group(), id.subgroup(), id.index()), (9, 0, 6));
        }
        assert_eq!(RegId(RISCV | (8 << 52)).width(), Some(256));
        assert_eq!(RegId(u64::MAX).width(), None);
        assert!(SATP.is_riscv() && !RegId(0x6030_0000_0000_0000).is_riscv());
    }

    /// Reads a list from a fake kernel. `counts` are the numbers of ids that it has at each call.
    /// Returns the list, and the number of calls.
    fn listed(counts: &[u64]) -> (io::Result<Vec<RegId>>, usize) {
        let mut calls = 0;
        let list = read_list(|list| {
            let (room, count) = (list[0], counts[calls]);
            calls += 1;
            list[0] = count;
            if room < count {
                return Err(Errno::TOOBIG.into());
            }
            (1..=count)
                .zip(&mut list[1..])
                .for_each(|(id, to)| *to = id);
            Ok(())
        });
        (list, calls)
    }

    #[test]
    fn a_list_of_any_length_is_read() {
        for (counts, calls) in [(vec![255], 1), (vec![267; 2], 2), (vec![300, 305, 305], 3)] {
            let (list, asked) = listed(&counts);
            let count = counts[calls - 1];
            assert_eq!(list.unwrap(), (1..=count).map(RegId).collect::<Vec<_>>());
            assert_eq!(asked, calls);
        }
    }

    #[test]
    fn a_list_that_makes_no_sense_is_an_error() {
        assert!(listed(&[u64::MAX]).0.is_err());
        assert!(listed(&[1 << 30]).0.is_err());
        let refused = read_list(|_| Err(Errno::PERM.into())).unwrap_err();
        assert_eq!(Errno::from_io_error(&refused), Some(Errno::PERM));
        let made_up = read_list(|list| {
            list[0] = 999;
            Ok(())
        });
        assert!(made_up.is_err());
    }

    #[test]
    fn ids_are_those_of_the_kernel() {
        assert_eq!(PC.0, 0x8030_0000_0200_0000);
        assert_eq!(A1.0, 0x8030_0000_0200_000b);
        assert_eq!(SATP_MODE.0, 0x8030_0000_0100_0006);
        assert_eq!(SCOUNTEREN.0, 0x8030_0000_0300_0009);
        assert_eq!(TIMER_FREQUENCY.0, 0x8030_0000_0400_0000);
        assert_eq!(RegId::isa_ext(14).0, 0x8030_0000_0700_000e);
        assert_eq!(SBI_DBCN.0, 0x8030_0000_0800_0009);
    }
}
