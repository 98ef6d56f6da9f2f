//! Counts the bytes on the heap that Rust code holds. Memory of C code is not counted; only
//! `-rss_limit_mb` bounds that.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

/// Runs `work`. Returns the most heap bytes that it held at once, beyond those held before.
pub fn most_memory<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.load(Relaxed);
    MOST.store(before, Relaxed);
    let done = work();
    (done, MOST.load(Relaxed).saturating_sub(before))
}

struct Counting;

#[global_allocator]
static HEAP: Counting = Counting;

fn took(bytes: usize) {
    let held = HELD.fetch_add(bytes, Relaxed) + bytes;
    MOST.fetch_max(held, Relaxed);
}

fn gave(bytes: usize) {
    HELD.fetch_sub(bytes, Relaxed);
}

// SAFETY: this is the system's allocator; counting does not touch the memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are passed on.
        let bytes = unsafe { System.alloc(layout) };
        if !bytes.is_null() {
            took(layout.size());
        }
        bytes
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are passed on.
        let bytes = unsafe { System.alloc_zeroed(layout) };
        if !bytes.is_null() {
            took(layout.size());
        }
        bytes
    }

    unsafe fn dealloc(&self, bytes: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(bytes, layout) };
        gave(layout.size());
    }

    unsafe fn realloc(&self, bytes: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promises are passed on.
        let moved = unsafe { System.realloc(bytes, layout, size) };
        if !moved.is_null() {
            // Both may exist for a moment. If the system moves pages instead, only one does.
            took(size);
            gave(layout.size());
        }
        moved
    }
}
