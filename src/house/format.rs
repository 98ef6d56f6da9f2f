//! Whether docs/snapshot-format.md describes all saved state.

use super::source::Source;

/// The kinds and fields of saved state in `sources` that `page` does not describe. A kind needs a
/// title, as in "### `uart16550`, version 1", and a field its name in backquotes.
pub(super) fn undescribed(page: &str, sources: &[Source]) -> Vec<String> {
    let mut violations = Vec::new();
    for source in sources.iter().filter(|source| !source.is_test()) {
        let path = &source.path;
        let kinds = kinds(source);
        for (kind, version) in &kinds {
            let title = format!("### `{kind}`, version {version}");
            if !page.lines().any(|line| line == title) {
                violations.push(format!("{path}: no title \"{title}\""));
            }
        }
        let fields = if kinds.is_empty() {
            Vec::new()
        } else {
            fields(source)
        };
        let is_there = |name: &str| {
            let as_it_is = page.contains(&format!("`{name}`"));
            as_it_is || page.contains(&format!(".{name}`"))
        };
        let missing = fields.into_iter().filter(|name| !is_there(name));
        violations.extend(missing.map(|name| format!("{path}: no field `{name}`")));
    }
    violations
}

/// The kinds of saved state that a source has types of, with their versions.
fn kinds(source: &Source) -> Vec<(&str, &str)> {
    let lines: Vec<_> = source.code().map(str::trim).collect();
    let mut found = Vec::new();
    for pair in lines.windows(2) {
        let [first, second] = pair else { continue };
        let kind = first.strip_prefix("const KIND: &'static str = \"");
        let version = second.strip_prefix("const VERSION: u32 = ");
        let kind = kind.and_then(|kind| kind.strip_suffix("\";"));
        let version = version.and_then(|version| version.strip_suffix(';'));
        found.extend(kind.zip(version));
    }
    found
}

/// The fields of the structs that are saved.
fn fields(source: &Source) -> Vec<&str> {
    let (mut found, mut is_saved, mut is_inside) = (Vec::new(), false, false);
    for line in source.code() {
        match line {
            "}" => (is_saved, is_inside) = (false, false),
            _ if line.starts_with("#[derive(") => is_saved = line.contains("Serialize"),
            // It is saved as another type.
            _ if line.starts_with("#[serde(try_from") => is_saved = false,
            _ if line.ends_with(" {") && !line.starts_with(' ') => {
                is_inside = is_saved && line.contains("struct ");
            }
            _ if is_inside && !line.trim_start().starts_with('#') => {
                let name = line.split(": ").next().unwrap_or_default();
                found.extend(name.split_whitespace().next_back());
            }
            _ => {}
        }
    }
    found
}

#[test]
fn what_is_saved_and_not_described() {
    let text = "#[derive(Serialize, Deserialize)]\n#[serde(deny_unknown_fields)]\n\
                pub(super) struct Lamp {\n    /// Text: a comment.\n    on: bool,\n    \
                #[serde(deserialize_with = \"x\")]\n    pub(super) color: [u8; 3],\n}\n\n\
                #[derive(Debug)]\nstruct Other {\n    third: u8,\n}\n\n\
                #[derive(Serialize, Deserialize)]\n#[serde(try_from = \"Hex\")]\n\
                struct Packed {\n    fourth: u8,\n}\n\n\
                impl State for Lamp {\n    const KIND: &'static str = \"lamp\";\n    \
                const VERSION: u32 = 2;\n}";
    let of = |page| undescribed(page, &[Source::new("src/lamp.rs", text)]);
    assert!(of("### `lamp`, version 2\n`on` and `bulb.color`").is_empty());
    let all = "src/lamp.rs: no title \"### `lamp`, version 2\"\n\
               src/lamp.rs: no field `on`\nsrc/lamp.rs: no field `color`";
    assert_eq!(of("### `lamp`, version 1\non, `colors`").join("\n"), all);
    let test = Source::new("src/lamp/tests.rs", text);
    assert!(undescribed("", &[test]).is_empty());
}
