//! Whether the files of a snapshot are those that its state is of.

use std::fmt::Write;
use std::fs::File;
use std::path::absolute;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::config::DiskConfig;
use crate::machine::restore::{SavedMachine, overlay_file};
use crate::machine::virtio::{disk_copy, disk_name};
use crate::memory::image;
use crate::snapshot::directory::MEMORY;
use crate::snapshot::{Parts, State};
use crate::util::ByteSize;
use crate::virtio::blk::SavedOverlay;

/// Reads all of the snapshot's memory, and compares it with its checksums. Returns the file.
///
/// # Errors
/// Fails if the memory cannot be read, or is not what was saved.
pub(in crate::machine) fn memory(saved: &SavedMachine) -> Result<File> {
    let memory = saved.snapshot().file(MEMORY)?;
    let sums = image::sums(&memory, saved.ram().size)?;
    let bad = saved.ram().differing(&sums);
    if let Some(first) = bad.first() {
        bail!(
            "its memory is damaged: the checksum is wrong for the {} at {first:#x}{}",
            ByteSize(saved.ram().chunk),
            match bad.len() {
                1 => String::new(),
                more => format!(", and for {} other places", more - 1),
            }
        );
    }
    Ok(memory)
}

/// The files beside `state` and `memory` that the snapshot has: overlays, and copies of disks.
/// Their sizes, and the clusters of overlays, are right. Their data has no checksum.
///
/// # Errors
/// Fails if a file is missing, or is not what the state says.
pub(in crate::machine) fn disks(saved: &SavedMachine) -> Result<Vec<(String, File)>> {
    let mut files = Vec::new();
    for (index, disk) in saved.config().disk.iter().enumerate() {
        let name = disk_name(index, disk);
        if disk.snapshot {
            let id = overlay_file(&name);
            let state: SavedOverlay = state(saved, &id).with_context(|| id.clone())?;
            let file = saved.snapshot().file(&id)?;
            let checked = state.check(&file);
            checked.with_context(|| format!("{id:?} is damaged"))?;
            files.push((id, file));
        }
        files.extend(copy(saved, &name, disk)?);
    }
    Ok(files)
}

/// The copy of a disk, if there is one.
fn copy(saved: &SavedMachine, name: &str, disk: &DiskConfig) -> Result<Option<(String, File)>> {
    let snapshot = saved.snapshot();
    let directory = absolute(snapshot.path()).context("Failed to find the working directory")?;
    // A guest that was restored with the copy of its disk, and saved to the same place.
    let needed = disk.path.strip_prefix(&directory);
    if let Some(file) = needed.ok().and_then(|path| path.to_str()) {
        snapshot.file(file)?;
    }
    let id = disk_copy(name);
    let Some(file) = snapshot.file_if_there(&id)? else {
        return Ok(None);
    };
    let (found, size) = (file.metadata()?.len(), disk_size(saved, name)?);
    if found < size {
        bail!("{id:?} is cut short: it has {found} of {size} bytes");
    }
    Ok(Some((id, file)))
}

/// The size that the guest was told of a disk.
fn disk_size(saved: &SavedMachine, name: &str) -> Result<u64> {
    let states = saved.parts().filter(|(id, _)| *id == name);
    let mut kinds = states.flat_map(|(_, kinds)| kinds);
    let state = kinds.find(|state| state.kind == "virtio-blk");
    let json = state.map(|state| serde_json::from_slice::<Value>(&state.json));
    let size = json.transpose()?.and_then(|state| state["size"].as_u64());
    Ok(size.unwrap_or(0))
}

fn state<S: State>(saved: &SavedMachine, id: &str) -> Result<S> {
    let mut found = saved.parts().filter(|(name, _)| *name == id);
    let kinds = found.next().map(|(_, kinds)| kinds.cloned().collect());
    Ok(Parts::new(kinds.unwrap_or_default()).take()?)
}

/// Checks all files of the snapshot. The state was checked when it was read. Returns the text to
/// print: what was checked and what not.
///
/// # Errors
/// Fails if a file cannot be read, or is not what was saved.
pub fn verify(saved: &SavedMachine) -> Result<String> {
    let path = saved.snapshot().path();
    let failed = || format!("Failed to verify snapshot {path:?}");
    let memory = memory(saved).with_context(failed)?;
    let disks = disks(saved).with_context(failed)?;
    let bytes = ByteSize(image::data_bytes(&memory).with_context(failed)?);
    let mut text = String::new();
    match &saved.header().parent {
        None => writeln!(text, "the snapshot is whole: {bytes} of memory read")?,
        Some(parent) => writeln!(
            text,
            "the changes are whole: {bytes} of memory read; not checked: snapshot {}, which they \
             are since",
            String::from(parent.clone())
        )?,
    }
    for (name, file) in &disks {
        let size = ByteSize(file.metadata().with_context(failed)?.len());
        let name = crate::util::on_one_line(name);
        writeln!(
            text,
            "{name}: it has its size, {size}; its data has no checksum"
        )?;
    }
    Ok(text)
}
