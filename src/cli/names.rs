//! Checks the files that a command line names: two flags may name the same file only if rvmm just
//! reads it.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::Cli;
use crate::config::{ConsoleConfig, GdbAddress};

/// A path, and the flag that names it.
struct Named<'a> {
    flag: &'static str,
    path: &'a Path,
    is_written: bool,
}

/// Identifies a file: two paths name the same file if these are equal.
#[derive(PartialEq, Eq)]
enum Identity {
    /// Device and inode of a file or socket.
    File(u64, u64),
    /// The device number of a block device.
    Device(u64),
    /// The path of a file that does not exist yet.
    Missing(PathBuf),
}

/// Checks the files that `cli` names.
///
/// # Errors
/// Returns a message of one line that names the flags and the file.
pub(super) fn check(cli: &Cli) -> Result<(), String> {
    let named = names(cli);
    let identities: Vec<_> = named.iter().map(|named| identity(named.path)).collect();
    for (index, this) in named.iter().enumerate() {
        for (other, before) in named[..index].iter().enumerate() {
            let is_written = this.is_written || before.is_written;
            if is_written && identities[index].is_some() && identities[index] == identities[other] {
                return Err(one_file(before, this));
            }
        }
    }
    Ok(())
}

fn one_file(a: &Named, b: &Named) -> String {
    let (first, second, path) = (a.flag, b.flag, b.path);
    let way_out = match (first, second) {
        ("--disk", "--disk") => "use readonly or snapshot=on for both to share it",
        _ => "use a different file for each",
    };
    format!("{first} and {second} name the same file, {path:?}: {way_out}")
}

fn names(cli: &Cli) -> Vec<Named<'_>> {
    let vm = &cli.vm;
    let mut named = Vec::new();
    for (flag, path, is_written) in [
        ("--config", cli.config.as_deref(), false),
        ("--kernel", vm.kernel.as_deref(), false),
        ("--initrd", vm.initrd.as_deref(), false),
        ("--symbols", vm.symbols.as_deref(), false),
        ("--console", file(Some(&vm.console)), true),
        ("--virtio-console", file(vm.virtio_console.as_ref()), true),
        ("--log-file", cli.run.log_file.as_deref(), true),
        ("--ctl", cli.run.ctl.as_deref(), true),
        (
            "--stats",
            cli.run.stats.as_ref().and_then(|path| path.as_deref()),
            true,
        ),
        (
            "--trace",
            cli.run.trace.as_ref().map(|trace| trace.path.as_path()),
            true,
        ),
        (
            "--gdb",
            cli.run.gdb.as_ref().and_then(|gdb| match &gdb.at {
                GdbAddress::Unix(path) => Some(path.as_path()),
                GdbAddress::Port(_) => None,
            }),
            true,
        ),
        ("--dump-dtb", cli.dump_dtb.as_deref(), true),
    ] {
        named.extend(path.map(|path| Named {
            flag,
            path,
            is_written,
        }));
    }
    named.extend(vm.disk.iter().map(|disk| Named {
        flag: "--disk",
        path: &disk.path,
        is_written: disk.is_written(),
    }));
    named
}

/// The path of a console that is a file or socket.
fn file(console: Option<&ConsoleConfig>) -> Option<&Path> {
    match console {
        Some(ConsoleConfig::File(path) | ConsoleConfig::Socket(path)) => Some(path),
        _ => None,
    }
}

/// The identity of the file at `path`. None for a device that several may use at once, such as a
/// terminal. Also none if the path cannot be checked: opening it fails later, with the reason.
fn identity(path: &Path) -> Option<Identity> {
    match fs::metadata(path) {
        Ok(there) if there.is_file() => Some(Identity::File(there.dev(), there.ino())),
        Ok(there) if there.file_type().is_socket() => {
            Some(Identity::File(there.dev(), there.ino()))
        }
        Ok(there) if there.file_type().is_block_device() => Some(Identity::Device(there.rdev())),
        Ok(_) => None,
        Err(_) => {
            let name = path.file_name()?;
            let parent = path
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            let parent = fs::canonicalize(parent.unwrap_or(Path::new("."))).ok()?;
            Some(Identity::Missing(parent.join(name)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Request, parse};
    use std::ffi::OsString;

    fn refusal(line: &str) -> Option<String> {
        match parse(line.split(' ').map(OsString::from)) {
            Request::Run(_) => None,
            Request::Refuse(message, _) => Some(message),
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn one_file_has_one_name() {
        let directory = std::env::temp_dir().join(format!("rvmm-names-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("a"), "a").unwrap();
        fs::hard_link(directory.join("a"), directory.join("b")).unwrap();
        std::os::unix::fs::symlink("a", directory.join("c")).unwrap();
        let at = directory.display();
        for (line, flags) in [
            (
                format!("--disk {at}/a --console file={at}/b"),
                Some(("--console", "--disk")),
            ),
            (
                format!("--disk {at}/a --log-file {at}/c"),
                Some(("--log-file", "--disk")),
            ),
            (
                format!("--console socket={at}/s --virtio-console socket={at}/./s"),
                Some(("--console", "--virtio-console")),
            ),
            (format!("--stats={at}/k"), Some(("--kernel", "--stats"))),
            (
                format!("--dump-dtb {at}/./k"),
                Some(("--kernel", "--dump-dtb")),
            ),
            (
                format!("--disk {at}/a --disk {at}/c"),
                Some(("--disk", "--disk")),
            ),
            (
                format!("--disk {at}/a,readonly --disk {at}/c,snapshot"),
                None,
            ),
            (
                format!("--disk {at}/a --console file={at}/new --log-file {at}/new2"),
                None,
            ),
            ("--console file=/dev/null --log-file /dev/null".into(), None),
        ] {
            let refusal = refusal(&format!("rvmm --kernel {at}/k {line}"));
            match flags {
                None => assert_eq!(refusal, None, "{line}"),
                Some((first, second)) => {
                    let refusal = refusal.unwrap_or_else(|| panic!("{line} is accepted"));
                    assert!(
                        refusal.starts_with(&format!("{first} and {second} name")),
                        "{refusal}"
                    );
                }
            }
        }
        fs::remove_dir_all(&directory).unwrap();
    }
}
