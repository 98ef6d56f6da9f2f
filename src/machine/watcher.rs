//! Finds harts that burn CPU time and get nowhere: in one trap that comes again and again, or in
//! the panic of their kernel.
//!
//! KVM reflects most faults into the guest, so a guest whose trap handler faults loops for ever
//! without an exit. A Linux that has panicked spins, too. The watcher looks at the CPU time of each
//! vCPU's thread now and then. If a vCPU has used much, the watcher samples the hart's registers a
//! few milliseconds apart, and stops as soon as a sample shows that the hart gets on:
//!
//! ```text
//! the samples have different traps, or an interrupt was the last     it gets on
//! the hart is near the instruction that trapped                      it gets on
//! in the handler, at the instruction that trapped, in the handler    a trap loop
//! each sample is in panic(), or called from it                       a panic
//! ```
//!
//! A hart that waits uses no CPU time, and is never sampled. So an idle machine wakes up every
//! eight seconds for this (`--on-crash ACT,watch=TIME`), and one that is busy and well has a few
//! samples in that time.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::debug;

use crate::memory::GuestMemory;
use crate::report::backtrace::backtrace;
use crate::report::symbols::Function;
use crate::vcpu::hart::{Hart, REGISTERS};
use crate::vcpu::thread::VcpuHandle;
use crate::vcpu::trap::SPP;

/// Time from the start of a life to the first look. The time between two looks is twice as long as
/// the one before, up to that of `watch=TIME`.
const FIRST: Duration = Duration::from_secs(1);
/// A vCPU is busy if it has used this part of the time since the last look.
const BUSY: u32 = 8;
/// Time between two samples. It varies, so that samples do not follow a beat of the guest.
const APART: Duration = Duration::from_millis(5);

/// Samples that a trap loop must have, and the most that are taken.
const SAMPLES: usize = 64;
const SAMPLES_MAX: usize = 256;
/// Samples in the handler's entry that a trap loop must have.
const ENTRIES: usize = 2;
/// Bytes of a trap handler's entry.
const ENTRY: u64 = 512;
/// Code within this many bytes of the instruction that trapped belongs to it, and runs only if the
/// hart gets on.
const NEAR: u64 = 256;
/// Samples that show a panic.
const PANICS: usize = 16;

/// Why a hart gets nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hang {
    /// It takes the same trap again and again.
    TrapLoop,
    /// Its kernel has panicked.
    Panic,
}

impl fmt::Display for Hang {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Hang::TrapLoop => "it takes the same trap again and again",
            Hang::Panic => "its kernel has panicked",
        })
    }
}

/// Watches the vCPUs of one life.
pub(super) struct Watcher {
    ram: Arc<GuestMemory>,
    /// The code of the kernel's panic(), if it is known.
    panic: Option<Function>,
    vcpus: Vec<Watch>,
    /// When the last look was.
    looked: Instant,
    /// The time from that look to the next.
    pause: Duration,
    longest: Duration,
    /// When the next sample is due, while a vCPU is sampled.
    sample: Option<Instant>,
    /// A series of samples has ended.
    has_sampled: bool,
}

/// What is known of one vCPU.
#[derive(Default)]
struct Watch {
    /// The CPU time at the last look.
    used: Duration,
    /// The samples so far. None if the vCPU is not sampled.
    samples: Option<Samples>,
    /// It hangs, and was reported.
    found: bool,
    /// Samples of finished series.
    total: usize,
}

impl Watch {
    /// Ends a series of `count` samples, which show that hart `number` gets on.
    fn gets_on(&mut self, number: u32, count: usize) {
        const LOGGED: usize = 100;
        let before = self.total / LOGGED;
        self.samples = None;
        self.total += count;
        for hundreds in before + 1..=self.total / LOGGED {
            let samples = hundreds * LOGGED;
            debug!("hart {number} gets on: {samples} samples show it");
        }
    }
}

impl Watcher {
    /// A watcher for a life that begins now. `longest` is the longest time between two looks.
    pub(super) fn new(ram: &Arc<GuestMemory>, panic: Option<Function>, longest: Duration) -> Self {
        Self {
            ram: Arc::clone(ram),
            panic,
            vcpus: Vec::new(),
            looked: Instant::now(),
            pause: FIRST.min(longest),
            longest,
            sample: None,
            has_sampled: false,
        }
    }

    /// Whether a series of samples has ended since the last call.
    pub(super) fn has_sampled(&mut self) -> bool {
        std::mem::take(&mut self.has_sampled)
    }

    /// When [`Watcher::act`] has something to do next.
    pub(super) fn due(&self) -> Instant {
        let look = self.looked + self.pause;
        self.sample.map_or(look, |sample| sample.min(look))
    }

    /// Looks at `vcpus`, and samples those that are busy. Returns the hart that hangs, if one does.
    /// A vCPU that hangs is reported once. Without `vcpus`, the machine is paused.
    pub(super) fn act(&mut self, vcpus: &[VcpuHandle]) -> Option<(u32, Hang)> {
        let now = Instant::now();
        if vcpus.len() < self.vcpus.len() {
            // A debugger lets one hart run alone, or the machine is paused.
            self.vcpus.iter_mut().for_each(|watch| watch.samples = None);
            (self.looked, self.sample) = (now, None);
            return None;
        }
        self.vcpus.resize_with(vcpus.len(), Watch::default);
        if now >= self.looked + self.pause {
            self.look(vcpus, now);
        }
        if self.sample.is_none_or(|sample| now < sample) {
            return None;
        }
        let found = self.take_samples(vcpus);
        let is_sampling = self.vcpus.iter().any(|watch| watch.samples.is_some());
        self.has_sampled = !is_sampling;
        let spread = Duration::from_micros((now.elapsed().subsec_nanos() % 4000).into());
        self.sample = is_sampling.then_some(now + APART + spread);
        found
    }

    /// Finds the vCPUs that are busy, and begins to sample them.
    fn look(&mut self, vcpus: &[VcpuHandle], now: Instant) {
        let busy = now.duration_since(self.looked) / BUSY;
        for (watch, vcpu) in self.vcpus.iter_mut().zip(vcpus) {
            let used = vcpu.cpu_time().unwrap_or_default();
            // The time of a new thread begins at 0.
            let more = used.saturating_sub(watch.used);
            watch.used = used;
            if more >= busy && !watch.found && watch.samples.is_none() {
                watch.samples = Some(Samples::default());
                vcpu.ask_for_sample();
                self.sample = Some(now + APART);
            }
        }
        self.looked = now;
        self.pause = (self.pause * 2).min(self.longest);
    }

    fn take_samples(&mut self, vcpus: &[VcpuHandle]) -> Option<(u32, Hang)> {
        let mut found = None;
        for ((number, watch), vcpu) in (0..).zip(&mut self.vcpus).zip(vcpus) {
            let Some(samples) = &mut watch.samples else {
                continue;
            };
            let verdict = match vcpu.take_sample() {
                Some(hart) => {
                    let in_panic = self.panic.as_ref().is_some_and(|panic| {
                        let mut trace = backtrace(&hart, &self.ram).into_iter();
                        trace.any(|place| panic.contains(hart.stvec, place.inside()))
                    });
                    samples.add(hart, in_panic)
                }
                // It does not run in the guest: it is handling an exit, or waits.
                None => samples.miss(),
            };
            match verdict {
                Verdict::Unknown => vcpu.ask_for_sample(),
                Verdict::GetsOn => {
                    let count = samples.count;
                    watch.gets_on(number, count);
                }
                Verdict::Hangs(hang) => {
                    (watch.samples, watch.found) = (None, true);
                    found = found.or(Some((number, hang)));
                }
            }
        }
        found
    }
}

/// What samples show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Unknown,
    GetsOn,
    Hangs(Hang),
}

/// Samples of one hart, one after the other. All have the same last trap.
#[derive(Default)]
struct Samples {
    first: Option<Hart>,
    count: usize,
    /// Times at which there was no sample.
    missed: usize,
    /// Samples in the handler's entry.
    entries: usize,
    /// Samples at the instruction that trapped, and the registers there.
    returns: usize,
    there: Option<[u64; REGISTERS]>,
    /// Samples in the kernel's panic, or called from it.
    panics: usize,
}

impl Samples {
    /// Adds a sample. `in_panic`: the hart is in its kernel's panic.
    fn add(&mut self, hart: Hart, in_panic: bool) -> Verdict {
        self.count += 1;
        self.panics += usize::from(in_panic);
        if self.panics == self.count {
            // An interrupt may come in between, so do not look at the last trap.
            return match self.panics >= PANICS {
                true => Verdict::Hangs(Hang::Panic),
                false => Verdict::Unknown,
            };
        }
        let trap = |hart: &Hart| (hart.stvec, hart.sepc, hart.scause, hart.stval);
        let first = self.first.get_or_insert_with(|| hart.clone());
        let has_trapped = hart.has_trapped();
        let is_same = trap(&hart) == trap(first) && hart.cause().is_exception();
        if !is_same || !has_trapped || self.panics > 0 {
            return Verdict::GetsOn;
        }
        let vector = hart.vector();
        let (into, trapped) = (hart.pc.wrapping_sub(vector), hart.sepc.wrapping_sub(vector));
        if trapped < ENTRY {
            // The handler itself traps, so the hart never gets behind that place. The trap came
            // from supervisor mode, and no `sret` has been executed since.
            if into > trapped || !hart.is_supervisor || hart.sstatus & SPP == 0 {
                return Verdict::GetsOn;
            }
            (self.entries, self.returns) = (self.entries + 1, self.returns + 1);
        } else if into < ENTRY {
            self.entries += 1;
        } else if hart.pc == hart.sepc {
            self.returns += 1;
            // A handler restores the registers. If they change, other code runs in between.
            if *self.there.get_or_insert(hart.x) != hart.x {
                return Verdict::GetsOn;
            }
        } else if hart.pc.abs_diff(hart.sepc) <= NEAR {
            return Verdict::GetsOn;
        }
        let is_loop = self.entries >= ENTRIES && self.returns > 0;
        match self.count {
            SAMPLES.. if is_loop => Verdict::Hangs(Hang::TrapLoop),
            SAMPLES_MAX.. => Verdict::GetsOn,
            _ => Verdict::Unknown,
        }
    }

    /// There was no sample in time.
    fn miss(&mut self) -> Verdict {
        self.missed += 1;
        match self.missed {
            SAMPLES.. => Verdict::GetsOn,
            _ => Verdict::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VECTOR: u64 = 0x8020_0000;
    const HERE: u64 = 0x8030_0000;

    /// A hart at `pc`, after the trap (`scause`, `sepc`).
    fn hart(pc: u64, scause: u64, sepc: u64) -> Hart {
        Hart {
            pc,
            stvec: VECTOR,
            scause,
            sepc,
            is_supervisor: true,
            sstatus: SPP,
            ..Hart::default()
        }
    }

    /// The verdict on as many samples as it needs; `harts` come again and again.
    fn verdict(harts: &[Hart]) -> Verdict {
        let mut samples = Samples::default();
        let mut harts = harts.iter().cycle();
        loop {
            match samples.add(harts.next().unwrap().clone(), false) {
                Verdict::Unknown => {}
                verdict => return verdict,
            }
        }
    }

    #[test]
    fn trap_loops_are_found() {
        const LOOP: Verdict = Verdict::Hangs(Hang::TrapLoop);
        // The vector itself cannot be fetched.
        let nowhere = Hart {
            stvec: 0,
            ..hart(0, 1, 0)
        };
        // scause 1 at 0, so not all of them are 0.
        assert_eq!(verdict(&[nowhere]), LOOP);
        // The handler faults when it saves a register.
        let save = [0, 4, 8].map(|offset| hart(VECTOR + offset, 15, VECTOR + 8));
        assert_eq!(verdict(&save), LOOP);
        // The handler returns to the instruction that trapped.
        let again = [VECTOR, VECTOR + 40, HERE, VECTOR + 4000].map(|pc| hart(pc, 2, HERE));
        assert_eq!(verdict(&again), LOOP);
    }

    #[test]
    fn a_hart_that_gets_on_is_left_alone() {
        let rest = Verdict::GetsOn;
        // It has never trapped.
        let new = Hart {
            stvec: 0,
            ..hart(HERE, 0, 0)
        };
        assert_eq!(verdict(&[new]), rest);
        // A loop of one instruction, long after a trap, at it, behind it, and in a handler.
        for pc in [HERE + 4096, HERE, HERE + 4, VECTOR, VECTOR + 8] {
            assert_eq!(verdict(&[hart(pc, 8, HERE)]), rest, "{pc:#x}");
        }
        // Code behind the handler, which has returned from a trap to it.
        let near = Hart {
            sstatus: 0,
            ..hart(VECTOR + 100, 2, VECTOR + 100)
        };
        assert_eq!(verdict(&[near]), rest);
        // Timer interrupts.
        let timer = hart(HERE, (1 << 63) | 5, HERE);
        assert_eq!(verdict(&[hart(VECTOR, (1 << 63) | 5, HERE), timer]), rest);
        // Page faults, at one instruction and at several addresses.
        let faults = [1, 2].map(|page| Hart {
            stval: page << 12,
            ..hart(HERE, 15, HERE)
        });
        assert_eq!(verdict(&faults), rest);
        // At one address again and again, but the store is executed each time.
        for near in [HERE + 4, HERE - 8] {
            let paging = [VECTOR, HERE, VECTOR + 100, near].map(|pc| hart(pc, 15, HERE));
            assert_eq!(verdict(&paging), rest);
        }
        let mut counting = [VECTOR, HERE, VECTOR + 100, HERE].map(|pc| hart(pc, 15, HERE));
        counting[3].x[10] = 1;
        assert_eq!(verdict(&counting), rest);
    }

    #[test]
    fn a_panic_is_found_whatever_interrupts_it() {
        let mut samples = Samples::default();
        for index in 0..PANICS {
            let scause = (1 << 63) | index as u64;
            let verdict = samples.add(hart(HERE, scause, HERE), true);
            let expected = match index + 1 {
                PANICS => Verdict::Hangs(Hang::Panic),
                _ => Verdict::Unknown,
            };
            assert_eq!(verdict, expected);
        }
        // One sample elsewhere: it was another function that is called from there.
        let mut samples = Samples::default();
        assert_eq!(samples.add(hart(HERE, 0, 0), true), Verdict::Unknown);
        assert_eq!(samples.add(hart(HERE, 0, 0), false), Verdict::GetsOn);
    }

    #[test]
    fn a_hart_that_gives_no_samples_is_left_alone() {
        let mut samples = Samples::default();
        let misses = std::iter::repeat_with(|| samples.miss());
        assert_eq!(misses.take(SAMPLES).last(), Some(Verdict::GetsOn));
    }
}
