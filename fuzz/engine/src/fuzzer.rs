//! The loop: change an input, run it, and keep it if it reached something new.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::coverage::{self, Coverage};
use crate::mutate::{Material, mutate};
use crate::options::Options;
use crate::rng::Rng;
use crate::watch::Input;

/// Fuzzes as `options` say. Each input is written to `shared` before it runs.
pub(crate) fn fuzz(options: &Options, target: fn(&[u8]), shared: &mut Input) {
    let mut fuzzer = Fuzzer {
        options,
        target,
        shared,
        coverage: Coverage::new(),
        kept: Vec::new(),
        runs: 0,
        started: Instant::now(),
        alarmed: None,
    };
    let (seeds, are_files) = seeds(&options.corpus);
    for seed in &seeds {
        fuzzer.try_input(seed);
    }
    if are_files {
        println!("{} inputs ran to their ends", seeds.len());
        return;
    }
    if fuzzer.kept.is_empty() {
        fuzzer.kept.push(Vec::new());
    }
    fuzzer.go_on(&words(&seeds));
    println!(
        "{} runs in {} s, {} inputs kept, {} of {} edges reached",
        fuzzer.runs,
        fuzzer.started.elapsed().as_secs(),
        fuzzer.kept.len(),
        fuzzer.coverage.edges(),
        fuzzer.coverage.all()
    );
}

struct Fuzzer<'a> {
    options: &'a Options,
    target: fn(&[u8]),
    shared: &'a mut Input,
    coverage: Coverage,
    /// Inputs that reached something new, oldest first.
    kept: Vec<Vec<u8>>,
    runs: u64,
    started: Instant,
    /// When the alarm was set that ends an input which takes too long.
    alarmed: Option<Instant>,
}

impl Fuzzer<'_> {
    fn go_on(&mut self, words: &[Vec<u8>]) {
        let mut rng = Rng::new(self.options.seed);
        let mut input = Vec::new();
        while !self.is_over() {
            input.clone_from(&self.kept[self.choose(&mut rng)]);
            let material = Material {
                words,
                pairs: &coverage::pairs(),
                other: &self.kept[self.choose(&mut rng)],
                max_len: self.options.max_len,
            };
            mutate(&mut input, &mut rng, &material);
            if self.try_input(&input) {
                self.write(&input);
            }
        }
    }

    /// Every second time it is one of the newest.
    fn choose(&self, rng: &mut Rng) -> usize {
        let count = self.kept.len();
        match rng.below(2) {
            0 => rng.below(count),
            _ => count - 1 - rng.below(count.div_ceil(8)),
        }
    }

    fn is_over(&self) -> bool {
        let most = self.options.max_total_time.unwrap_or(Duration::MAX);
        self.runs >= self.options.runs || self.started.elapsed() >= most
    }

    fn try_input(&mut self, input: &[u8]) -> bool {
        self.set_alarm();
        self.shared.set(input);
        self.runs += 1;
        let target = self.target;
        let is_new = self.coverage.run(|| target(input));
        if is_new {
            self.kept.push(input.to_vec());
        }
        is_new
    }

    /// Not for each input, because it is a system call.
    fn set_alarm(&mut self) {
        let is_set = self
            .alarmed
            .is_some_and(|at| at.elapsed() < Duration::from_secs(1));
        if !is_set {
            self.alarmed = Some(Instant::now());
            // SAFETY: it only sets a timer.
            unsafe { libc::alarm(self.options.timeout.saturating_add(1)) };
        }
    }

    fn write(&self, input: &[u8]) {
        if let [first, _, ..] = self.options.corpus.as_slice() {
            let _ = fs::write(first.join(format!("{:016x}", hash(input))), input);
        }
    }
}

/// A name for an input: FNV-1a.
pub(crate) fn hash(input: &[u8]) -> u64 {
    input.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// All inputs in `places`, sorted by name, and whether `places` are files, to be run once.
fn seeds(places: &[PathBuf]) -> (Vec<Vec<u8>>, bool) {
    let are_files = !places.is_empty() && places.iter().all(|place| place.is_file());
    let mut files = BTreeSet::new();
    for place in places {
        match fs::read_dir(place) {
            Ok(entries) => files.extend(entries.flatten().map(|entry| entry.path())),
            Err(_) if place.is_file() => drop(files.insert(place.clone())),
            Err(error) => {
                eprintln!("Failed to read inputs at {place:?}: {error}");
                std::process::exit(125);
            }
        }
    }
    let read = |path: &PathBuf| fs::read(Path::new(path)).ok();
    (files.iter().filter_map(read).collect(), are_files)
}

/// The words of the initial inputs, as a dictionary.
fn words(seeds: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let is_end = |byte: &u8| !(byte.is_ascii_alphanumeric() || *byte == b'_' || *byte == b'-');
    let words = seeds.iter().flat_map(|seed| seed.split(is_end));
    let words: BTreeSet<&[u8]> = words
        .filter(|word| (1..=32).contains(&word.len()))
        .collect();
    words.into_iter().map(<[u8]>::to_vec).collect()
}
