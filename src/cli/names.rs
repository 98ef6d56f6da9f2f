//! The files that a command line names: no two of them may be one, unless rvmm only reads it.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::Cli;
use crate::config::ConsoleConfig;

/// A name, and the flag that gives it.
struct Named<'a> {
    flag: &'static str,
    path: &'a Path,
    is_written: bool,
}

/// What tells a file from all others.
#[derive(PartialEq, Eq)]
enum Identity {
    /// Device and inode.
    File(u64, u64),
    /// A block device's number.
    Device(u64),
    /// Nothing is there yet.
    Missing(PathBuf),
}

/// Checks the names of `cli`.
///
/// # Errors
/// One line that names the flags and the file.
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
        ("--disk", "--disk") => "readonly or snapshot=on for both lets them share it",
        _ => "give each a file of its own",
    };
    format!("{first} and {second} name one file, {path:?}: {way_out}")
}

fn names(cli: &Cli) -> Vec<Named<'_>> {
    let vm = &cli.vm;
    let mut named = Vec::new();
    for (flag, path, is_written) in [
        ("--config", cli.config.as_deref(), false),
        ("--kernel", vm.kernel.as_deref(), false),
        ("--initrd", vm.initrd.as_deref(), false),
        ("--console", file(Some(&vm.console)), true),
        ("--virtio-console", file(vm.virtio_console.as_ref()), true),
        ("--log-file", cli.log_file.as_deref(), true),
        ("--ctl", cli.ctl.as_deref(), true),
        (
            "--stats",
            cli.stats.as_ref().and_then(|path| path.as_deref()),
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
        is_written: !disk.readonly && !disk.snapshot,
    }));
    named
}

/// The file or socket of a console that goes to one.
fn file(console: Option<&ConsoleConfig>) -> Option<&Path> {
    match console {
        Some(ConsoleConfig::File(path) | ConsoleConfig::Socket(path)) => Some(path),
        _ => None,
    }
}

/// None of what many may use at once, such as a terminal, and of what cannot be looked at: opening it
/// says why.
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
            let told = refusal(&format!("rvmm --kernel {at}/k {line}"));
            match flags {
                None => assert_eq!(told, None, "{line}"),
                Some((first, second)) => {
                    let told = told.unwrap_or_else(|| panic!("{line} is taken"));
                    assert!(
                        told.starts_with(&format!("{first} and {second} name")),
                        "{told}"
                    );
                }
            }
        }
        fs::remove_dir_all(&directory).unwrap();
    }
}
