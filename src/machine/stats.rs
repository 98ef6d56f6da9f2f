//! `--stats`: statistics of a machine, reported at its end.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::control::State;
use crate::vcpu::stats::{ExitKind, ExitStats};

/// The most kinds of exits that the text lists for each vCPU.
const KINDS_LISTED: usize = 20;

/// Where a machine's time went.
#[derive(Clone, Debug)]
pub struct Stats {
    /// When the current phase began.
    since: Instant,
    /// Time from the start of rvmm's main to the guest's start, plus the time of all resets.
    start: Duration,
    /// Time that the guest ran.
    run: Duration,
    /// Time that the guest was paused, by a command or by `--pause`.
    paused: Duration,
    /// Time from the guest's end until disks and consoles had written everything.
    end: Duration,
    /// Number of resets.
    resets: u64,
    /// Exits of each vCPU, over all lives.
    vcpus: Vec<ExitStats>,
    /// For addresses of MMIO exits, the name of the device there, at the end of the life.
    names: BTreeMap<u64, String>,
}

impl Stats {
    /// Empty statistics of a machine that began at `start`.
    pub(super) fn since(start: Instant) -> Self {
        Self {
            since: start,
            start: Duration::ZERO,
            run: Duration::ZERO,
            paused: Duration::ZERO,
            end: Duration::ZERO,
            resets: 0,
            vcpus: Vec::new(),
            names: BTreeMap::new(),
        }
    }

    pub(super) fn guest_starts(&mut self) {
        // After a reset, the time since the previous life counts as start-up time.
        self.resets += u64::from(self.run + self.paused > Duration::ZERO);
        let took = self.lap();
        self.start += took;
    }

    /// Adds the time since the last call: in it the guest was in `state`.
    pub(super) fn guest_was(&mut self, state: State) {
        let took = self.lap();
        match state {
            State::Running => self.run += took,
            State::Paused => self.paused += took,
        }
    }

    pub(super) fn put_away(&mut self) {
        self.end = self.lap();
    }

    /// Adds the exits of the vCPUs of one life, in the order of their harts. `registers_at` returns
    /// the name of the device at an address.
    pub(super) fn add(
        &mut self,
        life: Vec<Option<ExitStats>>,
        registers_at: impl Fn(u64) -> Option<String>,
    ) {
        self.vcpus.resize_with(life.len(), ExitStats::default);
        for (all, one) in self.vcpus.iter_mut().zip(life) {
            all.merge(one.unwrap_or_default());
        }
        // A few hundred names per vCPU at most, because the number of kinds is limited.
        let kinds = self.vcpus.iter().flat_map(ExitStats::kinds);
        for gpa in kinds.filter_map(|(kind, _)| kind.gpa()) {
            if let Entry::Vacant(entry) = self.names.entry(gpa) {
                registers_at(gpa).map(|name| entry.insert(name));
            }
        }
    }

    /// The name of the device that an exit accessed.
    fn device(&self, kind: &ExitKind) -> Option<&str> {
        let name = self.names.get(&kind.gpa()?)?;
        Some(name)
    }

    fn lap(&mut self) -> Duration {
        let began = std::mem::replace(&mut self.since, Instant::now());
        self.since - began
    }

    /// Whether `bytes` are statistics that [`Stats::json`] made.
    pub fn is_json(bytes: &[u8]) -> bool {
        let keys = [
            "end_ns",
            "paused_ns",
            "resets",
            "run_ns",
            "start_ns",
            "vcpus",
        ];
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(all)) => all.keys().eq(keys),
            _ => false,
        }
    }

    /// The statistics as JSON, for scripts. Times are in nanoseconds.
    pub fn json(&self) -> Value {
        let vcpus: Vec<Value> = self.vcpus.iter().map(|vcpu| self.vcpu(vcpu)).collect();
        json!({
            "start_ns": nanos(self.start),
            "run_ns": nanos(self.run),
            "paused_ns": nanos(self.paused),
            "end_ns": nanos(self.end),
            "resets": self.resets,
            "vcpus": vcpus,
        })
    }

    fn vcpu(&self, stats: &ExitStats) -> Value {
        let counters = stats.counters.iter();
        let counters: Map<_, _> = counters
            .map(|counter| (counter.name.clone(), counter.value.into()))
            .collect();
        let exits: Vec<Value> = stats
            .kinds()
            .iter()
            .map(|(kind, tally)| {
                json!({
                    "kind": kind.to_string(),
                    "device": self.device(kind),
                    "count": tally.count,
                    "time_ns": nanos(tally.time),
                })
            })
            .collect();
        json!({ "kvm": counters, "exits": exits })
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The statistics as text for people: lines, the last without a newline.
impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "time: {:.1} ms to start, {:.1} ms running, {:.1} ms to end",
            millis(self.start),
            millis(self.run),
            millis(self.end)
        )?;
        if self.paused > Duration::ZERO {
            write!(f, ", {:.1} ms paused", millis(self.paused))?;
        }
        if self.resets > 0 {
            write!(f, ", {} resets", self.resets)?;
        }
        for (id, stats) in self.vcpus.iter().enumerate() {
            write!(f, "\nvCPU {id}, counted by KVM:")?;
            for counter in stats.counters.iter().filter(|counter| counter.value > 0) {
                write!(f, "\n  {:<44} {:>9}", counter.name, counter.value)?;
            }
            write!(f, "\nvCPU {id}, exits to rvmm: {:>31}", "count")?;
            write!(f, " {:>11} {:>9}", "ms in rvmm", "us each")?;
            let kinds = stats.kinds();
            for (kind, tally) in kinds.iter().take(KINDS_LISTED) {
                let device = self.device(kind).map(|name| format!(" ({name})"));
                let name = format!("{kind}{}", device.unwrap_or_default());
                let (count, time) = (tally.count, millis(tally.time));
                let each = 1e6 * tally.time.as_secs_f64() / count as f64;
                write!(f, "\n  {name:<44} {count:>9} {time:>11.2} {each:>9.2}")?;
            }
            if kinds.len() > KINDS_LISTED {
                write!(f, "\n  and {} more kinds", kinds.len() - KINDS_LISTED)?;
            }
        }
        Ok(())
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::{Counter, VmExit};
    use crate::machine::layout;

    fn stats() -> Stats {
        let mut vcpu = ExitStats::default();
        let gpa = layout::UART.start;
        vcpu.add(&VmExit::MmioRead { gpa, len: 1 }, Duration::ZERO);
        vcpu.counters.push(Counter {
            name: "exits".into(),
            value: 2,
        });
        let mut stats = Stats::since(Instant::now());
        for _ in 0..2 {
            let name = |gpa| layout::owner(gpa).map(Into::into);
            stats.add(vec![Some(vcpu.clone())], name);
        }
        stats.start = Duration::from_micros(1500);
        stats
    }

    #[test]
    fn people_read_names_and_units() {
        let text = stats().to_string();
        assert!(text.starts_with("time: 1.5 ms to start"), "{text}");
        assert!(text.contains("MMIO read 0x10000000 (UART)"), "{text}");
        assert!(
            text.lines()
                .any(|line| line.split_whitespace().eq(["exits", "4"]))
        );
    }

    #[test]
    fn a_pause_is_not_the_guests_time() {
        let mut stats = stats();
        stats.guest_was(State::Running);
        assert!(!stats.to_string().contains("paused"));
        let run = stats.run;
        std::thread::sleep(Duration::from_millis(1));
        stats.guest_was(State::Paused);
        assert_eq!(stats.run, run);
        assert!(stats.json()["paused_ns"].as_u64() >= Some(1_000_000));
        assert!(stats.to_string().contains("ms paused"));
    }

    #[test]
    fn scripts_read_everything() {
        let json = stats().json();
        assert!(Stats::is_json(format!("{json:#}\n").as_bytes()));
        for other in ["", "{}", r#"{ "end_ns": 5, "mine": "keep" }"#, "[]"] {
            assert!(!Stats::is_json(other.as_bytes()), "{other}");
        }
        assert_eq!(json["start_ns"], 1_500_000);
        assert_eq!(json["vcpus"][0]["kvm"]["exits"], 4);
        let exit = &json["vcpus"][0]["exits"][0];
        assert_eq!(exit["device"], "UART");
        assert_eq!(exit["count"], 2);
    }
}
