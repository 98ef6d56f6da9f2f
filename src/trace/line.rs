//! One line of a trace: an event in the trace event format.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::What;
use crate::hypervisor::{SbiName, VmEntry, VmExit};

/// An event. The names of the fields are the format's.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Line {
    /// What happened, such as `MMIO read UART`.
    pub(super) name: String,
    /// `exit` or `request`.
    #[serde(default)]
    pub(super) cat: String,
    /// `X` for an event with a duration, `M` for a name.
    pub(super) ph: String,
    pub(super) pid: u32,
    /// The row.
    #[serde(default)]
    pub(super) tid: u32,
    /// Microseconds since the start of the trace.
    #[serde(default)]
    pub(super) ts: f64,
    /// Microseconds.
    #[serde(default)]
    pub(super) dur: f64,
    #[serde(default)]
    pub(super) args: Map<String, Value>,
}

/// The name of an event. Events of one kind have one name.
pub(super) fn name(what: &What, place: fn(u64) -> Option<&'static str>) -> String {
    let at = |gpa| place(gpa).unwrap_or("nothing");
    match what {
        What::Exit(exit, _) => match exit {
            VmExit::MmioRead { gpa, .. } => format!("MMIO read {}", at(*gpa)),
            VmExit::MmioWrite { gpa, .. } => format!("MMIO write {}", at(*gpa)),
            VmExit::Sbi(call) => format!("SBI {} {}", SbiName(call.extension), call.function),
            VmExit::Csr { number } => format!("CSR {number:#x}"),
            VmExit::Interrupted => "interrupted".into(),
            VmExit::System(_) => "system event".into(),
            VmExit::Breakpoint => "breakpoint".into(),
            VmExit::Unrunnable { .. } => "KVM cannot run it".into(),
            VmExit::FailEntry { .. } => "KVM cannot enter it".into(),
            VmExit::Unknown { .. } => "unknown exit".into(),
        },
        What::Request { act, .. } => format!("request {act}"),
    }
}

/// The arguments and the result of an event, by name.
pub(super) fn args(what: &What) -> Map<String, Value> {
    let hex = |value: u64| Value::from(format!("{value:#x}"));
    let mut args = Map::new();
    let mut put = |name: &str, value: Value| drop(args.insert(name.into(), value));
    match what {
        What::Exit(exit, entry) => {
            match exit {
                VmExit::MmioRead { gpa, len } => {
                    put("address", hex(*gpa));
                    put("bytes", json!(len));
                }
                VmExit::MmioWrite { gpa, len, data } => {
                    put("address", hex(*gpa));
                    put("bytes", json!(len));
                    let mut value = [0; 8];
                    let len = (*len).min(value.len());
                    value[..len].copy_from_slice(&data[..len]);
                    put("value", hex(u64::from_le_bytes(value)));
                }
                VmExit::Sbi(call) => put("args", call.args.map(hex).to_vec().into()),
                VmExit::Unrunnable { errno, pc } => {
                    put("errno", json!(errno));
                    put("pc", hex(*pc));
                }
                VmExit::FailEntry { reason, .. } => put("reason", hex(*reason)),
                VmExit::Unknown { reason } => put("reason", json!(reason)),
                VmExit::System(event) => put("event", format!("{event:?}").into()),
                VmExit::Csr { .. } | VmExit::Breakpoint | VmExit::Interrupted => {}
            }
            match entry {
                Some(VmEntry::MmioRead(value) | VmEntry::Csr(value)) => put("value", hex(*value)),
                Some(VmEntry::Sbi(ret)) => {
                    put("error", json!(ret.error));
                    put("result", hex(ret.value));
                }
                Some(VmEntry::Run) | None => {}
            }
        }
        What::Request {
            offset,
            bytes,
            status,
            ..
        } => {
            put("offset", json!(offset));
            put("bytes", json!(bytes));
            put("status", json!(status));
        }
    }
    args
}
