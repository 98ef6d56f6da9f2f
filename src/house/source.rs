//! A Rust file, as the rules see it.

use std::collections::BTreeSet;

/// A file: its path in the repository, and its text.
pub(super) struct Source {
    pub(super) path: String,
    pub(super) text: String,
}

impl Source {
    pub(super) fn new(path: &str, text: impl Into<String>) -> Self {
        let (path, text) = (path.to_owned(), text.into());
        Self { path, text }
    }

    /// Whether the file belongs to tests alone, by its name.
    pub(super) fn is_test(&self) -> bool {
        let mut names = self.path.split('/');
        names.any(|name| ["tests", "tests.rs", "testing.rs"].contains(&name))
    }

    /// The modules that lead to it below `src`, such as `virtio`, `net`, `tap`.
    pub(super) fn module(&self) -> Vec<&str> {
        let path = self.path.strip_prefix("src/").unwrap_or_default();
        let path = path.strip_suffix(".rs").unwrap_or(path);
        let mut names: Vec<_> = path.split('/').collect();
        if names.last() == Some(&"mod") {
            names.pop();
        }
        names
    }

    /// The lines before the file's unit tests, without comments.
    pub(super) fn code(&self) -> impl Iterator<Item = &str> {
        let lines = self.text.lines();
        let code = lines.take_while(|line| *line != "mod tests {");
        code.filter(|line| !line.trim_start().starts_with("//"))
    }

    /// The names that directly follow `prefix` in the code, also in a group: `a`, `b` and `c` of
    /// `prefix::{a::X, b}` and `prefix::c`.
    pub(super) fn named(&self, prefix: &str) -> BTreeSet<String> {
        let code: Vec<_> = self.code().collect();
        let code = code.join("\n");
        let mut names = BTreeSet::new();
        for (at, _) in code.match_indices(prefix) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| is_name(c) || c == ':') {
                continue;
            }
            let Some(rest) = code[at + prefix.len()..].strip_prefix("::") else {
                continue;
            };
            match rest.strip_prefix('{') {
                Some(group) => names.extend(first_of_each(group)),
                None => names.extend(first_name(rest)),
            }
        }
        names
    }
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

fn first_name(text: &str) -> Option<String> {
    let name: String = text
        .trim_start()
        .chars()
        .take_while(|c| is_name(*c))
        .collect();
    (!name.is_empty()).then_some(name)
}

/// The first name of each path in a group, whose opening brace is taken already.
fn first_of_each(group: &str) -> Vec<String> {
    let (mut names, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                names.extend(first_name(&group[start..at]));
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                names.extend(first_name(&group[start..at]));
                start = at + 1;
            }
            _ => {}
        }
    }
    names
}

#[test]
fn names_behind_a_prefix() {
    let text = "use crate::a::{x, y};\nuse crate::{b::Z,\n c, d::{e, f}};\n// crate::comment\n\
                let x = crate::g::new(); mycrate::h(); crate;\nmod tests {\n use crate::tested;\n}";
    let names = Source::new("src/x.rs", text).named("crate");
    assert_eq!(names.into_iter().collect::<String>(), "abcdg");
    let module = Source::new("src/a/b/mod.rs", "");
    assert_eq!(module.module(), ["a", "b"]);
    assert!(Source::new("src/a/tests/b.rs", "").is_test());
}
