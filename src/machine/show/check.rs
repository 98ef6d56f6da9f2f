//! Whether the files of a snapshot are those that its state is of.

use std::fmt::Write;
use std::fs::File;

use anyhow::{Context, Result, bail};

use crate::machine::names::{device_id, numbered, overlay_file};
use crate::machine::restore::SavedMachine;
use crate::machine::virtio::disk_copy;
use crate::memory::image;
use crate::snapshot::directory::MEMORY;
use crate::snapshot::{Parts, State};
use crate::util::ByteSize;
use crate::virtio::blk::{SavedDisk, SavedOverlay};

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
        let name = disk.name(index);
        if disk.snapshot {
            let id = overlay_file(&name);
            let state: SavedOverlay = state(saved, &id).with_context(|| id.clone())?;
            let file = saved.snapshot().file(&id)?;
            let checked = state.check(&file);
            checked.with_context(|| format!("{id:?} is damaged"))?;
            files.push((id, file));
        }
        files.extend(copy(saved, &name)?);
    }
    Ok(files)
}

/// The copy of a disk, if there is one.
fn copy(saved: &SavedMachine, name: &str) -> Result<Option<(String, File)>> {
    let id = disk_copy(name);
    let Some(file) = saved.snapshot().file_if_there(&id)? else {
        return Ok(None);
    };
    let SavedDisk { size, .. } = disk(saved, name).with_context(|| name.to_owned())?;
    let found = file.metadata()?.len();
    if found < size {
        bail!("{id:?} is cut short: it has {found} of {size} bytes");
    }
    Ok(Some((id, file)))
}

/// The state of the disk `name`. Its section has another name if another device has that one.
fn disk(saved: &SavedMachine, name: &str) -> Result<SavedDisk> {
    let id = device_id(name);
    let mut ids = (0..=saved.config().disk.len()).map(|before| numbered(&id, before));
    let has_disk = |id: &String| {
        let mut sections = saved.parts().filter(|(name, _)| name == id);
        sections.any(|(_, mut parts)| parts.any(|part| part.kind == SavedDisk::KIND))
    };
    state(saved, &ids.find(has_disk).unwrap_or(id))
}

/// The state of this type in the section `id`.
fn state<S: State>(saved: &SavedMachine, id: &str) -> Result<S> {
    let sections = saved.parts().filter(|(name, _)| *name == id);
    let parts = sections.flat_map(|(_, parts)| parts);
    let of_type = parts.filter(|part| part.kind == S::KIND);
    Ok(Parts::new(of_type.cloned().collect()).take()?)
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
