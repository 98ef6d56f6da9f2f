//! `rvmm snapshot merge`: makes a whole snapshot of one and the changes after it.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::restore::SavedMachine;
use super::show::check;
use crate::memory::image;
use crate::snapshot::directory::{MEMORY, NewSnapshot};
use crate::snapshot::file::Section;
use crate::snapshot::{Header, MACHINE, RamState, Saved, State};
use crate::util::{Hex, random};

/// Writes a new snapshot to `into`. The first of `paths` is a whole snapshot, and each of the
/// others has the changes since the one before it.
///
/// # Errors
/// Fails if a snapshot is damaged or missing, if they do not follow each other, or if the host
/// refuses. There is no new snapshot then.
pub fn merge(paths: &[PathBuf], into: &Path) -> Result<()> {
    let all: Vec<SavedMachine> = paths
        .iter()
        .map(|path| SavedMachine::open(path))
        .collect::<Result<_>>()?;
    let (Some(base), Some(last)) = (all.first(), all.last()) else {
        bail!("Failed to merge snapshots: there are none");
    };
    check_order(&all)?;
    let failed = || format!("Failed to merge snapshots into {into:?}");
    let new = NewSnapshot::begin(into)?;
    let memory = new.create(MEMORY)?;
    let size = base.ram().size;
    for saved in &all {
        // The checksums of the result are new, so they would not show the damage.
        let path = saved.snapshot().path();
        let from = check::memory(saved).with_context(|| format!("{}: {path:?}", failed()))?;
        let changes = saved.ram().changes();
        match changes.filter(|_| saved.header().parent.is_some()) {
            None => image::copy_all(&from, &memory, size),
            Some(changes) => image::copy_marked(&from, &memory, &changes, size),
        }
        .with_context(failed)?;
    }
    let mut files = copy_disks(last, &new).with_context(failed)?;
    let sums = image::sums(&memory, size).with_context(failed)?;
    let ram = RamState::new(base.ram().base, size, &sums);
    let header = Header {
        id: Hex(random::bytes::<16>()?.into()),
        parent: None,
        ..last.header().clone()
    };
    let mut sections = last.snapshot().read()?;
    replace(&mut sections, &header)?;
    replace(&mut sections, &ram)?;
    files.push(memory);
    new.finish(&sections, &files)
}

/// Copies the overlays and the images of disks, which each snapshot has as a whole.
fn copy_disks(last: &SavedMachine, new: &NewSnapshot) -> Result<Vec<File>> {
    let path = last.snapshot().path();
    let disks = check::disks(last).with_context(|| format!("{path:?}"))?;
    let copy = |(name, from): (String, File)| {
        let to = new.create(&name)?;
        let failed = || format!("Failed to copy {:?}", path.join(&name));
        let size = from.metadata().with_context(failed)?.len();
        image::share_or_copy(&from, &to, size).with_context(failed)?;
        Ok(to)
    };
    disks.into_iter().map(copy).collect()
}

/// Checks that the first snapshot is whole, and that each other one has the changes since the one
/// before it.
fn check_order(all: &[SavedMachine]) -> Result<()> {
    let path = |saved: &SavedMachine| saved.snapshot().path().to_owned();
    let first = all.first().filter(|saved| saved.header().parent.is_some());
    if let Some(path) = first.map(path) {
        bail!("{path:?} has only changes: the first snapshot to merge has to be a whole one");
    }
    for pair in all.windows(2) {
        let [before, after] = pair else { continue };
        if after.header().parent.as_ref() != Some(&before.header().id) {
            let (before, after) = (path(before), path(after));
            bail!("{after:?} does not have the changes since {before:?}: give them in their order");
        }
        if after.ram().size != before.ram().size || after.ram().changes().is_none() {
            bail!("{:?} is not of the same machine", path(after));
        }
    }
    Ok(())
}

/// Replaces the machine's section with a state of this type.
fn replace<S: State>(sections: &mut [Section], state: &S) -> Result<()> {
    let saved = Saved::of(state)?;
    let is_it = |section: &&mut Section| section.id == MACHINE && section.saved.kind == saved.kind;
    let section = sections.iter_mut().find(is_it);
    section.context("the snapshot has no such section")?.saved = saved;
    Ok(())
}
