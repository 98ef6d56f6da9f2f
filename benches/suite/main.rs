//! The benchmark's driver. It runs in L1, which scripts/bench boots, starts every contestant
//! several times, and writes one table and one JSON document.
//!
//! ```text
//! main         what to measure, in which order      measure  one run of one contestant
//! contestants  how each VMM is started              memory   a process's memory beside guest RAM
//! figures      samples, medians, ratios             report   the table and the JSON
//! attribution  where rvmm's boot spends its time    wire     disks and networks
//! snapshot     snapshots, restores and clones
//! ```

mod attribution;
mod contestants;
mod figures;
mod measure;
mod memory;
mod report;
mod snapshot;
mod wire;

use std::env;
use std::fs;

use anyhow::{Context, Result};

use contestants::{Contestant, Host};
use figures::Figures;
use measure::Lab;

/// The options of scripts/bench, from the environment.
struct Plan {
    /// The kind of host.
    host: String,
    /// Its harts and its clock, in words.
    l1: String,
    repetitions: usize,
    /// Groups of figures; all if empty.
    only: Vec<String>,
    /// The file for the report.
    report: String,
}

impl Plan {
    fn from_env() -> Result<Self> {
        let var = |name: &str| env::var(name).with_context(|| format!("{name} is not set"));
        Ok(Self {
            host: var("RVMM_BENCH_HOST")?,
            l1: var("RVMM_BENCH_L1")?,
            repetitions: var("RVMM_BENCH_REPETITIONS")?.parse()?,
            only: words("RVMM_BENCH_ONLY"),
            report: var("LOG")?,
        })
    }

    fn wants(&self, group: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == group)
    }
}

fn words(name: &str) -> Vec<String> {
    let value = env::var(name).unwrap_or_default();
    value
        .split([' ', ','])
        .filter(|w| !w.is_empty())
        .map(Into::into)
        .collect()
}

/// One measurement of one contestant.
type Measure = fn(&Lab, &Contestant, &mut Figures) -> Result<()>;

/// The groups, how often each is measured in a round, and how.
const MEASUREMENTS: [(&str, usize, Measure); 13] = [
    ("boot", 1, measure::boot),
    ("hugeboot", 1, measure::boot_in_hugepages),
    ("log", 1, measure::boot_with_log),
    // Its samples form two clusters, 40 ms apart.
    ("init", 3, measure::clock_at_init),
    ("firstbyte", 1, measure::first_byte),
    ("exits", 1, measure::exits),
    ("pages", 1, measure::pages),
    ("processes", 1, measure::processes),
    ("memory", 1, measure::memory_and_term),
    ("blk", 1, wire::blk),
    ("net", 1, wire::net),
    ("snapshot", 1, snapshot::snapshot),
    ("clones", 1, snapshot::clones),
];

fn main() -> Result<()> {
    let plan = Plan::from_env()?;
    let quick = plan.repetitions == 1;
    let lab = Lab::set_up(quick)?;
    let contestants = contestants::all(&Host::of(&plan.host)?, lab.dir(), quick)?;
    let mut figures = Figures::default();
    // The first round only fills L1's caches, unless it is the only one.
    let first = usize::from(quick);
    for repetition in first..=plan.repetitions {
        for (group, times, measurement) in MEASUREMENTS {
            let times = if repetition > first { times } else { 1 };
            let turns = (0..times).flat_map(|_| &contestants);
            let turns = turns.filter(|contestant| contestant.takes_part(group));
            for contestant in turns.filter(|_| plan.wants(group)) {
                println!(
                    "{repetition} of {}: {group}, {}",
                    plan.repetitions, contestant.name
                );
                let mut samples = Figures::default();
                if let Err(error) = measurement(&lab, contestant, &mut samples) {
                    println!("{group}, {}: {error:#}", contestant.name);
                    figures.failed(group, &contestant.name, &format!("{error:#}"));
                }
                if repetition > 0 {
                    figures.merge(samples);
                }
            }
        }
    }
    figures.add_given("clock at /init", "ms", "bare", &words("RVMM_BENCH_BARE"))?;
    for word in words("RVMM_BENCH_SIZE") {
        let (part, bytes) = word.split_once('=').context("RVMM_BENCH_SIZE")?;
        figures.add_size(part, bytes.parse()?);
    }
    if plan.wants("boot") {
        match attribution::boot(&lab, &contestants[0], &figures) {
            Ok(parts) => figures.boot_parts = parts,
            Err(error) => figures.failed("boot", "rvmm", &format!("{error:#}")),
        }
    }
    let host = format!("{}, {}", plan.host, plan.l1);
    let text = report::write(&host, plan.repetitions, &contestants, &figures);
    fs::write(&plan.report, text).with_context(|| format!("cannot write {}", plan.report))?;
    // A contestant that is always there must not fail.
    let broken = figures.failures_of(&["rvmm", "qemu", "floor", "again", "before"]);
    anyhow::ensure!(
        broken.is_empty(),
        "could not be measured: {}",
        broken.join("; ")
    );
    Ok(())
}
