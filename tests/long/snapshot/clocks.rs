//! What a guest's clocks show after a minute's pause, and after an hour in a snapshot.

use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::common::disk::host_runs;
use crate::common::freezing::*;
use crate::common::{Rvmm, Shell, measured};

const MODES: [&str; 2] = ["stop", "jump"];
const MINUTE: f64 = 60.0;
const HOUR: f64 = 3600.0;
/// Some of the clocks show whole seconds.
const SECOND: f64 = 1.02;

/// A moment by the clocks of the host and of a guest, in seconds.
#[derive(Debug)]
struct Moment {
    /// Before and after the guest was asked.
    host: [f64; 2],
    /// CLOCK_MONOTONIC.
    uptime: f64,
    /// CLOCK_REALTIME.
    date: f64,
    rtc: f64,
}

impl Moment {
    fn now(guest: &mut Shell) -> Self {
        let before = host_date();
        let shown = guest.ok("echo $(cut -d' ' -f1 /proc/uptime) $(date +%s) \
             $(cat /sys/class/rtc/rtc0/since_epoch)");
        // After a jump, a line of the guest's kernel may come before it: see `is_content`.
        let clocks = shown.lines().find_map(numbers);
        let [uptime, date, rtc] = clocks.unwrap_or_else(|| panic!("no clocks: {shown}"));
        Moment {
            host: [before, host_date()],
            uptime,
            date,
            rtc,
        }
    }

    /// Checks a later moment, after the guest stood still for `pause` seconds.
    fn check(&self, mode: &str, pause: f64, later: &Self) {
        let uptime = later.uptime - self.uptime;
        let date = later.date - self.date;
        let least = later.host[0] - self.host[1];
        let most = later.host[1] - self.host[0];
        measured(&format!(
            "{pause} s, --clock {mode}: {most:.2} s by the host's clock, CLOCK_MONOTONIC \
             {uptime:.2} s, date {date} s, RTC {} s",
            later.rtc - self.rtc
        ));
        let all = format!("{mode}: {self:?}, {later:?}");
        assert!(least >= pause, "{all}");
        // The RTC follows the host's clock, and the guest's clocks agree with each other.
        assert!(
            (later.rtc - later.host[0]).abs() <= most - least + SECOND,
            "{all}"
        );
        assert!((date - uptime).abs() <= SECOND, "{all}");
        if mode == "stop" {
            assert!(uptime <= most - pause + SECOND, "{all}");
        } else {
            assert!(uptime >= least - SECOND && uptime <= most + SECOND, "{all}");
        }
    }
}

/// The three numbers of a line that has nothing else.
fn numbers(line: &str) -> Option<[f64; 3]> {
    let words = line.split_whitespace().map(|word| word.parse().ok());
    words.collect::<Option<Vec<f64>>>()?.try_into().ok()
}

/// The host's clock.
fn host_date() -> f64 {
    let date = SystemTime::now().duration_since(UNIX_EPOCH);
    date.expect("a date").as_secs_f64()
}

/// The host's clock is an hour ahead until this is dropped.
struct Ahead;

impl Ahead {
    fn set() -> Self {
        turn(HOUR);
        Ahead
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        turn(-HOUR);
    }
}

/// Sets the host's clock. It loses less than a second.
fn turn(by: f64) {
    // One more, because `date` takes whole seconds.
    host_runs(&format!("date -s @{:.0}", (host_date() + by).floor() + 1.0));
}

fn guest(freezer: &Freezer, name: &str) -> Shell {
    let rvmm = Rvmm::linux().arg("--cmdline").arg(CMDLINE);
    let mut guest = Shell::of(rvmm.args(freezer.ctl(name)));
    guest.vm.allow_seconds(120);
    guest
}

/// One case for both, because the host's clock is everyone's.
#[test]
fn clocks_after_a_minute_and_after_an_hour() {
    let freezer = Freezer::new();
    a_minute(&freezer);
    an_hour(&freezer);
}

/// One guest for each mode, paused at the same time.
fn a_minute(freezer: &Freezer) {
    let paused = MODES.map(|mode| {
        let mut guest = guest(freezer, mode);
        let before = Moment::now(&mut guest);
        printed(["ctl", &text(&freezer.path(mode)), "pause"]);
        (mode, guest, before)
    });
    sleep(Duration::from_secs_f64(MINUTE));
    for (mode, mut guest, before) in paused {
        let socket = text(&freezer.path(mode));
        printed(["ctl", &socket, "resume", "--clock", mode]);
        before.check(mode, MINUTE, &Moment::now(&mut guest));
        is_content(mode, &mut guest);
        guest.power_off();
    }
}

/// A snapshot that is restored in both modes.
fn an_hour(freezer: &Freezer) {
    let mut guest = guest(freezer, "ctl");
    let before = Moment::now(&mut guest);
    freezer.freeze("ctl", "snap", &[]);
    kill(guest.vm);
    let _ahead = Ahead::set();
    for mode in MODES {
        let vm = freezer.thaw("snap").args(["--clock", mode]).spawn();
        let mut guest = Shell::restored(vm);
        before.check(mode, HOUR - SECOND, &Moment::now(&mut guest));
        is_content(mode, &mut guest);
        guest.power_off();
    }
}

/// After a jump, Linux may log a soft lockup: see docs/snapshots.md.
fn is_content(mode: &str, guest: &mut Shell) {
    if mode == "stop" {
        kernel_is_content(guest);
    }
}
