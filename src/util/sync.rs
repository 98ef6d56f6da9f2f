//! Locking that goes on after another thread has panicked.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, and ignores poison. A panic ends rvmm anyway, and the data is still needed to end
/// in order, for example to write the console's last bytes.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
