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
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use rustix::fs::{
    CWD, FlockOperation, Mode, OFlags, RenameFlags, flock, open, openat, renameat_with,
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
    is_done: bool,
}

impl NewSnapshot {
    /// Begins a snapshot that will be at `path`. There may be an earlier snapshot, which stays
    /// until the new one is complete, or an empty directory.
    ///
    /// # Errors
    /// Fails if `path` is something else, if another process writes a snapshot there, or if the
    /// host refuses to create the directory.
    pub fn begin(path: &Path) -> Result<Self> {
        check_replaceable(path)?;
        let hidden = hidden_beside(path)?;
        let failed = || format!("Failed to create directory {hidden:?}");
        match DirBuilder::new().mode(0o700).create(&hidden) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                clear_leftover(&hidden).with_context(failed)?;
            }
            created => created.with_context(failed)?,
        }
        let directory = File::open(&hidden).with_context(failed)?;
        lock(&directory, path)?;
        let path = path.to_owned();
        Ok(Self {
            path,
            hidden,
            directory,
            is_done: false,
        })
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
        let failed = || format!("Failed to write snapshot {:?}", self.path);
        let mut state = self.create(STATE)?;
        let bytes = file::write(sections).with_context(failed)?;
        state.write_all(&bytes).with_context(failed)?;
        for file in files.iter().chain([&state, &self.directory]) {
            file.sync_all().with_context(failed)?;
        }
        self.publish().with_context(failed)?;
        self.is_done = true;
        Ok(())
    }

    /// Gives the hidden directory its final name. An earlier snapshot is removed after that.
    fn publish(&self) -> io::Result<()> {
        let (from, to) = (&self.hidden, &self.path);
        let renamed = renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE);
        match renamed {
            Ok(()) => sync_parent(to),
            Err(Errno::EXIST) => {
                renameat_with(CWD, from, CWD, to, RenameFlags::EXCHANGE)?;
                sync_parent(to)?;
                // The earlier snapshot has the hidden name now. If it cannot be removed, the next
                // snapshot does it.
                let _ = fs::remove_dir_all(from);
                Ok(())
            }
            // Some file systems cannot rename with flags. To replace an empty directory needs none.
            Err(Errno::INVAL) => {
                fs::rename(from, to)?;
                sync_parent(to)
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// A snapshot that was not finished leaves nothing behind.
impl Drop for NewSnapshot {
    fn drop(&mut self) {
        if !self.is_done {
            let _ = fs::remove_dir_all(&self.hidden);
        }
    }
}

/// Checks that `path` is free, an empty directory, or an earlier snapshot.
fn check_replaceable(path: &Path) -> Result<()> {
    let failed = || format!("Failed to write snapshot {path:?}");
    let there = match fs::symlink_metadata(path) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(failed),
    };
    if !there.is_dir() {
        bail!("{}: it is not a directory: choose another name", failed());
    }
    let mut entries = fs::read_dir(path).with_context(failed)?;
    let is_empty = entries.next().is_none();
    let mut magic = [0; MAGIC.len()];
    let state = open_directory(path).and_then(|directory| open_regular(directory, STATE));
    let read = state.and_then(|mut file| file.read_exact(&mut magic));
    if !is_empty && (read.is_err() || magic != MAGIC) {
        bail!(
            "{}: the directory has other content: remove it, or choose another name",
            failed()
        );
    }
    Ok(())
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

/// Empties the hidden directory that a killed process has left.
fn clear_leftover(hidden: &Path) -> Result<()> {
    let directory = File::open(hidden)?;
    lock(&directory, hidden)?;
    for entry in fs::read_dir(hidden)? {
        fs::remove_file(entry?.path())?;
    }
    Ok(())
}

/// Locks the hidden directory, until `directory` is closed.
fn lock(directory: &File, path: &Path) -> Result<()> {
    match flock(directory, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => {
            bail!("Failed to write snapshot {path:?}: another process writes to it now")
        }
        locked => Ok(locked?),
    }
}

/// Makes the names in the directory of `path` durable.
fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    File::open(parent)?.sync_all()
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
