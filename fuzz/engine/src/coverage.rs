//! The code that a run reached, from LLVM's SanitizerCoverage: a counter byte for each edge of the
//! program, and a call at each comparison of integers.
//!
//! All crates except `std` are instrumented, including this one. LLVM leaves out functions whose
//! names begin with `__sanitizer_`. The functions that they call are inlined; otherwise they would
//! be instrumented, and call the first ones again.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering::Relaxed};

static START: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static LENGTH: AtomicUsize = AtomicUsize::new(0);

/// Comparisons are recorded only while a target runs.
static TRACING: AtomicBool = AtomicBool::new(false);
/// The last comparisons of different values: the two values of each, in turn.
static PAIRS: [AtomicU64; 2 * PAIRS_MAX] = [const { AtomicU64::new(0) }; 2 * PAIRS_MAX];
static NEXT: AtomicUsize = AtomicUsize::new(0);
const PAIRS_MAX: usize = 64;

/// The code that the runs of the program have reached so far.
pub(crate) struct Coverage {
    /// The counters of the last run.
    last: Vec<u8>,
    /// For each edge, a bit for each of eight ranges of counts.
    seen: Vec<u8>,
    /// The number of edges that were reached.
    edges: usize,
}

impl Coverage {
    pub(crate) fn new() -> Self {
        let length = LENGTH.load(Relaxed);
        Self {
            last: vec![0; length],
            seen: vec![0; length],
            edges: 0,
        }
    }

    /// The number of all edges of the program.
    pub(crate) fn all(&self) -> usize {
        self.seen.len()
    }

    /// The number of edges that were reached so far.
    pub(crate) fn edges(&self) -> usize {
        self.edges
    }

    /// Runs `work`. Returns whether it reached a new edge, or a new range of counts of an edge.
    pub(crate) fn run(&mut self, work: impl FnOnce()) -> bool {
        let (start, length) = (START.load(Relaxed), self.last.len());
        // SAFETY: the counters are writable for the program's life, and only one thread uses them.
        // The compiler does not know that `work` counts: for it, the memory is foreign, and `work`
        // may write to it.
        unsafe { std::ptr::write_bytes(start, 0, length) };
        TRACING.store(true, Relaxed);
        work();
        TRACING.store(false, Relaxed);
        // SAFETY: as above, and the vector has that many bytes.
        unsafe { std::ptr::copy_nonoverlapping(start, self.last.as_mut_ptr(), length) };
        self.look()
    }

    fn look(&mut self) -> bool {
        let mut is_new = false;
        let words = self.last.chunks(8).zip(self.seen.chunks_mut(8));
        for (counts, seen) in words {
            // Most counters are zero.
            if <[u8; 8]>::try_from(counts).is_ok_and(|word| u64::from_ne_bytes(word) == 0) {
                continue;
            }
            for (count, seen) in counts.iter().zip(seen) {
                let range = range_of(*count);
                if *seen & range != range {
                    self.edges += usize::from(*seen == 0);
                    *seen |= range;
                    is_new = true;
                }
            }
        }
        is_new
    }
}

/// Ranges of counts: 1, 2, 3, 4-7, 8-15, 16-31, 32-127, 128 and more.
fn range_of(count: u8) -> u8 {
    match count {
        0 => 0,
        1..=3 => 1 << (count - 1),
        4..=7 => 1 << 3,
        8..=15 => 1 << 4,
        16..=31 => 1 << 5,
        32..=127 => 1 << 6,
        128.. => 1 << 7,
    }
}

/// Different values that a recent run compared.
pub(crate) fn pairs() -> Vec<(u64, u64)> {
    let values: Vec<u64> = PAIRS.iter().map(|value| value.load(Relaxed)).collect();
    let pairs = values.chunks_exact(2).map(|pair| (pair[0], pair[1]));
    pairs.filter(|(one, other)| one != other).collect()
}

#[inline(always)]
fn compared(one: u64, other: u64) {
    if TRACING.load(Relaxed) && one != other {
        let at = NEXT.load(Relaxed) & (PAIRS_MAX - 1);
        NEXT.store(at + 1, Relaxed);
        PAIRS[2 * at].store(one, Relaxed);
        PAIRS[2 * at + 1].store(other, Relaxed);
    }
}

// The compiler's calls are named in LLVM's SanitizerCoverage.cpp. Comparisons of bytes are left
// out: there are many, and a random change of a byte finds the other value as well.

#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_8bit_counters_init(start: *mut u8, stop: *mut u8) {
    START.store(start, Relaxed);
    LENGTH.store((stop as usize).wrapping_sub(start as usize), Relaxed);
}

#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_trace_cmp1(_: u8, _: u8) {}

#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_trace_const_cmp1(_: u8, _: u8) {}

#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_trace_cmp2(one: u16, other: u16) {
    compared(one as u64, other as u64);
}

#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_trace_const_cmp2(one: u16, other: u16) {
    compared(one as u64, other as u64);
}

#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_trace_cmp4(one: u32, other: u32) {
    compared(one as u64, other as u64);
}

#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_trace_const_cmp4(one: u32, other: u32) {
    compared(one as u64, other as u64);
}

#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_trace_cmp8(one: u64, other: u64) {
    compared(one, other);
}

#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_trace_const_cmp8(one: u64, other: u64) {
    compared(one, other);
}

/// `cases` has the number of cases, their width in bits, and then the values.
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_trace_switch(value: u64, cases: *const u64) {
    // SAFETY: the compiler's table has two words before its cases.
    let (count, bits) = unsafe { (*cases, *cases.add(1)) };
    if bits > 8 && count > 0 {
        let index = NEXT.load(Relaxed) as u64 % count;
        // SAFETY: the table has `count` cases.
        compared(value, unsafe { *cases.add(2 + index as usize) });
    }
}
