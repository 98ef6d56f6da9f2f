//! Which module may use which.

use std::collections::{BTreeMap, BTreeSet};

use super::source::Source;

/// The modules that `lib.rs` lists, from the ground up.
pub(super) fn of(lib: &str) -> Vec<String> {
    let names = lib.lines().filter_map(|line| line.strip_prefix("pub mod "));
    names
        .map(|name| name.trim_end_matches(';').to_owned())
        .collect()
}

/// What uses a module that `order` does not list before its own.
pub(super) fn upward(order: &[String], sources: &[Source]) -> Vec<String> {
    let storey = |name: &str| order.iter().position(|listed| listed == name);
    let mut violations = Vec::new();
    for source in sources {
        let module = source.module();
        let own = match module[..] {
            ["lib" | "main" | "house", ..] => continue,
            [name, ..] => storey(name),
            [] => None,
        };
        let Some(own) = own else {
            violations.push(format!("{}: lib.rs does not list it", source.path));
            continue;
        };
        let used = source.named("crate").into_iter();
        for name in used.filter(|name| storey(name).is_none_or(|used| used > own)) {
            violations.push(format!("{}: uses crate::{name}", source.path));
        }
    }
    violations
}

/// Modules of one folder that use each other in a circle. What a folder's own file (`mod.rs`)
/// defines may be used by all of its modules.
pub(super) fn circles(sources: &[Source]) -> Vec<String> {
    let code: Vec<_> = sources.iter().filter(|source| !source.is_test()).collect();
    let modules: BTreeSet<Vec<&str>> = code.iter().map(|source| source.module()).collect();
    // Folder, then who in it uses whom.
    let mut uses: BTreeMap<Vec<&str>, Uses> = BTreeMap::new();
    for source in &code {
        let module = source.module();
        for depth in 0..module.len() {
            let (folder, own) = (&module[..depth], module[depth]);
            let up = vec!["super"; module.len() - depth].join("::");
            let down = [&["crate"], folder].concat().join("::");
            let named = source.named(&up).into_iter().chain(source.named(&down));
            let is_sibling = |name: &String| {
                let sibling = [folder, &[name.as_str()]].concat();
                name != own && modules.contains(&sibling)
            };
            let folder = uses.entry(folder.to_vec()).or_default();
            folder
                .entry(own.to_owned())
                .or_default()
                .extend(named.filter(is_sibling));
        }
    }
    let circle = |(folder, uses): (&Vec<&str>, &Uses)| {
        let circle = circle(uses)?.join(" -> ");
        Some(format!("src/{}: {circle}", folder.join("/")))
    };
    uses.iter().filter_map(circle).collect()
}

type Uses = BTreeMap<String, BTreeSet<String>>;

/// A circle of `uses`, if there is one; the first module stands at its end once more.
fn circle(uses: &Uses) -> Option<Vec<&str>> {
    let mut clean = BTreeSet::new();
    uses.keys()
        .find_map(|start| search(uses, start, &mut Vec::new(), &mut clean))
}

fn search<'a>(
    uses: &'a Uses,
    at: &'a str,
    path: &mut Vec<&'a str>,
    clean: &mut BTreeSet<&'a str>,
) -> Option<Vec<&'a str>> {
    if let Some(seen) = path.iter().position(|name| *name == at) {
        return Some([&path[seen..], &[at]].concat());
    }
    if clean.contains(at) {
        return None;
    }
    path.push(at);
    let mut used = uses.get(at).into_iter().flatten();
    let found = used.find_map(|name| search(uses, name, path, clean));
    path.pop();
    clean.insert(at);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_that_uses_one_above_it_is_named() {
        let order = of("pub mod util;\n\npub mod bus;\n\n#[cfg(test)]\nmod house;\n");
        let sources = [
            Source::new("src/util/a.rs", "use crate::bus::Bus;\n"),
            Source::new("src/bus.rs", "use crate::{util::a, bus::x};\n"),
            Source::new("src/new/mod.rs", ""),
        ];
        let expected = [
            "src/util/a.rs: uses crate::bus",
            "src/new/mod.rs: lib.rs does not list it",
        ];
        assert_eq!(upward(&order, &sources), expected);
    }

    #[test]
    fn a_circle_in_a_folder_is_named() {
        let sources = |last: &str| {
            [
                Source::new(
                    "src/m/mod.rs",
                    "mod a;\nmod b;\nmod c;\npub struct Shared;\n",
                ),
                Source::new("src/m/a.rs", "use super::{Shared, b::B};\n"),
                Source::new("src/m/b/deep.rs", "use super::super::c::C;\n"),
                Source::new("src/m/b.rs", "mod deep;\n"),
                Source::new("src/m/c.rs", last),
            ]
        };
        assert!(circles(&sources("use super::Shared;\n")).is_empty());
        let circle = circles(&sources("use crate::m::a::A;\n"));
        assert_eq!(circle, ["src/m: a -> b -> c -> a"]);
    }
}
