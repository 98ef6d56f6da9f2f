//! Syncs a disk's file, and keeps track of lost data.
//!
//! When Linux cannot write data back, it reports that only once for each open file, to the first
//! caller who syncs, and the data is lost (`Documentation/filesystems/vfs.rst`, "Handling errors
//! during writeback"). Therefore only one thread syncs at a time, on behalf of all that wait. It
//! uses an open file through which nobody writes. A failure counts for every write that it may
//! concern.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::util::sync::lock;

/// A point in time: the number of failures before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mark(u64);

impl Mark {
    /// The point before all writes.
    pub(super) const FIRST: Self = Self(0);
}

/// The syncs of one file.
#[derive(Default)]
pub(super) struct Durable {
    failures: AtomicU64,
    syncs: Mutex<Syncs>,
    ended: Condvar,
}

/// Numbers of syncs so far. Only one runs at a time: `begun` equals `ended` or is one more.
#[derive(Default)]
struct Syncs {
    begun: u64,
    ended: u64,
}

impl Durable {
    /// Returns the mark for a write that begins now.
    pub(super) fn mark(&self) -> Mark {
        Mark(self.failures.load(Ordering::Acquire))
    }

    /// Whether a sync has failed since `mark`. If so, data that was not durable then, or was
    /// written since, may be lost.
    pub(super) fn is_lost_since(&self, mark: Mark) -> bool {
        self.mark() != mark
    }

    /// Waits for a sync that begins after this call. `sync` runs on this thread, or another
    /// caller's `sync` on its thread. Call [`Durable::is_lost_since`] then to find out whether all
    /// data is durable.
    ///
    /// # Errors
    /// Fails if this thread ran `sync`, and it failed.
    pub(super) fn sync(&self, sync: impl Fn() -> io::Result<()>) -> io::Result<()> {
        let mut syncs = lock(&self.syncs);
        let mine = syncs.begun + 1;
        while syncs.ended < mine {
            if syncs.begun > syncs.ended {
                let woken = self.ended.wait(syncs);
                syncs = woken.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            syncs.begun += 1;
            drop(syncs);
            // The failure is counted before another thread can see that the sync has ended.
            let result = sync();
            if result.is_err() {
                self.failures.fetch_add(1, Ordering::AcqRel);
            }
            syncs = lock(&self.syncs);
            syncs.ended = syncs.begun;
            self.ended.notify_all();
            result?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;

    const WRITERS: usize = 8;

    /// The file reports its one error once, to the first sync.
    #[test]
    fn an_error_told_once_is_everyones() {
        let (durable, calls) = (Durable::default(), AtomicU64::new(0));
        let once = || match calls.fetch_add(1, Ordering::AcqRel) {
            0 => Err(io::Error::from_raw_os_error(libc::EIO)),
            _ => Ok(()),
        };
        let marks = [(); WRITERS].map(|()| durable.mark());
        let acknowledged = thread::scope(|scope| {
            let writers = marks.map(|mark| {
                let durable = &durable;
                scope.spawn(move || durable.sync(once).is_ok() && !durable.is_lost_since(mark))
            });
            writers.map(|writer| writer.join().unwrap())
        });
        assert_eq!(acknowledged, [false; WRITERS]);
        // A write that begins later is not affected. A check of all writes is.
        let later = durable.mark();
        assert!(durable.sync(once).is_ok() && !durable.is_lost_since(later));
        assert!(durable.is_lost_since(Mark::FIRST));
    }

    /// A sync that is already running is not enough: it may have begun before the write ended.
    #[test]
    fn a_sync_begins_after_what_it_covers() {
        let (durable, count) = (Durable::default(), AtomicU64::new(0));
        let (begun, has_begun) = mpsc::channel();
        let (end, may_end) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let (durable, count) = (&durable, &count);
            scope.spawn(move || {
                let first = || {
                    begun.send(()).unwrap();
                    may_end.recv().map_err(io::Error::other)
                };
                durable.sync(first).unwrap();
            });
            has_begun.recv().unwrap();
            let (comes, coming) = mpsc::channel();
            for _ in 0..WRITERS {
                let comes = comes.clone();
                scope.spawn(move || {
                    comes.send(()).unwrap();
                    let next = || {
                        count.fetch_add(1, Ordering::AcqRel);
                        Ok(())
                    };
                    durable.sync(next).unwrap();
                    assert_ne!(count.load(Ordering::Acquire), 0);
                });
            }
            coming.iter().take(WRITERS).for_each(drop);
            assert_eq!(count.load(Ordering::Acquire), 0, "one sync at a time");
            end.send(()).unwrap();
        });
    }
}
