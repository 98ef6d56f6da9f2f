//! What a run reached, told by LLVM's SanitizerCoverage: a byte for each edge of the program, which counts, and a call
//! at each comparison of integers.
//!
//! All crates but `std` are built so, this one too. LLVM leaves out functions whose names begin with `__sanitizer_`;
//! what those call is inlined, or it would be traced and call them again.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering::Relaxed};

static START: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static LENGTH: AtomicUsize = AtomicUsize::new(0);

/// Comparisons are only looked at while a target runs.
static TRACING: AtomicBool = AtomicBool::new(false);
/// The last comparisons of values that differed: the two values, in turn.
static PAIRS: [AtomicU64; 2 * PAIRS_MAX] = [const { AtomicU64::new(0) }; 2 * PAIRS_MAX];
static NEXT: AtomicUsize = AtomicUsize::new(0);
const PAIRS_MAX: usize = 64;

/// What the program's runs reached so far.
pub(crate) struct Coverage {
    /// The counters of the last run.
    last: Vec<u8>,
    /// For each edge, a bit for each of eight ranges of counts.
    seen: Vec<u8>,
    /// Edges that were reached.
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

    /// All edges of the program.
    pub(crate) fn all(&self) -> usize {
        self.seen.len()
    }

    /// Edges that were reached so far.
    pub(crate) fn edges(&self) -> usize {
        self.edges
    }

    /// Runs `work`; whether it reached an edge for the first time, or so often for the first time.
    pub(crate) fn run(&mut self, work: impl FnOnce()) -> bool {
        let (start, length) = (START.load(Relaxed), self.last.len());
        // SAFETY: the counters are writable for the program's life, and one thread uses them. The compiler cannot
        // see that `work` counts: to it the memory is somebody else's, and `work` may write to it.
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
            // Most are zero.
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

/// Ranges of counts that are told apart: 1, 2, 3, 4-7, 8-15, 16-31, 32-127, 128 and more.
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

/// Values that a recent run compared, and that differed.
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

// What the compiler's calls are called is in LLVM's SanitizerCoverage.cpp. Comparisons of bytes are left out: there are
// many, and changing a byte finds the other by itself.

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

/// `cases` has their number, their bits, and then the values.
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
