//! The table and the JSON.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use crate::contestants::Contestant;
use crate::figures::{Figure, Figures};

/// The line between the table and the JSON.
const SEPARATOR: &str = "=== json";

/// The report: the table, the separator, the JSON.
pub(crate) fn write(
    host: &str,
    repetitions: usize,
    contestants: &[Contestant],
    figures: &Figures,
) -> String {
    let mut names: Vec<&str> = contestants.iter().map(|c| c.name.as_str()).collect();
    if !names.contains(&"before") {
        names.push("bare");
    }
    let others = if names.contains(&"before") {
        [("again", "again"), ("before", "before")]
    } else if names.contains(&"floor+aia") {
        [("qemu", "qemu"), ("floor", "floor+aia")]
    } else {
        [("qemu", "qemu"), ("floor", "floor")]
    };
    format!(
        "{}{SEPARATOR}\n{:#}\n",
        table(host, repetitions, &names, others, figures),
        json(host, repetitions, &names, others, figures)
    )
}

/// The contestants that rvmm is compared with: the column's name, and the contestant.
type Others = [(&'static str, &'static str); 2];

fn table(
    host: &str,
    repetitions: usize,
    names: &[&str],
    others: Others,
    figures: &Figures,
) -> String {
    let mut text = String::new();
    let mut line = |cells: String| {
        text.push_str(cells.trim_end());
        text.push('\n');
    };
    line(format!(
        "Host {host}; guest 1 vCPU, 256 MiB. Medians of {repetitions}, half the spread in percent."
    ));
    let mut head = format!("{:<30}{:>5}", "", "");
    for name in names {
        write!(head, "{name:>16}").expect("a String takes all");
    }
    for (column, _) in others {
        write!(head, "{:>13}", format!("rvmm/{column}")).expect("a String takes all");
    }
    line(head);
    for figure in &figures.rows {
        line(row(figure, names, others));
    }
    if !figures.boot_parts.is_empty() {
        line(String::new());
        line("Where one boot of rvmm goes (start to power-off, of its main):".into());
        for (what, count, millis) in &figures.boot_parts {
            line(format!("  {what:<44}{count:>8}{millis:>10.1} ms"));
        }
    }
    if !figures.sizes.is_empty() {
        line(String::new());
        let title = "rvmm's binary, stripped and static, bytes by crate (symbols; inlined code \
                     counts where it was inlined):";
        line(title.into());
        for (part, bytes) in &figures.sizes {
            line(format!("  {part:<28}{bytes:>10}"));
        }
    }
    for (group, who, why) in &figures.failures {
        line(format!("{group}, {who}: {why}"));
    }
    text
}

fn row(figure: &Figure, names: &[&str], others: Others) -> String {
    let mut row = format!("{:<30}{:>5}", figure.name, figure.unit);
    for name in names {
        let cell = match figure.summary(name) {
            Some(summary) => format!("{:.3} ±{:.1}", summary.median, summary.spread()),
            None => "-".into(),
        };
        write!(row, "{cell:>16}").expect("a String takes all");
    }
    for (_, other) in others {
        let ratio = figure.ratio("rvmm", other).map(|r| format!("{r:.3}"));
        write!(row, "{:>13}", ratio.unwrap_or_else(|| "-".into())).expect("a String takes all");
    }
    row
}

fn json(
    host: &str,
    repetitions: usize,
    names: &[&str],
    others: Others,
    figures: &Figures,
) -> Value {
    let rows: Vec<Value> = figures
        .rows
        .iter()
        .map(|row| figure_json(row, names, others))
        .collect();
    let sizes: Map<String, Value> = figures
        .sizes
        .iter()
        .map(|(part, bytes)| (part.clone(), (*bytes).into()))
        .collect();
    json!({
        "host": host,
        "repetitions": repetitions,
        "figures": rows,
        "boot": figures.boot_parts,
        "binary_bytes": sizes,
        "failures": figures.failures,
    })
}

fn figure_json(figure: &Figure, names: &[&str], others: Others) -> Value {
    let mut by_name = Map::new();
    for name in names {
        let samples = figure.samples.iter().find(|(who, _)| who == name);
        if let (Some(summary), Some((_, samples))) = (figure.summary(name), samples) {
            let value = json!({
                "median": summary.median,
                "min": summary.min,
                "max": summary.max,
                "samples": samples,
            });
            by_name.insert((*name).into(), value);
        }
    }
    let mut value = json!({
        "name": figure.name,
        "unit": figure.unit,
        "contestants": by_name,
    });
    for (column, other) in others {
        value[format!("rvmm_to_{column}")] = json!(figure.ratio("rvmm", other));
    }
    value
}
