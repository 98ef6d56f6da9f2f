//! Where rvmm's boot spends its time: the `--stats` of one boot, multiplied by the cost of each
//! exit.

use std::fs;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::contestants::Contestant;
use crate::figures::Figures;
use crate::measure::Lab;

/// A part of the boot: its name, its count, and its milliseconds.
pub(crate) type Part = (String, u64, f64);

/// The parts of one boot of rvmm. KVM counts the exits. The guests of the groups "exits" and
/// "pages" measure what one exit costs; parts that need a missing figure are left out.
pub(crate) fn boot(lab: &Lab, rvmm: &Contestant, figures: &Figures) -> Result<Vec<Part>> {
    let path = lab.dir().join("stats.json");
    lab.boot_with_stats(rvmm, &path)?;
    let stats: Value = serde_json::from_slice(&fs::read(&path)?)?;
    let millis = |key: &str| {
        stats[key]
            .as_u64()
            .map(|ns| ns as f64 / 1e6)
            .context("a time")
    };
    let vcpu = &stats["vcpus"][0];
    let count = |key: &str| vcpu["kvm"][key].as_u64().unwrap_or(0);
    let calls = sbi_calls(vcpu);
    let to_rvmm = count("mmio_exit_user") + count("csr_exit_user") + calls;
    let in_kvm = count("mmio_exit_kernel")
        + count("ecall_exit_stat").saturating_sub(calls)
        + count("wfi_exit_stat")
        + count("wrs_exit_stat")
        + count("csr_exit_kernel");
    let rest = count("exits").saturating_sub(to_rvmm + in_kvm + count("signal_exits"));
    let each = |name: &str| {
        let row = figures.rows.iter().find(|row| row.name == name)?;
        Some(row.summary(&rvmm.name)?.median)
    };
    let mut parts: Vec<Part> = vec![(
        "from rvmm's main to the guest".into(),
        1,
        millis("start_ns")?,
    )];
    let mut own = millis("run_ns")?;
    for (what, count, cost) in [
        (
            "G-stage faults and host interrupts",
            rest,
            each("first touch of 4K"),
        ),
        ("exits to rvmm", to_rvmm, each("MMIO read")),
        ("exits that KVM serves", in_kvm, each("SBI BASE call")),
    ] {
        if let Some(micros) = cost {
            let total = count as f64 * micros / 1e3;
            own -= total;
            parts.push((format!("{what}, {micros:.2} us each"), count, total));
        }
    }
    parts.push(("the rest of its run: the guest itself".into(), 1, own));
    parts.push((
        "from the guest's end to rvmm's".into(),
        1,
        millis("end_ns")?,
    ));
    Ok(parts)
}

/// SBI calls that came to rvmm. KVM's counter includes the calls that it served itself.
fn sbi_calls(vcpu: &Value) -> u64 {
    let exits = vcpu["exits"].as_array().into_iter().flatten();
    let calls = exits.filter(|exit| {
        exit["kind"]
            .as_str()
            .is_some_and(|kind| kind.starts_with("SBI"))
    });
    calls.filter_map(|exit| exit["count"].as_u64()).sum()
}
