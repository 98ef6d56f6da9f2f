//! The CPU time that a thread has used.
#![allow(unsafe_code)]

use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;
use std::time::Duration;

/// The CPU time that `thread` has used, in the kernel and in guests too. None if it has ended.
pub fn cpu_time<T>(thread: &JoinHandle<T>) -> Option<Duration> {
    let mut clock = 0;
    // SAFETY: the thread's id is valid as long as its handle is not joined; `clock` takes the
    // result.
    let found = unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock) };
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` takes the result. An unknown clock is an error.
    let is_read = found == 0 && unsafe { libc::clock_gettime(clock, &raw mut time) } == 0;
    let seconds = u64::try_from(time.tv_sec).ok().filter(|_| is_read)?;
    let nanoseconds = u32::try_from(time.tv_nsec).ok()?;
    Some(Duration::new(seconds, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::thread;

    /// Only the time of that thread counts, and only while it runs.
    #[test]
    fn a_thread_that_works_uses_time() {
        let (work, take) = channel::<u64>();
        let (done, wait) = channel();
        let worker = thread::spawn(move || {
            for turns in take {
                let sum = (0..turns).fold(0u64, |sum, turn| std::hint::black_box(sum ^ turn));
                done.send(sum).unwrap();
            }
        });
        work.send(1).unwrap();
        wait.recv().unwrap();
        let before = cpu_time(&worker).unwrap();
        while cpu_time(&worker).unwrap() < before + Duration::from_millis(2) {
            work.send(100_000).unwrap();
            wait.recv().unwrap();
        }
        drop(work);
        while !worker.is_finished() {
            thread::yield_now();
        }
        worker.join().unwrap();
    }
}
