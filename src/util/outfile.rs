//! Output files that the user names. rvmm does not destroy other data in them.
//!
//! The log and a console's output are appended to their file ([`append`]). A file that is written
//! as a whole ([`Whole`]) replaces only an empty file, or an earlier file of the same kind.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::filelock::is_locked;
use super::output::write_whole;

/// The largest file in bytes that [`Whole`] replaces. rvmm writes no larger file as a whole.
const LARGEST: u64 = 64 << 20;

/// Opens the file at `path` for appending, and creates it if it is missing. Also opens pipes and
/// terminals.
///
/// # Errors
/// Fails for a directory, a block device, a disk image that a virtual machine uses, and a pipe
/// without a reader, and if the file cannot be opened or created.
pub fn append(path: &Path) -> io::Result<File> {
    if let Ok(there) = fs::metadata(path) {
        check_kind(&there)?;
    }
    let mut options = OpenOptions::new();
    let file = open(path, options.append(true).create(true))?;
    check_unused(&file)?;
    Ok(file)
}

/// Opens the file at `path` for a long content that is written piece by piece, and creates it if it
/// is missing. Empties it, if `is_replaceable` is true for its first bytes; a file that is empty
/// already is always taken. Also opens pipes and terminals.
///
/// # Errors
/// As [`append`]. Also fails if the file has other content.
pub fn stream_to(path: &Path, is_replaceable: fn(&[u8]) -> bool) -> io::Result<File> {
    const HEAD: u64 = 4096;
    if let Ok(there) = fs::metadata(path) {
        check_kind(&there)?;
        if !there.is_file() {
            return open(path, OpenOptions::new().write(true));
        }
    }
    let mut options = OpenOptions::new();
    let file = open(path, options.read(true).write(true).create(true))?;
    let mut head = Vec::new();
    (&file).take(HEAD).read_to_end(&mut head)?;
    if !head.is_empty() && !is_replaceable(&head) {
        return Err(other_content());
    }
    check_unused(&file)?;
    file.set_len(0)?;
    (&file).rewind()?;
    Ok(file)
}

fn other_content() -> io::Error {
    io::Error::other("the file has other content: remove it, or choose another name")
}

/// An output file that gets its content in one piece. A regular file is replaced as a whole, or not
/// changed at all.
pub struct Whole {
    path: PathBuf,
    way: Way,
}

/// How the bytes get into the file.
enum Way {
    /// Write a temporary file, give it these permissions, and rename it to the file's name.
    Replace(Option<Permissions>),
    /// Write to what is there: a pipe, a terminal or another character device.
    InPlace(File),
    /// The file is rvmm's own standard output (1) or standard error (2). Write to that descriptor.
    Stream(i32),
}

impl Whole {
    /// Checks that `path` can be written, and how. Changes no existing file. If there is a file
    /// that is not empty, `is_replaceable` gets its content and returns whether it may be replaced.
    ///
    /// # Errors
    /// Fails if the file may not be replaced, if it is a directory, a block device, a disk image
    /// that a virtual machine uses, or a pipe without a reader, and if it cannot be opened or
    /// created.
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
            return Err(other_content());
        }
        check_unused(&file)?;
        // Replace the target of a symbolic link, not the link.
        Self::replace(&fs::canonicalize(path)?, Some(there.permissions()))
    }

    fn replace(path: &Path, mode: Option<Permissions>) -> io::Result<Self> {
        if fs::symlink_metadata(path).is_ok_and(|there| there.is_symlink()) {
            return Err(io::Error::other("it is a symbolic link to a missing file"));
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
    /// Fails if the bytes cannot be written. A regular file keeps its old content then.
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

/// Opens a file, a pipe or a device. Does not wait for a pipe's reader.
fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let opened = options
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ENXIO) => {
            io::Error::other("it is a socket, or a pipe without a reader: start the reader first")
        }
        _ => error,
    })
}

/// The descriptor, 1 or 2, of rvmm's output stream that is the same file as `there`. A shell opened
/// that file for rvmm (`>`), so it must not be replaced.
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
            "it is a block device: give the name of a file",
        ));
    }
    Ok(())
}

/// Refuses a disk image that a virtual machine uses. Such an image has locked bytes, also if it is
/// read-only.
fn check_unused(file: &File) -> io::Result<()> {
    // On a file system without locks, no disk image can be locked.
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

    /// A directory for one test.
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

        /// Checks that the directory has these files and no others.
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
            assert_eq!(
                fs::read_to_string(&path).unwrap(),
                before,
                "prepare changes nothing"
            );
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
        let error = append(&path).unwrap_err().to_string();
        assert!(error.contains("reader first"), "{error}");
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
