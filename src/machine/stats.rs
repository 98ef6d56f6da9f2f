//! `--stats`: what the machine did, told at its end.

use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::layout;
use crate::vcpu::stats::{ExitKind, ExitStats};

/// Kinds of exits that the text tells, for each vCPU.
const KINDS_TOLD: usize = 20;

/// Where a machine's time went.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// From the process' start to the guest's.
    pub start: Duration,
    /// The guest ran.
    pub run: Duration,
    /// From the guest's end until all was put away.
    pub end: Duration,
    /// By vCPU.
    pub vcpus: Vec<ExitStats>,
}

impl Stats {
    /// All of it, for scripts. Times are in nanoseconds.
    pub fn json(&self) -> Value {
        let vcpus: Vec<Value> = self.vcpus.iter().map(vcpu).collect();
        json!({
            "start_ns": nanos(self.start),
            "run_ns": nanos(self.run),
            "end_ns": nanos(self.end),
            "vcpus": vcpus,
        })
    }
}

fn vcpu(stats: &ExitStats) -> Value {
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
                "device": device(kind),
                "count": tally.count,
                "time_ns": nanos(tally.time),
            })
        })
        .collect();
    json!({ "kvm": counters, "exits": exits })
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Which device's registers an exit was for.
fn device(kind: &ExitKind) -> Option<&'static str> {
    match kind {
        ExitKind::MmioRead(gpa) | ExitKind::MmioWrite(gpa) => layout::owner(*gpa),
        _ => None,
    }
}

/// For people: lines without a last line end.
impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "time: {:.1} ms to start, {:.1} ms the guest ran, {:.1} ms to end",
            millis(self.start),
            millis(self.run),
            millis(self.end)
        )?;
        for (id, stats) in self.vcpus.iter().enumerate() {
            write!(f, "\nvCPU {id}, counted by KVM:")?;
            for counter in stats.counters.iter().filter(|counter| counter.value > 0) {
                write!(f, "\n  {:<44} {:>9}", counter.name, counter.value)?;
            }
            write!(f, "\nvCPU {id}, exits to rvmm: {:>31}", "count")?;
            write!(f, " {:>11} {:>9}", "ms in rvmm", "us each")?;
            let kinds = stats.kinds();
            for (kind, tally) in kinds.iter().take(KINDS_TOLD) {
                let device = device(kind).map(|name| format!(" ({name})"));
                let name = format!("{kind}{}", device.unwrap_or_default());
                let (count, time) = (tally.count, millis(tally.time));
                let each = 1e6 * tally.time.as_secs_f64() / count as f64;
                write!(f, "\n  {name:<44} {count:>9} {time:>11.2} {each:>9.2}")?;
            }
            if kinds.len() > KINDS_TOLD {
                write!(f, "\n  and {} more kinds", kinds.len() - KINDS_TOLD)?;
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
    use crate::hypervisor::Counter;

    fn stats() -> Stats {
        let mut vcpu = ExitStats::default();
        let gpa = layout::UART.start;
        vcpu.add(ExitKind::MmioRead(gpa), Duration::ZERO);
        vcpu.counters.push(Counter {
            name: "exits".into(),
            value: 3,
        });
        Stats {
            start: Duration::from_micros(1500),
            vcpus: vec![vcpu],
            ..Stats::default()
        }
    }

    #[test]
    fn people_read_names_and_units() {
        let text = stats().to_string();
        assert!(text.starts_with("time: 1.5 ms to start"), "{text}");
        assert!(text.contains("MMIO read 0x10000000 (UART)"), "{text}");
        assert!(
            text.lines()
                .any(|line| line.split_whitespace().eq(["exits", "3"]))
        );
    }

    #[test]
    fn scripts_read_everything() {
        let json = stats().json();
        assert_eq!(json["start_ns"], 1_500_000);
        assert_eq!(json["vcpus"][0]["kvm"]["exits"], 3);
        let exit = &json["vcpus"][0]["exits"][0];
        assert_eq!(exit["device"], "UART");
        assert_eq!(exit["count"], 1);
    }
}
