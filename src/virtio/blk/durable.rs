//! What of a disk is known to be lost, and who syncs it.
//!
//! Linux tells of data that it could not write back once for each open file, to whoever asks first, and
//! it is gone then (`Documentation/filesystems/vfs.rst`, "Handling errors during writeback"). So one
//! thread syncs at a time, for all that wait, by an open file that nobody writes through, and what a
//! failure covers is counted for all of them.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use crate::util::sync::lock;

/// How many failures there had been: what is written later is not in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mark(u64);

impl Mark {
    /// Before everything.
    pub(super) const FIRST: Self = Self(0);
}

/// The syncs of one file.
#[derive(Default)]
pub(super) struct Durable {
    failures: AtomicU64,
    syncs: Mutex<Syncs>,
    ended: Condvar,
}

/// Syncs so far. One at a time: `begun` is `ended`, or one more.
#[derive(Default)]
struct Syncs {
    begun: u64,
    ended: u64,
}

impl Durable {
    /// Where a write begins.
    pub(super) fn mark(&self) -> Mark {
        Mark(self.failures.load(Ordering::Acquire))
    }

    /// Whether something that was written before `mark`, or was on its way since, is lost.
    pub(super) fn is_lost_since(&self, mark: Mark) -> bool {
        self.mark() != mark
    }

    /// Returns when a sync has ended that began after this was called: by `sync` on this thread or by
    /// another caller's. Whether it made everything durable tells [`Durable::is_lost_since`].
    ///
    /// # Errors
    /// That of `sync`, where this thread ran it.
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
            // Counted before anyone can see that the sync has ended.
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

    /// A file whose one error is told once, to the first sync.
    #[test]
    fn an_error_told_once_is_everyones() {
        let (durable, told) = (Durable::default(), AtomicU64::new(0));
        let once = || match told.fetch_add(1, Ordering::AcqRel) {
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
        // What begins later was not lost with them; what was flushed never, is.
        let later = durable.mark();
        assert!(durable.sync(once).is_ok() && !durable.is_lost_since(later));
        assert!(durable.is_lost_since(Mark::FIRST));
    }

    /// A sync that is at work already is not enough: it may have begun before the write had ended.
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
            assert_eq!(count.load(Ordering::Acquire), 0, "one at a time");
            end.send(()).unwrap();
        });
    }
}
