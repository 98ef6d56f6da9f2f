//! The memory of a process, all or beside guest RAM, and of the host.

use std::fs;

use anyhow::{Context, Result};

use crate::contestants::MEM_MIB;

/// A mapping of /proc/PID/smaps with its Pss, in KiB.
#[derive(Clone, Debug)]
struct Mapping {
    start: u64,
    end: u64,
    writable: bool,
    pss: u64,
}

/// KiB of all mappings except guest RAM. Guest RAM is the end of the first run of adjacent writable
/// mappings that is at least as long as guest RAM. (A kernel that is mapped into RAM belongs to it
/// and counts as RAM. A thread's stack right below does not.)
pub(crate) fn beside_ram(pid: u32) -> Result<u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mappings = parse(&smaps);
    let ram = find_ram(&mappings).context("no mapping is as large as guest RAM")?;
    let beside = mappings.iter().filter(|m| !ram.contains(&m.start));
    Ok(beside.map(|m| m.pss).sum())
}

/// KiB of all mappings.
pub(crate) fn all(pid: u32) -> Result<u64> {
    kib(&format!("/proc/{pid}/smaps_rollup"), "Pss:")
}

/// KiB of this host's memory that are free, or can be freed at once.
pub(crate) fn available() -> Result<u64> {
    kib("/proc/meminfo", "MemAvailable:")
}

/// The number in the line of `path` that starts with `name`.
fn kib(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path)?;
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    let value = value.and_then(|value| value.trim().strip_suffix(" kB"));
    Ok(value.with_context(|| format!("{path}: {name}"))?.parse()?)
}

fn find_ram(mappings: &[Mapping]) -> Option<std::ops::Range<u64>> {
    let want = MEM_MIB << 20;
    let mut run = 0..0;
    for mapping in mappings.iter().filter(|m| m.writable) {
        run = if mapping.start == run.end {
            run.start
        } else {
            mapping.start
        }..mapping.end;
        if run.end - run.start >= want {
            return Some(run.end - want..run.end);
        }
    }
    None
}

fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        if let Some(mapping) = parse_head(line) {
            mappings.push(mapping);
        } else if let (Some(pss), Some(mapping)) = (line.strip_prefix("Pss:"), mappings.last_mut())
        {
            let kib = pss.trim().trim_end_matches(" kB");
            mapping.pss = kib.parse().unwrap_or(0);
        }
    }
    mappings
}

/// "start-end rw-p offset dev inode path"
fn parse_head(line: &str) -> Option<Mapping> {
    let mut words = line.split(' ');
    let (start, end) = words.next()?.split_once('-')?;
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        writable: words.next()?.starts_with("rw"),
        pss: 0,
    })
}
