//! Statistics of a vCPU's exits to rvmm: the number of each kind, and the time that rvmm took for
//! them.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::time::Duration;

use crate::hypervisor::{Counter, SbiName, Vcpu, VmExit};
use crate::memory::PAGE_SIZE;
use crate::util::{RateLimit, guest_warn};

/// The largest number of kinds that are counted separately. A guest chooses addresses and calls,
/// and must not be able to use up rvmm's memory with them.
const KINDS_MAX: usize = 256;

/// The kind of an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExitKind {
    /// A load from this guest-physical address. In a range that is counted by page, a load from
    /// this page.
    MmioRead(u64),
    /// A store to this address or page.
    MmioWrite(u64),
    /// An SBI call, with its extension and function.
    Sbi(u64, u64),
    /// An access to this CSR.
    Csr(u64),
    /// A signal or kick interrupted KVM_RUN.
    Interrupted,
    /// An exit that ended the machine.
    End,
    /// All kinds after the first 256.
    Others,
}

impl ExitKind {
    /// The kind of `exit`. In the range `by_page`, addresses are counted by page.
    pub fn of(exit: &VmExit, by_page: &Range<u64>) -> Self {
        let place = |gpa: u64| {
            let page = if by_page.contains(&gpa) { PAGE_SIZE } else { 1 };
            gpa - gpa % page
        };
        match *exit {
            VmExit::MmioRead { gpa, .. } => Self::MmioRead(place(gpa)),
            VmExit::MmioWrite { gpa, .. } => Self::MmioWrite(place(gpa)),
            VmExit::Sbi(call) => Self::Sbi(call.extension, call.function),
            VmExit::Csr { number } => Self::Csr(number),
            VmExit::Interrupted => Self::Interrupted,
            VmExit::System(_)
            | VmExit::Breakpoint
            | VmExit::Unrunnable { .. }
            | VmExit::FailEntry { .. }
            | VmExit::Unknown { .. } => Self::End,
        }
    }

    /// The address, for a load or store.
    pub fn gpa(&self) -> Option<u64> {
        match self {
            Self::MmioRead(gpa) | Self::MmioWrite(gpa) => Some(*gpa),
            _ => None,
        }
    }
}

impl fmt::Display for ExitKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MmioRead(gpa) => write!(f, "MMIO read {gpa:#x}"),
            Self::MmioWrite(gpa) => write!(f, "MMIO write {gpa:#x}"),
            Self::Sbi(extension, function) => write!(f, "SBI {} {function}", SbiName(*extension)),
            Self::Csr(number) => write!(f, "CSR {number:#x}"),
            Self::Interrupted => write!(f, "interrupted"),
            Self::End => write!(f, "the end"),
            Self::Others => write!(f, "others"),
        }
    }
}

/// Number and total time of the exits of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Number of exits.
    pub count: u64,
    /// Time from the decoded exit to its result.
    pub time: Duration,
}

/// The exits of one vCPU.
#[derive(Clone, Debug, Default)]
pub struct ExitStats {
    by_page: Range<u64>,
    kinds: HashMap<ExitKind, Tally>,
    /// KVM's own counters, read when the vCPU's thread ends.
    pub counters: Vec<Counter>,
}

impl ExitStats {
    /// Empty statistics. In the guest-physical range `by_page`, which has hundreds of device
    /// registers, all addresses of a 4 KiB page are one kind.
    pub fn by_page(by_page: Range<u64>) -> Self {
        Self {
            by_page,
            ..Self::default()
        }
    }

    /// Counts an `exit` that rvmm handled in `time`.
    pub fn add(&mut self, exit: &VmExit, time: Duration) {
        let tally = self.tally(ExitKind::of(exit, &self.by_page));
        tally.count += 1;
        tally.time += time;
    }

    fn tally(&mut self, kind: ExitKind) -> &mut Tally {
        let is_new = !self.kinds.contains_key(&kind);
        let kind = if is_new && self.kinds.len() >= KINDS_MAX {
            ExitKind::Others
        } else {
            kind
        };
        self.kinds.entry(kind).or_default()
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: ExitStats) {
        for (kind, tally) in other.kinds {
            let sum = self.tally(kind);
            sum.count += tally.count;
            sum.time += tally.time;
        }
        for counter in other.counters {
            let known = self.counters.iter_mut().find(|c| c.name == counter.name);
            match known {
                Some(sum) => sum.value = sum.value.saturating_add(counter.value),
                None => self.counters.push(counter),
            }
        }
    }

    /// Reads KVM's counters of `vcpu`. Hosts before Linux 5.14 have none.
    pub fn read_counters(&mut self, vcpu: &dyn Vcpu) {
        match vcpu.counters() {
            Ok(counters) => self.counters = counters,
            Err(error) => guest_warn!(
                RateLimit::named("KVM's counters"),
                "{:#}",
                anyhow::Error::new(error)
            ),
        }
    }

    /// All kinds that occurred, by total time, the largest first.
    pub fn kinds(&self) -> Vec<(ExitKind, Tally)> {
        let mut kinds: Vec<_> = self.kinds.iter().map(|(k, t)| (*k, *t)).collect();
        kinds.sort_by_key(|(_, tally)| std::cmp::Reverse((tally.time, tally.count)));
        kinds
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::SbiCall;

    #[test]
    fn exits_are_counted_by_kind() {
        let mut stats = ExitStats::default();
        let read = |gpa| VmExit::MmioRead { gpa, len: 4 };
        stats.add(&read(1), Duration::from_micros(1));
        stats.add(&read(1), Duration::from_micros(1));
        stats.add(&read(2), Duration::from_micros(3));
        let kinds = stats.kinds();
        assert_eq!(kinds[0].0, ExitKind::MmioRead(2), "the longest first");
        assert_eq!(kinds[1].1.count, 2);
    }

    #[test]
    fn a_page_of_devices_is_one_kind() {
        let mut stats = ExitStats::by_page(0x1_0000..0x2_0000);
        for gpa in 0xfffc..0x2_0004 {
            stats.add(&VmExit::MmioRead { gpa, len: 1 }, Duration::ZERO);
        }
        let kinds = stats.kinds();
        let count = |gpa| {
            let found = kinds
                .iter()
                .find(|(kind, _)| *kind == ExitKind::MmioRead(gpa));
            found.map(|(_, tally)| tally.count)
        };
        assert_eq!(count(0x1_0000), Some(4096));
        assert_eq!(count(0x1_f000), Some(4096));
        assert_eq!([count(0xfffd), count(0x1_0001)], [Some(1), None]);
    }

    #[test]
    fn a_guest_cannot_grow_them() {
        let mut stats = ExitStats::default();
        for gpa in 0..10_000 {
            let (len, data) = (1, [0; 8]);
            stats.add(&VmExit::MmioWrite { gpa, len, data }, Duration::ZERO);
        }
        let kinds = stats.kinds();
        assert_eq!(kinds.len(), KINDS_MAX + 1);
        assert_eq!(
            kinds.iter().map(|(_, tally)| tally.count).sum::<u64>(),
            10_000
        );
    }

    #[test]
    fn names_are_the_fields_own() {
        let call = |extension| {
            VmExit::Sbi(SbiCall {
                extension,
                function: 2,
                args: [0; 6],
            })
        };
        let name = |exit: VmExit| ExitKind::of(&exit, &(0..0)).to_string();
        assert_eq!(name(call(0x4442_434e)), "SBI DBCN 2");
        assert_eq!(name(call(0x10)), "SBI 0x10 2");
        assert_eq!(name(call(u64::MAX)), "SBI 0xffffffffffffffff 2");
        assert_eq!(name(VmExit::Csr { number: 0x15 }), "CSR 0x15");
    }
}
