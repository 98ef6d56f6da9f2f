//! Compares the answers of KVM and rvmm to SBI calls with the specification. The guest
//! `resources/guests/conformance.S` makes the calls and judges the answers, on one hart and on
//! several. Known deviations of the host's kernel count apart, and are no failures.
#![cfg(target_arch = "riscv64")]

use std::collections::HashSet;

use crate::common::{Outcome, POWERED_OFF, Rvmm};

/// Extensions that every machine has, with the least number of checks on one hart, and for each
/// further hart.
const EXTENSIONS: [(&str, usize, usize); 7] = [
    ("BASE", 29, 0),
    ("TIME", 13, 0),
    ("IPI", 18, 5),
    ("RFENCE", 41, 2),
    ("HSM", 21, 25),
    ("SRST", 7, 0),
    ("DBCN", 32, 0),
];

/// Extensions that only some hosts' KVM has.
const OPTIONAL: [&str; 4] = ["STA", "PMU", "SUSP", "FWFT"];

/// The text that the guest writes as one of the checks. Refused calls write nothing.
const TEXT: &str = "text by console_write!";
const LEAK: &str = "LEAK";

/// One line of the guest that reports a check.
struct Check<'a> {
    name: &'a str,
    verdict: &'a str,
}

impl Check<'_> {
    fn failed(&self) -> bool {
        self.verdict != "ok" && !self.is_known()
    }

    fn is_known(&self) -> bool {
        self.verdict.starts_with("known, got ")
    }
}

/// The numbers of checks, of failed checks, and of known deviations.
type Sums = (usize, usize, usize);

/// The checks among the guest's lines: the extension's name, a blank, the check's name, a colon,
/// the verdict.
fn checks(console: &str) -> Vec<Check<'_>> {
    console
        .lines()
        .filter_map(|line| {
            let (name, verdict) = line.rsplit_once(": ")?;
            let (extension, _) = name.split_once(' ')?;
            is_extension(extension).then_some(Check { name, verdict })
        })
        .collect()
}

fn is_extension(name: &str) -> bool {
    EXTENSIONS.iter().any(|(known, ..)| *known == name) || OPTIONAL.contains(&name)
}

/// The sums of the checks of `extension`, counted here.
fn count(checks: &[Check<'_>], extension: &str) -> Sums {
    let prefix = format!("{extension} ");
    let own: Vec<_> = checks
        .iter()
        .filter(|check| check.name.starts_with(&prefix))
        .collect();
    (
        own.len(),
        own.iter().filter(|check| check.failed()).count(),
        own.iter().filter(|check| check.is_known()).count(),
    )
}

/// The most runs of the guest. In one of them the TIME checks must pass.
const TIMER_RUNS: usize = 3;

/// Runs the guest on `harts` harts. If only TIME checks fail, runs it again: on a host with Sstc,
/// KVM forgets a timer that is set while the vCPU's thread loses its processor (docs/testing.md).
fn run(harts: usize) -> Outcome {
    let guest = || {
        Rvmm::guest("conformance")
            .args(["--cpus", &harts.to_string()])
            .run()
    };
    for _ in 1..TIMER_RUNS {
        let end = guest();
        let mut failed = checks(&end.console).into_iter().filter(Check::failed);
        let is_timer_only = failed.next().is_some_and(|first| {
            first.name.starts_with("TIME ") && failed.all(|check| check.name.starts_with("TIME "))
        });
        if !is_timer_only {
            return end;
        }
        println!("again: a TIME check failed");
    }
    guest()
}

/// Runs the guest on `harts` harts, and judges its lines.
#[track_caller]
fn conformance(harts: usize) {
    let end = run(harts);
    let checks = checks(&end.console);
    let failed: Vec<_> = checks
        .iter()
        .filter(|check| check.failed())
        .map(|check| format!("{}: {}", check.name, check.verdict))
        .collect();
    assert!(failed.is_empty(), "failed checks:\n{}", failed.join("\n"));

    let mut names = HashSet::new();
    for check in &checks {
        assert!(
            names.insert(check.name),
            "{:?} is reported more than once",
            check.name
        );
    }
    assert_sums(&end, &checks, harts);
    let texts = end.console.lines().filter(|line| *line == TEXT).count();
    assert_eq!(texts, 1, "{TEXT:?} must be exactly one line of the console");
    assert!(
        !end.console.contains(LEAK),
        "a refused write must print nothing"
    );
    end.assert_status(POWERED_OFF);
}

/// The guest's own sums match its lines, and no check is missing.
#[track_caller]
fn assert_sums(end: &Outcome, checks: &[Check<'_>], harts: usize) {
    let has_line = |want: &str| {
        assert!(
            end.console.lines().any(|line| line == want),
            "the console has no line {want:?}"
        );
    };
    let mut known = 0;
    for (extension, alone, each) in EXTENSIONS {
        let (count, failed, deviations) = count(checks, extension);
        has_line(&format!(
            "{extension}: {count} checks, {failed} failed, {deviations} known"
        ));
        let least = alone + each * (harts - 1);
        assert!(
            count >= least,
            "{extension} has {count} checks, and had {least}"
        );
        known += deviations;
    }
    for extension in OPTIONAL {
        let (count, failed, deviations) = count(checks, extension);
        if count > 0 {
            has_line(&format!(
                "{extension}: {count} checks, {failed} failed, {deviations} known"
            ));
        }
        known += deviations;
    }
    let total = checks.len();
    let last = end.console.lines().last().unwrap_or_default();
    assert_eq!(
        last,
        format!("conformance: {total} checks, 0 failed, {harts} harts, {known} known"),
        "the last line"
    );
}

#[test]
fn one_hart() {
    conformance(1);
}

#[test]
fn two_harts() {
    conformance(2);
}

#[test]
fn four_harts() {
    conformance(4);
}
