//! The rules of the house that a compiler does not check: the order of modules, the size of what
//! is written, where `unsafe` may be, and that the format of snapshots is described.
//! CONTRIBUTING.md lists them.
//!
//! Each rule is a function from sources to violations, one line each that begins with the place.
//! Tests of their own show what they say of a source that breaks them.

mod format;
mod order;
mod shape;
mod source;

use std::fs;
use std::path::Path;

use source::Source;

/// The file at `path` in the repository.
fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files below `folders`, in the order of their paths.
fn sources(folders: &[&str]) -> Vec<Source> {
    let mut found = Vec::new();
    for folder in folders {
        collect(&root().join(folder), &mut found);
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn collect(folder: &Path, found: &mut Vec<Source>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && path.file_name() != Some("target".as_ref()) {
            collect(&path, found);
        } else if path.extension() == Some("rs".as_ref()) {
            let name = path.strip_prefix(root()).unwrap().to_str().unwrap();
            found.push(Source::new(name, fs::read_to_string(&path).unwrap()));
        }
    }
}

/// Everything that is written in Rust.
const ALL: &[&str] = &["src", "tests", "benches", "fuzz", "resources", "scripts"];

#[track_caller]
fn assert_none(violations: &[String]) {
    assert!(violations.is_empty(), "\n{}", violations.join("\n"));
}

#[test]
fn modules_use_only_those_before_them() {
    let order = order::of(&read("src/lib.rs"));
    assert!(order.len() > 10, "lib.rs lists {order:?}");
    assert_none(&order::upward(&order, &sources(&["src"])));
}

#[test]
fn no_folder_has_a_circle() {
    assert_none(&order::circles(&sources(&["src"])));
}

#[test]
fn files_functions_and_lines_have_their_limits() {
    let all = sources(ALL);
    assert!(all.len() > 200, "{} files", all.len());
    assert_none(&shape::too_long(&all));
}

#[test]
fn unsafe_is_where_contributing_says() {
    assert_none(&shape::unsafe_places(
        &read("CONTRIBUTING.md"),
        &sources(ALL),
    ));
}

#[test]
fn the_format_of_snapshots_is_described() {
    assert_none(&format::undescribed(
        &read("docs/snapshot-format.md"),
        &sources(&["src"]),
    ));
}
