//! Busy guests that are well, for a minute each.
#![cfg(target_arch = "riscv64")]

use crate::common::{Rvmm, TIMED_OUT};

/// All at once, so that some wait for a CPU of the host.
#[test]
fn a_busy_guest_is_left_alone_for_a_minute() {
    const GUESTS: [&str; 5] = ["idle", "spin", "faulting", "ticking", "userspin"];
    let watched = |name| {
        let flags = ["-vv", "--timeout", "60s", "--on-crash", "report,watch=50ms"];
        Rvmm::guest(name).args(flags).spawn()
    };
    for (vm, name) in GUESTS.map(watched).into_iter().zip(GUESTS) {
        let end = vm.finish();
        end.assert_status(TIMED_OUT);
        assert!(!end.log.contains("gets nowhere"), "{name}: {}", end.log);
        // A hart that waits is not sampled, and the others show that rvmm has looked.
        let is_sampled = end.log.contains("hart 0 gets on: 200 samples show it");
        assert_eq!(is_sampled, name != "idle", "{name}: {}", end.log);
    }
}
