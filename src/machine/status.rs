//! rvmm's exit statuses. `--help` prints the table here. A test checks that README.md has the same
//! table.

/// The largest status that a guest can choose. The smallest is 1.
pub(crate) const GUEST_MAX: u8 = 119;
/// The guest asked for a reset, and `--no-reboot` was given.
pub(crate) const RESET: u8 = 120;
/// The guest powered off and reported a failure.
pub(crate) const GUEST_FAILED: u8 = 121;
/// The guest cannot go on.
pub(crate) const CANNOT_GO_ON: u8 = 122;
/// The host or one of its files failed.
pub const HOST_FAILED: u8 = 123;
/// The time limit of `--timeout` has expired.
pub(crate) const TIMED_OUT: u8 = 124;
/// Wrong usage.
pub(crate) const USAGE: u8 = 125;
/// The status of an end by a signal is this plus the signal's number.
pub(crate) const SIGNAL: u8 = 128;

/// Each status, and its meaning.
pub(crate) fn table() -> Vec<(String, String)> {
    let row = |status: &str, meaning: &str| (status.to_owned(), meaning.to_owned());
    let number = |status: u8, meaning| row(&status.to_string(), meaning);
    vec![
        number(0, "the guest powered off, Ctrl-A X or rvmm ctl stop"),
        row(
            &format!("1-{GUEST_MAX}"),
            &format!("chosen by the guest (sifive_test; larger codes become {GUEST_MAX})"),
        ),
        number(RESET, "the guest asked for a reset, with --no-reboot"),
        number(GUEST_FAILED, "the guest powered off and reported a failure"),
        number(CANNOT_GO_ON, "the guest cannot go on"),
        number(HOST_FAILED, "the host or one of its files failed"),
        number(TIMED_OUT, "the time limit of --timeout has expired"),
        number(USAGE, "wrong usage"),
        row(&format!("{SIGNAL}+n"), "ended by signal n"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// README.md may have longer meanings than `--help`.
    #[test]
    fn the_readme_has_the_same_table() {
        let readme = include_str!("../../README.md");
        let (_, rows) = readme
            .split_once("| Exit status | Meaning |\n|---|---|\n")
            .unwrap();
        let (rows, _) = rows.split_once("\n\n").unwrap();
        assert_eq!(rows.lines().count(), table().len());
        for (line, (status, meaning)) in rows.lines().zip(table()) {
            let line = line.replace('`', "");
            let expected = format!("| {status} | {meaning}");
            assert!(line.starts_with(&expected), "{line}, not {expected}");
        }
    }
}
