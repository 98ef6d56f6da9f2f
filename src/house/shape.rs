//! How long files, functions and lines may be, and where `unsafe` may stand.

use super::source::Source;

/// Lines of a file.
const FILE: usize = 500;
/// Lines of a file of tests.
const TESTS: usize = 600;
/// Lines of a function, from its `fn` to its last brace.
const FUNCTION: usize = 70;
/// Characters of a line.
const LINE: usize = 100;

/// Files, functions and lines beyond their limits.
pub(super) fn too_long(sources: &[Source]) -> Vec<String> {
    let mut violations = Vec::new();
    for source in sources {
        let path = &source.path;
        let is_test = source.is_test() || path.starts_with("tests/");
        let (lines, limit) = (
            source.text.lines().count(),
            if is_test { TESTS } else { FILE },
        );
        if lines > limit {
            violations.push(format!("{path}: {lines} lines, and {limit} are the limit"));
        }
        for (number, line) in (1..).zip(source.text.lines()) {
            let width = line.chars().count();
            if width > LINE {
                let what = format!("{width} columns, and {LINE} are the limit");
                violations.push(format!("{path}:{number}: {what}"));
            }
        }
        for (number, name, lines) in functions(&source.text) {
            if lines > FUNCTION {
                let what = format!("`{name}` has {lines} lines, and {FUNCTION} are the limit");
                violations.push(format!("{path}:{number}: {what}"));
            }
        }
    }
    violations
}

/// The functions of a source that rustfmt has formatted: first line, name, number of lines.
fn functions(text: &str) -> Vec<(usize, &str, usize)> {
    let lines: Vec<_> = text.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let Some(name) = function_name(line) else {
            continue;
        };
        let indent = line.len() - line.trim_start().len();
        let is_end = |line: &&str| {
            line.len() - line.trim_start().len() == indent && line.ends_with(['}', ';'])
        };
        let length = lines[at..].iter().position(is_end).map_or(1, |end| end + 1);
        found.push((at + 1, name, length));
    }
    found
}

/// The name of the function that begins on `line`.
fn function_name(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let (before, after) = line.split_once("fn ")?;
    let mut words = before.split_whitespace();
    let is_qualifier = |word: &str| {
        word.starts_with("pub")
            || ["const", "unsafe", "extern", "\"C\"", "in", "async"].contains(&word)
    };
    let is_path = |word: &str| word.ends_with(')') && word.contains("::");
    if !words.all(|word| is_qualifier(word) || is_path(word)) {
        return None;
    }
    let end = after.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))?;
    (end > 0).then_some(&after[..end])
}

/// Files with `unsafe` that `contributing` does not list, and what it lists that has none.
///
/// The list is the words in backquotes of its item that begins "- `unsafe`": files, folders, or
/// files of one folder as `folder/{a,b}.rs`.
pub(super) fn unsafe_places(contributing: &str, sources: &[Source]) -> Vec<String> {
    let item = contributing
        .split("\n- ")
        .find(|item| item.starts_with("`unsafe`"));
    let words = item.unwrap_or_default().split('`').skip(1).step_by(2);
    let listed: Vec<String> = words
        .filter(|word| word.contains('/'))
        .flat_map(expand)
        .collect();
    let is_below = |path: &str, place: &String| {
        path == place
            || path
                .strip_prefix(place.as_str())
                .is_some_and(|rest| rest.starts_with('/'))
    };
    let has_unsafe: Vec<_> = sources.iter().filter(|source| is_unsafe(source)).collect();
    let mut violations = Vec::new();
    for source in &has_unsafe {
        if !listed.iter().any(|place| is_below(&source.path, place)) {
            let path = &source.path;
            violations.push(format!(
                "{path}: `unsafe`, and CONTRIBUTING.md does not list it"
            ));
        }
    }
    for place in &listed {
        if !has_unsafe
            .iter()
            .any(|source| is_below(&source.path, place))
        {
            violations.push(format!(
                "{place}: listed in CONTRIBUTING.md, and has no `unsafe`"
            ));
        }
    }
    violations
}

fn is_unsafe(source: &Source) -> bool {
    let words = |line: &str| {
        let words: Vec<_> = line
            .split_whitespace()
            .map(|word| word.trim_start_matches('('))
            .collect();
        let is_mark =
            |pair: &[&str]| pair[0] == "unsafe" && ["{", "fn", "impl", "extern"].contains(&pair[1]);
        words.windows(2).any(is_mark)
    };
    let mut lines = source.text.lines().map(str::trim_start);
    lines.any(|line| !line.starts_with("//") && words(line))
}

/// `a/{b,c}.rs` as `a/b.rs` and `a/c.rs`, and a folder without the slash at its end.
fn expand(word: &str) -> Vec<String> {
    let Some((before, rest)) = word.split_once('{') else {
        return vec![word.trim_end_matches('/').to_owned()];
    };
    let (names, after) = rest.split_once('}').unwrap_or((rest, ""));
    names
        .split(',')
        .map(|name| format!("{before}{name}{after}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_is_named() {
        let wide = format!("// {}", "x".repeat(98));
        let body = "    work();\n".repeat(69);
        let text = format!("{wide}\npub(in crate::a) fn long(\n    x: u8,\n) {{\n{body}}}\n");
        let violations = too_long(&[
            Source::new("src/a.rs", text),
            Source::new("src/b.rs", "\n".repeat(501)),
            Source::new("src/b/tests.rs", "\n".repeat(501)),
        ]);
        let expected = [
            "src/a.rs:1: 101 columns, and 100 are the limit",
            "src/a.rs:2: `long` has 73 lines, and 70 are the limit",
            "src/b.rs: 501 lines, and 500 are the limit",
        ];
        assert_eq!(violations, expected);
    }

    #[test]
    fn a_function_ends_at_its_own_brace() {
        let text = "trait T {\n    fn one(&self);\n\n    fn two(&self) {\n        if x {\n\
                    \u{20}       }\n    }\n}\nlet f = fn_of();\n";
        assert_eq!(functions(text), [(2, "one", 1), (4, "two", 4)]);
    }

    #[test]
    fn unsafe_out_of_place_is_named() {
        let block = format!("{} {{ f() }}", "unsafe");
        let contributing = "# x\n\n- `unsafe` is denied outside `src/a` and `src/util/{b,c}.rs`, \
                            `word`.\n- `src/d`\n";
        let violations = unsafe_places(
            contributing,
            &[
                Source::new("src/a/x.rs", block.clone()),
                Source::new("src/util/b.rs", block.clone()),
                Source::new("src/util/c.rs", format!("// {block}")),
                Source::new("src/ab.rs", block),
            ],
        );
        let expected = [
            "src/ab.rs: `unsafe`, and CONTRIBUTING.md does not list it",
            "src/util/c.rs: listed in CONTRIBUTING.md, and has no `unsafe`",
        ];
        assert_eq!(violations, expected);
    }
}
