//! Pauses and resumes a Linux guest again and again, while its harts, disk and network are busy.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use serde_json::Value;

use super::Shell;
use super::ctl::Ctl;
use super::disk::{MIB, disk, md5};
use super::files::TempDir;
use super::net::{Tap, transfer};

/// Nanoseconds of work between two pauses, of all vCPUs together. The guest's clock goes on during
/// a pause, and its kernel gives a starting hart one second. With less work, a hart could be late.
const WORK: u64 = 200_000_000;

/// Waits until the vCPUs of `pid`, which are busy, have run for so many nanoseconds since they were
/// resumed.
pub(crate) fn wait_for_work(pid: u32, nanoseconds: u64) {
    let worked = || {
        let threads = cpu_time(pid).into_iter();
        let vcpus = threads.filter(|(name, _)| name.starts_with("vcpu-"));
        vcpus.map(|(_, time)| time).sum::<u64>()
    };
    while worked() < nanoseconds {
        thread::yield_now();
    }
}

/// Pauses and resumes until `is_over`, and returns the number of rounds. Checks that nothing
/// changes during a pause.
fn pause_and_resume(
    (pid, socket): (u32, &Path),
    tap: &Tap,
    rounds: &AtomicU32,
    is_over: &AtomicBool,
) {
    let mut ctl = Ctl::connect(socket);
    while !is_over.load(Ordering::Acquire) {
        wait_for_work(pid, WORK);
        ctl.done("pause");
        let look = |ctl: &mut Ctl| (state_of_devices(ctl), packets_of(&tap.name));
        let before = look(&mut ctl);
        assert_eq!(before, look(&mut ctl), "something changed during a pause");
        ctl.done("resume");
        rounds.fetch_add(1, Ordering::AcqRel);
    }
}

/// The state of a paused machine's devices, with the indexes of their queues. Bytes typed during
/// the pause wait for the UART, which counts them.
fn state_of_devices(ctl: &mut Ctl) -> Value {
    let mut status = ctl.status();
    assert_eq!(status["state"], "paused");
    status["devices"]["uart"].take();
    status["devices"].take()
}

/// Packets that the host received from the guest through this tap.
fn packets_of(tap: &str) -> String {
    let path = format!("/sys/class/net/{tap}/statistics/rx_packets");
    std::fs::read_to_string(&path).expect(&path)
}

/// Runs at least `least` rounds under load, and then checks all sums.
pub(crate) fn nothing_is_lost(least: u32, more: &[&str]) {
    let (scratch, tap) = (TempDir::new(), Tap::new(true));
    let socket = scratch.path().join("ctl");
    let image = scratch.file("image", vec![0; 8 * MIB]);
    let [flag, value] = disk(&image, "");
    let net = format!("tap={}", tap.name);
    let control = socket.display().to_string();
    let flags = [&flag, &value, "--net", &net, "--ctl", &control];
    let mut guest = Shell::start(flags.iter().chain(more).chain(&["--cpus", "4"]));
    tap.configure(&mut guest);
    // A hart that stops and starts, and one that counts.
    guest.ok(
        "(while :; do for to in 0 1; do echo $to >/sys/devices/system/cpu/cpu3/online; done; \
         done) &",
    );
    guest.ok("(i=0; while :; do i=$((i+1)); echo $i >/tmp/count; done) &");
    let (rounds, is_over) = (AtomicU32::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let machine = (guest.vm.pid(), socket.as_path());
        let (tap, rounds, is_over) = (&tap, &rounds, &is_over);
        let pauser = scope.spawn(move || pause_and_resume(machine, tap, rounds, is_over));
        while rounds.load(Ordering::Acquire) < least && !pauser.is_finished() {
            guest.vm.allow_seconds(120);
            write_and_read(&mut guest);
            transfer(tap, &mut guest, 1);
        }
        is_over.store(true, Ordering::Release);
        pauser.join().expect("no round fails");
    });
    let counts = [0, 1].map(|_| {
        // Again and again the file has no line for a moment.
        let count = guest.ok("until read count </tmp/count; do :; done; echo $count");
        guest.ok("sleep 1");
        count
    });
    assert_ne!(counts[0], counts[1], "a process has stopped");
    let sum = guest.ok("cut -c1-32 /tmp/sum-of-disk");
    guest.power_off();
    assert_eq!(md5(&image), sum);
}

/// Writes new bytes to the disk, without the guest's page cache, and reads them back.
fn write_and_read(guest: &mut Shell) {
    guest.ok(
        "dd if=/dev/urandom of=/tmp/bytes bs=1M count=8 2>/dev/null; \
         md5sum </tmp/bytes >/tmp/sum-of-disk",
    );
    guest.ok(
        "dd if=/tmp/bytes of=/dev/vda bs=64k conv=notrunc,fsync 2>/dev/null; \
         echo 3 >/proc/sys/vm/drop_caches",
    );
    guest.ok("md5sum </dev/vda | cmp - /tmp/sum-of-disk");
}

/// Nanoseconds that each thread of `pid` has run.
pub(crate) fn cpu_time(pid: u32) -> Vec<(String, u64)> {
    let path = format!("/proc/{pid}/task");
    let tasks = std::fs::read_dir(&path).expect(&path);
    let mut times: Vec<_> = tasks
        .filter_map(|task| {
            // The thread may have ended.
            let task = task.ok()?.path();
            let name = std::fs::read_to_string(task.join("comm")).ok()?;
            let times = std::fs::read_to_string(task.join("schedstat")).ok()?;
            let ran = times.split(' ').next().expect("a number");
            Some((name.trim().to_owned(), ran.parse().expect("a number")))
        })
        .collect();
    times.sort();
    times
}
