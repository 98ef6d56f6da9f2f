//! KVM's ONE_REG ids for rv64 (`arch/riscv/include/uapi/asm/kvm.h`), spelled out here because the
//! bindings carry them on riscv64 alone, and their index macros nowhere.

mod names;

use std::io;

use rustix::io::Errno;

/// The id of one register of a vCPU. It displays as a name, `csr.satp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RegId(pub u64);

const RISCV: u64 = 0x8000_0000_0000_0000;
const SIZE_U64: u64 = 3 << 52;

/// KVM_REG_ARCH_MASK, and the bits above those that it defines.
const ARCH: u64 = 0xff00_0000_0000_0000;
/// The largest width that KVM defines: KVM_REG_SIZE_U2048.
const WIDTH_MAX: u32 = 8;

impl RegId {
    /// Bytes of the register. None where the id has a width that KVM does not define.
    pub const fn width(self) -> Option<usize> {
        let log2 = ((self.0 >> 52) & 0xf) as u32;
        if log2 <= WIDTH_MAX {
            Some(1 << log2)
        } else {
            None
        }
    }

    /// Whether it is a register of a RISC-V vCPU.
    pub const fn is_riscv(self) -> bool {
        self.0 & ARCH == RISCV
    }

    /// KVM_REG_RISCV_TYPE_*, such as 3 for CSRs.
    pub const fn group(self) -> u64 {
        (self.0 >> 24) & 0xff
    }

    /// KVM_REG_RISCV_SUBTYPE_*, such as 1 for the CSRs of the AIA.
    pub const fn subgroup(self) -> u64 {
        (self.0 >> 16) & 0xff
    }

    /// Its number in the group.
    pub const fn index(self) -> u64 {
        self.0 & 0xffff
    }

    const fn u64(kind: u64, index: u64) -> Self {
        Self(RISCV | SIZE_U64 | (kind << 24) | index)
    }

    /// Group CONFIG.
    pub const fn config(index: u64) -> Self {
        Self::u64(0x01, index)
    }

    /// Group CORE: 0 is pc, 1 to 31 are x1 to x31, 32 is the mode.
    pub const fn core(index: u64) -> Self {
        Self::u64(0x02, index)
    }

    /// Group CSR, the general ones.
    pub const fn csr(index: u64) -> Self {
        Self::u64(0x03, index)
    }

    /// Group TIMER.
    pub const fn timer(index: u64) -> Self {
        Self::u64(0x04, index)
    }

    /// Group ISA_EXT, one extension: 1 on, 0 off. `index` is a `KVM_RISCV_ISA_EXT_*`.
    pub const fn isa_ext(index: u64) -> Self {
        Self::u64(0x07, index)
    }

    /// Group SBI_EXT, one extension: 1 on, 0 off. `index` is a `KVM_RISCV_SBI_EXT_*`.
    pub const fn sbi_ext(index: u64) -> Self {
        Self::u64(0x08, index)
    }
}

/// Bytes a `cbo.clean`, `cbo.flush` or `cbo.inval` acts on.
pub const ZICBOM_BLOCK_SIZE: RegId = RegId::config(1);
/// `mvendorid`, as the guest's SBI tells it.
pub const MVENDORID: RegId = RegId::config(2);
/// `marchid`.
pub const MARCHID: RegId = RegId::config(3);
/// `mimpid`.
pub const MIMPID: RegId = RegId::config(4);
/// Bytes a `cbo.zero` acts on.
pub const ZICBOZ_BLOCK_SIZE: RegId = RegId::config(5);
/// The largest `satp.MODE` the guest may use.
pub const SATP_MODE: RegId = RegId::config(6);
/// Bytes a prefetch acts on (Linux 7.x).
pub const ZICBOP_BLOCK_SIZE: RegId = RegId::config(7);

/// The program counter.
pub const PC: RegId = RegId::core(0);
/// a0, x10.
pub const A0: RegId = RegId::core(10);
/// a1, x11.
pub const A1: RegId = RegId::core(11);

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
/// `sip`, without what the hart's timer and IMSIC make pending.
pub const SIP: RegId = RegId::csr(7);
/// `satp`.
pub const SATP: RegId = RegId::csr(8);
/// `scounteren`.
pub const SCOUNTEREN: RegId = RegId::csr(9);
/// `scounteren` with CY, TM and IR: processes may read `cycle`, `time` and `instret`. KVM before
/// Linux 7.x starts harts so.
pub const CYCLE_TIME_INSTRET: u64 = 0b111;

/// Ticks a second of the `time` CSR.
pub const TIMER_FREQUENCY: RegId = RegId::timer(0);
/// The guest's `time`.
pub const TIMER_TIME: RegId = RegId::timer(1);
/// The `time` from which on the hart's timer interrupt is pending: `stimecmp`, or what SBI set.
pub const TIMER_COMPARE: RegId = RegId::timer(2);

/// KVM_RISCV_SBI_EXT_V01: the legacy calls, 0 to 8.
pub const SBI_V01: RegId = RegId::sbi_ext(0);
/// KVM_RISCV_SBI_EXT_EXPERIMENTAL: 0x08000000 to 0x08FFFFFF.
pub const SBI_EXPERIMENTAL: RegId = RegId::sbi_ext(7);
/// KVM_RISCV_SBI_EXT_VENDOR: 0x09000000 to 0x09FFFFFF.
pub const SBI_VENDOR: RegId = RegId::sbi_ext(8);
/// KVM_RISCV_SBI_EXT_SUSP: system suspend (Linux 7.x).
pub const SBI_SUSP: RegId = RegId::sbi_ext(11);
/// KVM_RISCV_SBI_EXT_DBCN: the debug console.
pub const SBI_DBCN: RegId = RegId::sbi_ext(9);

/// The ids of a list that the kernel fills by `ask`, as KVM_GET_REG_LIST: the first word is how
/// many have room behind it, and becomes how many there are, also when they are too many (E2BIG).
///
/// # Errors
/// What `ask` says, or EIO: it tells more than there was room for.
pub fn read_list(mut ask: impl FnMut(&mut [u64]) -> io::Result<()>) -> io::Result<Vec<RegId>> {
    let mut list = vec![0];
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
            // An extension can bring more of them between two calls.
            Err(_) if count > room && count <= LIST_MAX => list = vec![0; count + 1],
            Err(_) => return Err(Errno::IO.into()),
        }
    }
}

/// Far more registers than a vCPU has.
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

    /// As the kernel does it, with as many ids as `counts` has it at each call.
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
        for (counts, calls) in [(vec![0], 1), (vec![267; 2], 2), (vec![3, 5, 5, 9], 3)] {
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
            list[0] = 9;
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
