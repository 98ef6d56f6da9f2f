//! The judge of a suite: decides which cases have passed, from the records that the binaries left.
//!
//!     suite-judge LABEL SUITE RECORDS LOG
//!
//! SUITE is a folder with a list `NAME.names` for each binary: the cases that were to run.
//! `resources/rig/run-tests` wrote RECORDS and LOG. The judge prints a line `ok` or `FAIL` for each
//! case, then the output of each binary with a failure, and last `judged PASSED FAILED`.
//!
//! A case has passed if there is exactly one record of it, and that is `ok`. These are failures: a
//! missing record, an ignored case, two records of one case, a record of a case that was not to
//! run, a binary that did not end, and an exit status that no record explains.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs, io};

/// Lines of a binary's output that are shown.
const SHOWN: usize = 200;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [label, suite, records, log] = &arguments[..] else {
        eprintln!("suite-judge: usage: suite-judge LABEL SUITE RECORDS LOG");
        return ExitCode::from(2);
    };
    match judge_all(label, suite.as_ref(), records.as_ref(), log.as_ref()) {
        Ok(verdicts) => {
            print!("{verdicts}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("suite-judge: Failed to read suite {suite:?}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The verdicts on all binaries of a suite.
fn judge_all(label: &str, suite: &Path, records: &Path, log: &Path) -> io::Result<String> {
    // A host that died left no records: then each case fails.
    let records = fs::read_to_string(records).unwrap_or_default();
    let log = fs::read(log).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let (mut lines, mut passed, mut failed) = (String::new(), 0, 0);
    for names in lists(suite)? {
        let name = names
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let wanted = fs::read_to_string(&names)?;
        let wanted: Vec<&str> = wanted.lines().collect();
        let before = failed;
        for verdict in judge(&name, &wanted, &records) {
            match verdict.why {
                None => passed += 1,
                Some(_) => failed += 1,
            }
            lines += &verdict.line(label, &name);
        }
        if failed > before {
            lines += &shown(&name, &log);
        }
    }
    Ok(format!("{lines}judged {passed} {failed}\n"))
}

/// The lists of a suite, in the order of their names.
fn lists(suite: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(suite)?.collect::<io::Result<Vec<_>>>()?;
    let mut lists: Vec<_> = entries.into_iter().map(|entry| entry.path()).collect();
    lists.retain(|path| path.extension() == Some("names".as_ref()));
    lists.sort();
    if lists.is_empty() {
        return Err(io::Error::other("it has no cases"));
    }
    Ok(lists)
}

/// The verdict on a case, or on the whole binary.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    /// None for the whole binary.
    case: Option<String>,
    /// Why it has failed, if it has.
    why: Option<String>,
}

impl Verdict {
    fn of(case: &str, why: Option<String>) -> Self {
        let case = Some(case.to_owned());
        Self { case, why }
    }

    fn of_all(why: String) -> Self {
        let (case, why) = (None, Some(why));
        Self { case, why }
    }

    fn line(&self, label: &str, name: &str) -> String {
        let case = self.case.as_ref().map(|case| format!("::{case}"));
        let case = case.unwrap_or_default();
        match &self.why {
            None => format!("ok   {label}/{name}{case}\n"),
            Some(why) => format!("FAIL {label}/{name}{case} ({why})\n"),
        }
    }
}

/// The verdicts on binary `name`, of which the cases `wanted` were to run. Each line of `records`
/// is `NAME WORD.. CASE` or `NAME exit STATUS`.
fn judge(name: &str, wanted: &[&str], records: &str) -> Vec<Verdict> {
    let (mut said, mut exits) = (BTreeMap::<&str, Vec<String>>::new(), Vec::new());
    for line in records.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [binary, "exit", status] if binary == name => exits.push(status),
            [binary, ref what @ .., case] if binary == name => {
                said.entry(case).or_default().push(what.join(" "));
            }
            _ => {}
        }
    }
    let mut verdicts = Vec::new();
    for case in wanted {
        let why = match said.remove(case).as_deref() {
            None => Some("no record".to_owned()),
            Some([word]) if word == "ok" => None,
            Some([word]) => Some(word.trim_end_matches(':').to_owned()),
            Some(_) => Some("more than one record".to_owned()),
        };
        verdicts.push(Verdict::of(case, why));
    }
    for case in said.into_keys() {
        verdicts.push(Verdict::of(case, Some("it was not to run".to_owned())));
    }
    let has_failed = verdicts.iter().any(|verdict| verdict.why.is_some());
    match exits[..] {
        [] => verdicts.push(Verdict::of_all("never ended".to_owned())),
        ["0"] => {}
        [status] if has_failed && status.parse::<i32>().is_ok() => {}
        _ => verdicts.push(Verdict::of_all(format!("exit status {}", exits.join(", ")))),
    }
    verdicts
}

/// The last lines that binary `name` printed. They are in `log`, after a line `=== NAME`.
fn shown(name: &str, log: &str) -> String {
    let title = format!("=== {name}");
    let begins = |line: &&str| line.starts_with("=== ");
    let mut lines: Vec<&str> = Vec::new();
    let mut rest = log.lines().skip_while(|line| *line != title);
    lines.extend(rest.next());
    lines.extend(rest.take_while(|line| !begins(line)));
    let skipped = lines.len().saturating_sub(SHOWN);
    let lines = lines.into_iter().skip(skipped);
    lines.fold(String::new(), |text, line| text + "    | " + line + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The verdicts on the cases `a` and `b`, as lines.
    fn said(records: &str) -> Vec<String> {
        let verdicts = judge("bin", &["a", "b"], records);
        verdicts
            .iter()
            .map(|verdict| verdict.line("kind", "bin").trim_end().to_owned())
            .collect()
    }

    const A: &str = "ok   kind/bin::a";

    #[test]
    fn all_is_well() {
        let records = "other FAILED a\nbin ok a\nbin ok b\nbin exit 0\nother exit 101\n";
        assert_eq!(said(records), [A, "ok   kind/bin::b"]);
    }

    #[test]
    fn a_missing_record_fails() {
        let expected = [A, "FAIL kind/bin::b (no record)"];
        assert_eq!(said("bin ok a\nbin exit 0\n"), expected);
        assert_eq!(said("bin ok a\nbin exit 101\n"), expected);
    }

    #[test]
    fn two_records_fail() {
        let records = "bin ok a\nbin ok b\nbin ok b\nbin exit 0\n";
        assert_eq!(
            said(records),
            [A, "FAIL kind/bin::b (more than one record)"]
        );
    }

    #[test]
    fn an_ignored_case_fails() {
        let records = "bin ok a\nbin ignored b\nbin exit 0\n";
        assert_eq!(said(records), [A, "FAIL kind/bin::b (ignored)"]);
        // libtest's record of one with a reason.
        let records = "bin ok a\nbin ignored, a reason: b\nbin exit 0\n";
        assert_eq!(said(records), [A, "FAIL kind/bin::b (ignored, a reason)"]);
    }

    #[test]
    fn an_early_end_fails() {
        let both = [A, "ok   kind/bin::b", "FAIL kind/bin (never ended)"];
        assert_eq!(said("bin ok a\nbin ok b\n"), both);
        let none = [
            "FAIL kind/bin::a (no record)",
            "FAIL kind/bin::b (no record)",
            both[2],
        ];
        assert_eq!(said(""), none);
    }

    #[test]
    fn a_failed_case_fails() {
        let records = "bin ok a\nbin failed b\nbin exit 101\n";
        assert_eq!(said(records), [A, "FAIL kind/bin::b (failed)"]);
    }

    #[test]
    fn an_exit_status_that_no_record_explains_fails() {
        for status in ["101", "0\nbin exit 0", "137\nbin exit 0"] {
            let records = format!("bin ok a\nbin ok b\nbin exit {status}\n");
            assert!(
                said(&records)[2].starts_with("FAIL kind/bin (exit status "),
                "{status}"
            );
        }
    }

    #[test]
    fn a_case_that_was_not_to_run_fails() {
        let records = "bin ok a\nbin ok b\nbin ok c\nbin exit 0\n";
        assert_eq!(said(records)[2], "FAIL kind/bin::c (it was not to run)");
    }

    #[test]
    fn a_suite_is_judged_whole() {
        let suite = env::temp_dir().join(format!("rvmm-judge-{}", std::process::id()));
        let of = |name: &str| suite.join(name);
        fs::create_dir(&suite).unwrap();
        fs::write(of("bin.names"), "a\nb\n").unwrap();
        fs::write(of("one.names"), "c\n").unwrap();
        fs::write(
            of("records"),
            "bin ok a\nbin failed b\nbin exit 101\none ok c\none exit 0\n",
        )
        .unwrap();
        fs::write(
            of("log"),
            "=== one\nfine\n=== bin\nb: it broke\n=== two\nx\n",
        )
        .unwrap();
        let verdicts = judge_all("kind", &suite, &of("records"), &of("log")).unwrap();
        let none = judge_all("kind", &suite, &of("gone"), &of("gone")).unwrap();
        fs::remove_file(of("bin.names")).unwrap();
        fs::remove_file(of("one.names")).unwrap();
        assert!(
            judge_all("kind", &suite, &of("records"), &of("log")).is_err(),
            "no cases"
        );
        fs::remove_dir_all(&suite).unwrap();
        let expected = "ok   kind/bin::a\nFAIL kind/bin::b (failed)\n    | === bin\n    \
                        | b: it broke\n\
                        ok   kind/one::c\njudged 2 1\n";
        assert_eq!(verdicts, expected);
        assert!(none.ends_with("judged 0 5\n"), "{none}");
    }
}
