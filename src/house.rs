//! Checks the dependencies between modules: a module may use only those that stand before it in
//! [`LAYERS`].

use std::fs;
use std::path::Path;

/// All modules, from the lowest layer to the highest.
const LAYERS: &[&str] = &[
    "util",
    "config",
    "memory",
    "hypervisor",
    "bus",
    "irqchip",
    "devices",
    "pci",
    "virtio",
    "boot",
    "vcpu",
    "control",
    "machine",
    "info",
    "cli",
];

/// The modules that a source text uses by a path that begins with `crate::`.
fn named_modules(source: &str) -> impl Iterator<Item = &str> {
    source.split("crate::").skip(1).map(|rest| {
        let end = rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
            .unwrap_or(rest.len());
        &rest[..end]
    })
}

fn check(path: &Path, layer: usize, violations: &mut Vec<String>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            check(&entry.unwrap().path(), layer, violations);
        }
        return;
    }
    let source = fs::read_to_string(path).unwrap();
    for name in named_modules(&source) {
        match LAYERS.iter().position(|s| *s == name) {
            Some(used) if used <= layer => {}
            _ => violations.push(format!("{} uses crate::{name}", path.display())),
        }
    }
}

#[test]
fn dependencies_point_one_way() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut violations = Vec::new();
    for (layer, name) in LAYERS.iter().enumerate() {
        let (folder, file) = (src.join(name), src.join(format!("{name}.rs")));
        assert!(
            folder.is_dir() || file.is_file(),
            "there is no module {name}"
        );
        for path in [folder, file] {
            if path.exists() {
                check(&path, layer, &mut violations);
            }
        }
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn every_module_has_a_layer() {
    let lib = include_str!("lib.rs");
    for line in lib.lines() {
        if let Some(name) = line.strip_prefix("pub mod ") {
            let name = name.trim_end_matches(';');
            assert!(LAYERS.contains(&name), "module {name} is missing in LAYERS");
        }
    }
}
