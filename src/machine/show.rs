//! `rvmm snapshot show` and `verify`: what is in a snapshot, for people and for scripts.

pub(super) mod check;

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};

use super::restore::SavedMachine;
use crate::config::VmConfig;
use crate::hypervisor::regs;
use crate::memory::{PAGE_SIZE, image, pages_of};
use crate::snapshot::directory::MEMORY;
use crate::util::{ByteSize, in_json, on_one_line};

pub use check::verify;

/// What a snapshot has in it.
#[derive(Debug, Serialize)]
pub struct Shown {
    /// The version of rvmm that wrote it.
    rvmm: String,
    /// The kernel release of the host.
    host_kernel: String,
    /// The random number of the snapshot, in hexadecimal.
    id: String,
    /// Nanoseconds since 1970 by the host's clock.
    taken_ns: u64,
    /// The id of the snapshot that it has the changes since. None if it is whole.
    parent: Option<String>,
    config: VmConfig,
    /// Bytes of RAM, and those of them that are in the file `memory`.
    ram: u64,
    memory: u64,
    /// Whether each hart is started, and its registers by name, in hexadecimal.
    vcpus: Vec<Value>,
    /// The state of each device, by name and kind.
    devices: BTreeMap<String, BTreeMap<String, Value>>,
}

impl Shown {
    /// Reads what is in `saved`.
    ///
    /// # Errors
    /// Fails if the file `memory` is missing, or if a device's state is not JSON.
    pub fn of(saved: &SavedMachine) -> Result<Self> {
        let memory = saved.snapshot().file(MEMORY)?;
        let data = image::data_bytes(&memory).context("Failed to read the snapshot's memory")?;
        let header = saved.header().clone();
        // Pages that have become zeros are changes, too.
        let changes = saved.ram().changes().filter(|_| header.parent.is_some());
        let changes = changes.map(|pages| pages_of(&pages).count() as u64 * PAGE_SIZE);
        let vcpus = saved.vcpus().iter().map(|vcpu| {
            let registers = vcpu.registers().map(|(id, bytes)| {
                let digits = bytes.iter().rev().map(|byte| format!("{byte:02x}"));
                (id.to_string(), digits.collect::<String>())
            });
            json!({
                "started": vcpu.is_started(),
                "registers": registers.collect::<BTreeMap<_, _>>(),
            })
        });
        let mut devices = BTreeMap::<_, BTreeMap<_, _>>::new();
        for (id, kinds) in saved.parts() {
            let device = devices.entry(id.to_owned()).or_default();
            for kind in kinds {
                let state = serde_json::from_slice(&kind.json);
                let state = state.with_context(|| format!("Failed to read the state of {id}"))?;
                device.insert(kind.kind.clone(), state);
            }
        }
        Ok(Self {
            rvmm: header.rvmm,
            host_kernel: header.host_kernel,
            id: header.id.into(),
            taken_ns: header.taken_ns,
            parent: header.parent.map(String::from),
            config: header.config,
            ram: saved.ram().size,
            memory: changes.unwrap_or(data),
            vcpus: vcpus.collect(),
            devices,
        })
    }

    /// The same as JSON, with a newline at the end.
    ///
    /// # Errors
    /// Fails if something is no JSON, which is a bug.
    pub fn json(&self) -> Result<String> {
        Ok(in_json(&serde_json::to_string_pretty(self)?) + "\n")
    }

    fn pc(vcpu: &Value) -> &str {
        let pc = &vcpu["registers"][regs::PC.to_string()];
        pc.as_str().unwrap_or("?")
    }
}

/// Text for people: lines, each with a newline.
impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let taken = std::time::Duration::from_nanos(self.taken_ns);
        let taken = humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + taken);
        writeln!(f, "snapshot {}, taken {taken}", self.id)?;
        let (rvmm, kernel) = (on_one_line(&self.rvmm), on_one_line(&self.host_kernel));
        writeln!(f, "by rvmm {rvmm} on Linux {kernel}")?;
        let (ram, memory) = (ByteSize(self.ram), ByteSize(self.memory));
        match &self.parent {
            None => writeln!(f, "RAM: {ram}, of which {memory} are not zero")?,
            Some(parent) => {
                writeln!(f, "changes since {parent}")?;
                writeln!(f, "RAM: {ram}, of which {memory} have changed since then")?;
            }
        }
        for (hart, vcpu) in self.vcpus.iter().enumerate() {
            let state = match vcpu["started"].as_bool() {
                Some(true) => format!("started, pc {}", Self::pc(vcpu)),
                _ => "stopped".into(),
            };
            writeln!(f, "hart {hart}: {state}")?;
        }
        for (id, kinds) in &self.devices {
            let kinds: Vec<&str> = kinds.keys().map(String::as_str).collect();
            let kinds = match kinds[..] {
                [] => "no state".into(),
                _ => on_one_line(&kinds.join(", ")),
            };
            writeln!(f, "{}: {kinds}", on_one_line(id))?;
        }
        let config = serde_json::to_string_pretty(&self.config).map_err(|_| fmt::Error)?;
        writeln!(f, "configuration: {}", in_json(&config))
    }
}
