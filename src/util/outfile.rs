//! Files that rvmm writes for its user, so that none empties what was there.
//!
//! A log or a console's output goes to the end of its file ([`append`]). What is written as a whole
//! ([`Whole`]) takes the place of an empty file or of an earlier one of its kind, and of no other.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::filelock::is_locked;
use super::output::write_whole;

/// A file of more bytes is none that rvmm wrote as a whole.
const LARGEST: u64 = 64 << 20;

/// Opens the file at `path` to write at its end, and creates it if it is missing. Pipes and terminals
/// are opened too.
///
/// # Errors
/// It is a block device, or a disk that a virtual machine uses; or the host's.
pub fn append(path: &Path) -> io::Result<File> {
    if let Ok(there) = fs::metadata(path) {
        check_kind(&there)?;
    }
    let mut options = OpenOptions::new();
    let file = open(path, options.append(true).create(true))?;
    check_unused(&file)?;
    Ok(file)
}

/// A file that is to be written whole or not at all.
pub struct Whole {
    path: PathBuf,
    way: Way,
}

/// How a file gets its bytes.
enum Way {
    /// Under another name first, with this mode.
    Replace(Option<Permissions>),
    /// As they come: a pipe, a terminal.
    InPlace(File),
    /// A stream of rvmm's, by whatever name it goes.
    Stream(i32),
}

impl Whole {
    /// Finds out how `path` is to be written, and that it can be; nothing changes yet. `is_replaceable`
    /// gets what is in a file that is there and not empty.
    ///
    /// # Errors
    /// A file of another kind is there, a block device, a disk that a virtual machine uses; or the host's.
    pub fn prepare(path: &Path, is_replaceable: fn(&[u8]) -> bool) -> io::Result<Self> {
        if path.as_os_str().as_bytes().ends_with(b"/") {
            return Err(io::Error::from_raw_os_error(libc::EISDIR));
        }
        let there = match fs::metadata(path) {
            Ok(there) => there,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Self::replace(path, None);
            }
            Err(error) => return Err(error),
        };
        if let Some(stream) = stream(&there) {
            let (path, way) = (path.to_owned(), Way::Stream(stream));
            return Ok(Self { path, way });
        }
        check_kind(&there)?;
        if !there.is_file() {
            let way = Way::InPlace(open(path, OpenOptions::new().write(true))?);
            let path = path.to_owned();
            return Ok(Self { path, way });
        }
        let mut content = Vec::new();
        let file = File::open(path)?;
        (&file).take(LARGEST).read_to_end(&mut content)?;
        let is_whole = content.len() as u64 == there.len();
        let is_ours = content.is_empty() || (is_whole && is_replaceable(&content));
        if !is_ours {
            return Err(io::Error::other(
                "something else is in this file: remove it, or choose another name",
            ));
        }
        check_unused(&file)?;
        // What a link leads to is replaced, not the link.
        Self::replace(&fs::canonicalize(path)?, Some(there.permissions()))
    }

    fn replace(path: &Path, mode: Option<Permissions>) -> io::Result<Self> {
        if fs::symlink_metadata(path).is_ok_and(|there| there.is_symlink()) {
            return Err(io::Error::other("it is a link to what is not there"));
        }
        let temporary = temporary_name(path);
        File::create_new(&temporary)?;
        fs::remove_file(&temporary)?;
        let (path, way) = (path.to_owned(), Way::Replace(mode));
        Ok(Self { path, way })
    }

    /// Writes `bytes`.
    ///
    /// # Errors
    /// The host's; a regular file is then as it was.
    pub fn write(self, bytes: &[u8]) -> io::Result<()> {
        match self.way {
            Way::InPlace(file) => write_whole(file, bytes),
            Way::Stream(1) => write_whole(io::stdout(), bytes),
            Way::Stream(_) => write_whole(io::stderr(), bytes),
            Way::Replace(mode) => {
                let temporary = temporary_name(&self.path);
                let written = fs::write(&temporary, bytes)
                    .and_then(|()| {
                        mode.map_or(Ok(()), |mode| fs::set_permissions(&temporary, mode))
                    })
                    .and_then(|()| fs::rename(&temporary, &self.path));
                if written.is_err() {
                    let _ = fs::remove_file(&temporary);
                }
                written
            }
        }
    }
}

/// Opens a file, or something that is none, without waiting for who reads it.
fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let opened = options
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ENXIO) => {
            io::Error::other("a pipe that nobody reads, or a socket: start its reader first")
        }
        _ => error,
    })
}

/// Which of rvmm's output streams `there` is: a shell's `>` names a file that must not be replaced.
fn stream(there: &Metadata) -> Option<i32> {
    let is = |stream: io::Result<Metadata>| {
        stream.is_ok_and(|stream| (stream.dev(), stream.ino()) == (there.dev(), there.ino()))
    };
    if is(metadata_of(io::stdout())) {
        Some(1)
    } else {
        is(metadata_of(io::stderr())).then_some(2)
    }
}

fn metadata_of(stream: impl AsFd) -> io::Result<Metadata> {
    File::from(stream.as_fd().try_clone_to_owned()?).metadata()
}

fn check_kind(there: &Metadata) -> io::Result<()> {
    if there.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    if there.file_type().is_block_device() {
        return Err(io::Error::other(
            "it is a block device, and rvmm writes a file",
        ));
    }
    Ok(())
}

/// A virtual machine locks its disks' bytes, whether it writes them or not.
fn check_unused(file: &File) -> io::Result<()> {
    // A file system without such locks has no such disks either.
    if is_locked(file.as_fd()).unwrap_or(false) {
        return Err(io::Error::other("a virtual machine uses it as a disk"));
    }
    Ok(())
}

fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::util::filelock::share_byte;
    use std::io::Write;
    use std::os::unix::fs::symlink;

    /// A directory of one test.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("rvmm-outfile-{name}-{}", std::process::id());
            let path = std::env::temp_dir().join(name);
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn file(&self, content: &str) -> PathBuf {
            let path = self.0.join("x");
            fs::write(&path, content).unwrap();
            path
        }

        /// No other file than this one is left.
        fn has_only(&self, names: &[&str]) {
            let entries = fs::read_dir(&self.0).unwrap();
            let mut found: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            found.sort();
            assert_eq!(found, names);
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn is_ours(head: &[u8]) -> bool {
        head.starts_with(b"ours")
    }

    #[test]
    fn a_log_goes_behind_what_is_there() {
        let scratch = Scratch::new("append");
        let path = scratch.file("before\n");
        append(&path).unwrap().write_all(b"after\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "before\nafter\n");
    }

    #[test]
    fn only_its_own_kind_is_replaced() {
        let scratch = Scratch::new("kind");
        for (before, is_written) in [("", true), ("ours, old", true), ("a kernel", false)] {
            let path = scratch.file(before);
            let whole = Whole::prepare(&path, is_ours);
            assert_eq!(fs::read_to_string(&path).unwrap(), before, "nothing yet");
            assert_eq!(whole.is_ok(), is_written, "{before:?}");
            if let Ok(whole) = whole {
                whole.write(b"ours, new").unwrap();
                assert_eq!(fs::read_to_string(&path).unwrap(), "ours, new");
            }
            scratch.has_only(&["x"]);
        }
    }

    #[test]
    fn what_a_link_leads_to_is_written() {
        let scratch = Scratch::new("link");
        let (path, link) = (scratch.file(""), scratch.0.join("link"));
        symlink("x", &link).unwrap();
        let whole = Whole::prepare(&link, is_ours).unwrap();
        whole.write(b"ours").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "ours");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        fs::remove_file(&path).unwrap();
        assert!(Whole::prepare(&link, is_ours).is_err());
        scratch.has_only(&["link"]);
    }

    #[test]
    fn devices_are_written_in_place() {
        let null = Path::new("/dev/null");
        Whole::prepare(null, is_ours).unwrap().write(b"x").unwrap();
        let full = Whole::prepare(Path::new("/dev/full"), is_ours).unwrap();
        assert!(full.write(b"x").is_err());
        assert!(!fs::metadata(null).unwrap().is_file());
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_not_waited_for() {
        let scratch = Scratch::new("pipe");
        let path = scratch.0.join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        let told = append(&path).unwrap_err().to_string();
        assert!(told.contains("reader first"), "{told}");
        assert!(Whole::prepare(&path, is_ours).is_err());
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let mut reader = options.open(&path).unwrap();
        let whole = Whole::prepare(&path, is_ours).unwrap();
        whole.write(b"x").unwrap();
        let mut byte = [0];
        assert_eq!(reader.read(&mut byte).unwrap(), 1);
    }

    #[test]
    fn a_disk_in_use_is_left_alone() {
        let scratch = Scratch::new("disk");
        let path = scratch.file("");
        let disk = File::open(&path).unwrap();
        share_byte(disk.as_fd(), 100).unwrap();
        assert!(append(&path).is_err());
        assert!(Whole::prepare(&path, is_ours).is_err());
        drop(disk);
        assert!(append(&path).is_ok());
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let scratch = Scratch::new("directory");
        let slash = PathBuf::from(format!("{}/new/", scratch.0.display()));
        for path in [&scratch.0, &scratch.0.join("missing/x"), &slash] {
            assert!(append(path).is_err());
            assert!(Whole::prepare(path, is_ours).is_err());
        }
        scratch.has_only(&[]);
    }
}
