//! The directory of a snapshot: it is there as a whole, or not at all.
//!
//! [`NewSnapshot`] collects the files in a hidden directory beside the final one, and gives it its
//! name when all bytes are on stable storage. A process that is killed before leaves the hidden
//! directory behind; the next snapshot with that name removes it.
//!
//! [`Snapshot`] reads the files of one directory, also if another one gets its name meanwhile.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{
    AtFlags, CWD, Dir, DirEntry, FileType, FlockOperation, Mode, OFlags, RenameFlags,
    StatxAttributes, StatxFlags, flock, open, openat, renameat_with, statx,
};
use rustix::io::Errno;

use super::file::{self, FileError, MAGIC, Section};

/// The name of the file with the state of all parts but RAM.
pub const STATE: &str = "state";
/// The name of the file with guest RAM.
pub const MEMORY: &str = "memory";

/// The largest `state` that rvmm reads, in bytes. That of a machine with 512 harts is smaller.
const STATE_MAX: u64 = 64 << 20;

/// A snapshot that is being written.
pub struct NewSnapshot {
    /// The final name.
    path: PathBuf,
    /// Where the files are meanwhile.
    hidden: PathBuf,
    /// The hidden directory. Its lock shows others that this process uses it.
    directory: File,
    /// The directory with both names.
    parent: File,
    /// Whether what has the hidden name is not needed.
    is_to_remove: bool,
}

impl NewSnapshot {
    /// Begins a snapshot that will be at `path`. There may be an earlier snapshot, which stays
    /// until the new one is complete, or an empty directory.
    ///
    /// # Errors
    /// Fails if `path` is something else, if another process writes a snapshot there, or if the
    /// host cannot give the new snapshot this name or refuses to create the directory.
    pub fn begin(path: &Path) -> Result<Self> {
        let failed = || format!("Failed to write snapshot {path:?}");
        let earlier = check_replaceable(path).with_context(failed)?;
        let hidden = hidden_beside(path)?;
        let parent = path.parent().unwrap_or(Path::new("/"));
        let parent = File::open(parent)
            .with_context(|| format!("{}: cannot open {parent:?} to sync it", failed()))?;
        let new = Self {
            directory: own_directory(&hidden).with_context(failed)?,
            path: path.to_owned(),
            hidden,
            parent,
            is_to_remove: true,
        };
        if earlier.is_some_and(|earlier| !earlier.is_empty) {
            new.check_exchange().with_context(failed)?;
        }
        Ok(new)
    }

    /// Creates the file `name` in the snapshot.
    ///
    /// # Errors
    /// Fails if the host refuses.
    pub fn create(&self, name: &str) -> Result<File> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(self.hidden.join(name));
        file.with_context(|| format!("Failed to create {:?}", self.path.join(name)))
    }

    /// Writes the file `state`, makes all files durable, and gives the snapshot its name. `files`
    /// are those that [`NewSnapshot::create`] has returned.
    ///
    /// # Errors
    /// Fails if the host refuses, such as without room. Then there is no new snapshot, and an
    /// earlier one is unchanged.
    pub fn finish(mut self, sections: &[Section], files: &[File]) -> Result<()> {
        let path = self.path.clone();
        let failed = || format!("Failed to write snapshot {path:?}");
        let mut state = self.create(STATE)?;
        let bytes = file::write(sections).with_context(failed)?;
        state.write_all(&bytes).with_context(failed)?;
        for file in files.iter().chain([&state, &self.directory]) {
            file.sync_all().with_context(failed)?;
        }
        self.publish().with_context(failed)
    }

    /// Gives the hidden directory its final name. An earlier snapshot is removed after that.
    fn publish(&mut self) -> Result<()> {
        match self.rename(RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {}
            // Some file systems cannot rename with flags. To replace an empty directory needs none.
            Err(Errno::INVAL) => return self.replace_empty(),
            renamed => {
                renamed?;
                return self.make_durable(RenameFlags::NOREPLACE);
            }
        }
        // From the exchange on, the earlier snapshot has the hidden name. Its lock shows others
        // that this process removes it.
        let earlier = check_replaceable(&self.path)?;
        let earlier = earlier.context("its name was taken away: try again")?;
        lock(&earlier.directory)?;
        match self.rename(RenameFlags::EXCHANGE) {
            Err(Errno::INVAL) => return self.replace_empty(),
            renamed => renamed?,
        }
        self.make_durable(RenameFlags::EXCHANGE)?;
        // If it cannot be removed, the next snapshot does it.
        let _ = fs::remove_dir_all(&self.hidden);
        Ok(())
    }

    fn replace_empty(&mut self) -> Result<()> {
        self.rename(RenameFlags::empty())?;
        self.make_durable(RenameFlags::empty())
    }

    fn rename(&self, flags: RenameFlags) -> Result<(), Errno> {
        renameat_with(CWD, &self.hidden, CWD, &self.path, flags)
    }

    /// Syncs the new names, which came about with `flags`. If that fails, they are as before.
    fn make_durable(&mut self, flags: RenameFlags) -> Result<()> {
        self.is_to_remove = false;
        let Err(error) = self.parent.sync_all() else {
            return Ok(());
        };
        let undone = renameat_with(CWD, &self.path, CWD, &self.hidden, flags);
        undone.with_context(|| {
            let (path, hidden) = (&self.path, &self.hidden);
            format!("{error}: the new snapshot is at {path:?}, an earlier one at {hidden:?}")
        })?;
        self.is_to_remove = true;
        Err(error.into())
    }

    /// Checks that the file system can exchange two names, with files in the hidden directory.
    fn check_exchange(&self) -> Result<()> {
        let [one, other] = ["one", "other"].map(|name| self.hidden.join(name));
        for path in [&one, &other] {
            File::create(path)?;
        }
        renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE).context(
            "the file system cannot exchange two names: remove the earlier snapshot, or choose \
             another name",
        )?;
        for path in [&one, &other] {
            fs::remove_file(path)?;
        }
        Ok(())
    }
}

/// A snapshot that was not finished leaves nothing behind.
impl Drop for NewSnapshot {
    fn drop(&mut self) {
        if self.is_to_remove {
            let _ = fs::remove_dir_all(&self.hidden);
        }
    }
}

/// A directory that a new snapshot can replace.
struct Earlier {
    directory: File,
    is_empty: bool,
}

/// Checks that `path` is free, an empty directory, or an earlier snapshot.
fn check_replaceable(path: &Path) -> Result<Option<Earlier>> {
    let there = match statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE) {
        Err(Errno::NOENT) => return Ok(None),
        there => there?,
    };
    if FileType::from_raw_mode(there.stx_mode.into()) != FileType::Directory {
        bail!("it is not a directory: choose another name");
    }
    if there.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        bail!("it is a mount point, which cannot be replaced: give a directory in it");
    }
    let directory = open_to_lock(path)?;
    let is_entry = |entry: &DirEntry| ![c".", c".."].contains(&entry.file_name());
    let mut entries = Dir::read_from(&directory)?;
    let is_empty = !entries.any(|entry| entry.is_ok_and(|entry| is_entry(&entry)));
    let mut magic = [0; MAGIC.len()];
    let state = open_regular(&directory, STATE);
    let read = state.and_then(|mut file| file.read_exact(&mut magic));
    if !is_empty && (read.is_err() || magic != MAGIC) {
        bail!("the directory has other content: remove it, or choose another name");
    }
    Ok(Some(Earlier {
        directory,
        is_empty,
    }))
}

/// The hidden name beside `path`.
fn hidden_beside(path: &Path) -> Result<PathBuf> {
    let name = path.file_name();
    let Some(name) = name.filter(|_| path.is_absolute()) else {
        bail!("Failed to write snapshot {path:?}: give the name of a directory");
    };
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(".unfinished");
    Ok(path.with_file_name(hidden))
}

/// Creates the hidden directory, or empties the one that a killed process has left. Nobody else
/// uses it until the result is closed.
fn own_directory(hidden: &Path) -> Result<File> {
    let failed = || format!("Failed to create directory {hidden:?}");
    match DirBuilder::new().mode(0o700).create(hidden) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        created => created.with_context(failed)?,
    }
    let directory = open_to_lock(hidden).with_context(failed)?;
    lock(&directory)?;
    let (locked, there) = (directory.metadata(), fs::symlink_metadata(hidden));
    let (locked, there) = (locked?, there.with_context(failed)?);
    if (locked.dev(), locked.ino()) != (there.dev(), there.ino()) {
        // It got its final name before it was locked here.
        bail!(IN_USE);
    }
    for entry in fs::read_dir(hidden).with_context(failed)? {
        let entry = entry.with_context(failed)?;
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let removed = match is_directory {
            true => fs::remove_dir_all(entry.path()),
            false => fs::remove_file(entry.path()),
        };
        removed.with_context(|| format!("Failed to remove {:?}", entry.path()))?;
    }
    Ok(directory)
}

const IN_USE: &str = "another process writes to it now: wait for it, or choose another name";

/// Locks a directory, until it is closed.
fn lock(directory: &File) -> Result<()> {
    match flock(directory, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => bail!(IN_USE),
        locked => Ok(locked?),
    }
}

fn open_to_lock(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(open(path, flags, Mode::empty())?.into())
}

/// A snapshot that is there.
pub struct Snapshot {
    path: PathBuf,
    /// The directory, which stays the same one if another snapshot takes its name. None if there is
    /// no directory, and so no file.
    directory: Option<OwnedFd>,
    /// The sections of `state`.
    pub sections: Vec<Section>,
}

impl Snapshot {
    /// Reads the state of the snapshot at `path`.
    ///
    /// # Errors
    /// Fails if there is no snapshot, or if its state is not whole.
    pub fn open(path: &Path) -> Result<Self> {
        let directory = match open_directory(path) {
            Err(error) if is_missing(&error) => return Err(no_snapshot(path)),
            opened => opened.with_context(|| format!("Failed to read snapshot {path:?}"))?,
        };
        let mut snapshot = Self {
            path: path.to_owned(),
            directory: Some(directory),
            sections: Vec::new(),
        };
        snapshot.sections = snapshot.read()?;
        Ok(snapshot)
    }

    /// The snapshot at `path` whose file `state` has these bytes.
    ///
    /// # Errors
    /// Fails if the state is not whole.
    pub fn of(path: &Path, state: &[u8]) -> Result<Self, FileError> {
        Ok(Self {
            path: path.to_owned(),
            directory: open_directory(path).ok(),
            sections: file::read(state)?,
        })
    }

    /// Where the snapshot is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the sections of the file `state`.
    ///
    /// # Errors
    /// Fails if it is missing, or not whole.
    pub fn read(&self) -> Result<Vec<Section>> {
        let failed = || format!("Failed to read snapshot {:?}", self.path.join(STATE));
        let file = match self.open_file(STATE) {
            Err(error) if is_missing(&error) => return Err(no_snapshot(&self.path)),
            opened => opened.with_context(failed)?,
        };
        let mut bytes = Vec::new();
        let read = file.take(STATE_MAX).read_to_end(&mut bytes);
        read.with_context(failed)?;
        file::read(&bytes).with_context(failed)
    }

    /// Opens the file `name` of the snapshot for reading.
    ///
    /// # Errors
    /// Fails if it is missing, or not a regular file.
    pub fn file(&self, name: &str) -> Result<File> {
        let opened = self.open_file(name);
        opened.with_context(|| format!("Failed to open {:?} of the snapshot", self.path.join(name)))
    }

    /// As [`Snapshot::file`]. None if there is no such file.
    ///
    /// # Errors
    /// Fails if it cannot be opened, or is not a regular file.
    pub fn file_if_there(&self, name: &str) -> Result<Option<File>> {
        match self.open_file(name) {
            Err(error) if is_missing(&error) => Ok(None),
            _ => self.file(name).map(Some),
        }
    }

    fn open_file(&self, name: &str) -> io::Result<File> {
        let directory = self.directory.as_ref();
        open_regular(directory.ok_or(io::ErrorKind::NotFound)?, name)
    }
}

fn no_snapshot(path: &Path) -> anyhow::Error {
    anyhow!(
        "Failed to read snapshot {path:?}: there is no file {STATE:?}: give a directory that rvmm \
         ctl snapshot has written"
    )
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(open(path, flags, Mode::empty())?)
}

/// Opens a regular file of the directory for reading. A pipe in its place does not block.
fn open_regular(directory: impl AsFd, name: &str) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(openat(directory, name, flags, Mode::empty())?);
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is not a regular file")),
    }
}

/// Whether there is nothing at the path whose opening failed.
fn is_missing(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory)
}

#[cfg(test)]
mod tests;
