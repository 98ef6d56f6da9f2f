//! The pages of the teaching guests (`docs/guests`) show what these guests print, and which exits
//! they cause.
//!
//! A page has blocks of output, made by `scripts/guest-pages`. A block of `show --checked` must be
//! what `resources/guests/show` prints here. Another block has the times of one run, and the order
//! in which harts took turns. Without these, it must have what a checked block of its page has.
#![cfg(target_arch = "riscv64")]

use std::process::{Command, Stdio};

use crate::common::files::{guest, rvmm};
use crate::common::host;

const BEGIN: &str = "<!-- output of: show ";
const END: &str = "<!-- end of output -->";
const CHECKED: &str = "--checked ";

/// The blocks of a page: the arguments of `show`, and the output.
fn blocks(page: &str) -> Vec<(&str, Vec<&str>)> {
    let mut lines = page.lines();
    let mut found = Vec::new();
    while let Some(line) = lines.next() {
        let Some(arguments) = line.strip_prefix(BEGIN) else {
            continue;
        };
        let arguments = arguments.strip_suffix(" -->").expect("the end of a mark");
        let block = lines.by_ref().take_while(|line| *line != END);
        let text = block.filter(|line| !line.starts_with("```"));
        found.push((arguments, text.collect()));
    }
    found
}

/// What `show` prints.
#[track_caller]
fn shown(arguments: &str) -> String {
    host::kind();
    let script = guest("teach-sbi").with_file_name("show");
    let output = Command::new("sh")
        .arg(script)
        .args(arguments.split(' '))
        .env("RVMM_TEST_BIN", rvmm())
        .stdin(Stdio::null())
        .output()
        .expect("run sh");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "show {arguments}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Checks that `show` has printed a block.
#[track_caller]
fn assert_shown(arguments: &str, shown: &str, block: &[&str]) {
    let lines: Vec<&str> = shown.lines().collect();
    if lines != block {
        let same = lines.iter().zip(block).take_while(|(a, b)| a == b).count();
        let (printed, expected) = (lines.get(same), block.get(same));
        panic!(
            "`show {arguments}` prints\n{shown}\nThe page differs in line {}: {printed:?} and \
             {expected:?}. scripts/guest-pages makes it again",
            same + 1
        );
    }
}

/// The event in a line of a trace, without its times. None if it is another line, or a moment at
/// which rvmm itself interrupted a vCPU.
fn event(line: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let event = match words[..] {
        [row, ..] if row.starts_with("vcpu-") => &words[..],
        [_, row, _, "us" | "ms" | "s", ..] if row.starts_with("vcpu-") => {
            &[&words[1..2], &words[4..]].concat()
        }
        _ => return None,
    };
    (event.last() != Some(&"interrupted")).then(|| event.join(" "))
}

/// The events of a block, in the order of their text.
fn events(block: &[&str]) -> Vec<String> {
    let mut events: Vec<String> = block.iter().filter_map(|line| event(line)).collect();
    events.sort();
    events
}

/// Compares a block that has times with a checked one: it has the same events, and all other lines
/// but the commands.
#[track_caller]
fn compare(block: &[&str], checked: &[&str]) {
    assert_eq!(events(block), events(checked));
    let others = checked.iter().filter(|line| event(line).is_none());
    for line in others.filter(|line| !line.starts_with("$ ")) {
        assert!(block.contains(line), "{line:?} is missing");
    }
}

/// Checks all blocks of a page.
#[track_caller]
fn check(page: &str) {
    let blocks = blocks(page);
    let is_checked = |arguments: &str| arguments.starts_with(CHECKED);
    assert!(blocks.iter().any(|(arguments, _)| is_checked(arguments)));
    for (arguments, block) in &blocks {
        if is_checked(arguments) {
            assert_shown(arguments, &shown(arguments), block);
        } else {
            let name = arguments.split(' ').next().expect("a name");
            let checked = format!("{CHECKED}{name}");
            let other = blocks.iter().find(|(arguments, _)| **arguments == checked);
            let (_, other) = other.expect("a checked block of the same guest");
            compare(block, other);
        }
    }
}

#[test]
fn an_sbi_call() {
    check(include_str!("../../docs/guests/teach-sbi.md"));
}

#[test]
fn traps() {
    check(include_str!("../../docs/guests/teach-trap.md"));
}

#[test]
fn a_timer() {
    check(include_str!("../../docs/guests/teach-timer.md"));
}

#[test]
fn a_user_program() {
    check(include_str!("../../docs/guests/teach-user.md"));
}

#[test]
fn harts_on_one_cpu() {
    check(include_str!("../../docs/guests/teach-harts.md"));
}

#[test]
fn two_stages() {
    check(include_str!("../../docs/guests/teach-stages.md"));
}
