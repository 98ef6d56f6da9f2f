//! Why a machine cannot be restored on this host: all reasons at once.
//!
//! A restore ends at the first thing that is missing. What else is missing is looked for only then.

use std::fs;
use std::sync::Arc;

use anyhow::{Error, Result};

use super::restore::{SavedMachine, Unfit};
use super::{harts, irqchip};
use crate::config::{DiskConfig, VmConfig};
use crate::hypervisor::Hypervisor;
use crate::virtio::blk::image::OpenError;

/// Adds to `error`, with which the restore of `saved` has ended, what else the guest needs and this
/// host does not have. Nothing of the failed restore may be left, because a host may have guest
/// interrupt files for one VM only.
pub(super) fn complete(
    error: Error,
    config: &VmConfig,
    saved: &SavedMachine,
    hypervisor: &Arc<dyn Hypervisor>,
) -> Error {
    let mut lines = match error.downcast_ref() {
        Some(Unfit(lines)) => lines.clone(),
        None => vec![format!("{error:#}")],
    };
    // If the host refuses a VM, there is no more to know.
    let hardware = hardware(config, saved, hypervisor.as_ref()).unwrap_or_default();
    for line in disks(config).into_iter().chain(hardware) {
        if !lines.iter().any(|known| known.ends_with(&line)) {
            lines.push(line);
        }
    }
    match lines.len() {
        1 => error,
        _ => Unfit(lines).into(),
    }
}

/// The disks that are missing.
fn disks(config: &VmConfig) -> Vec<String> {
    let missing = |disk: &DiskConfig| {
        let error = fs::metadata(&disk.path).err()?;
        let (path, writes) = (disk.path.clone(), disk.is_written());
        let open = OpenError::Open {
            path,
            writes,
            error,
        };
        Some(open.to_string())
    };
    config.disk.iter().filter_map(missing).collect()
}

/// What KVM does not have.
fn hardware(
    config: &VmConfig,
    saved: &SavedMachine,
    hypervisor: &dyn Hypervisor,
) -> Result<Vec<String>> {
    let vm = hypervisor.create_vm()?;
    // KVM wants the interrupt controller before the vCPUs.
    let choice = irqchip::choose(config.irqchip, vm.as_ref(), true);
    let vcpus = harts::create(config, vm.as_ref())?;
    let mut lines = saved.lacks(&vcpus)?;
    lines.extend(choice.err().map(|error| format!("{error:#}")));
    Ok(lines)
}
