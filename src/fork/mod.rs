//! `rvmm ctl PATH fork`: starts copies of a running machine.
//!
//! The machine takes one snapshot, with copies of its disks. Then each clone is a `rvmm restore` of
//! its own. All clones share the snapshot's memory and disks until they write.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf, absolute};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::config::{DiskConfig, DiskFormat, Mac, NetConfig, VmConfig};
use crate::control::{self, Reply, SnapshotOf, What, client};
use crate::machine::{SavedMachine, disk_copy};
use crate::util::random;

/// What to start. The doc comments are the text of `--help`.
#[derive(Args, Clone, Debug)]
pub struct Fork {
    /// The number of clones
    #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: u32,
    /// A new directory: clone 1 has its control socket, console and log in DIR/1, and so on
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// The tap of each clone's interface; {} stands for its number, as in tap=clone{}
    #[arg(long, value_name = "tap=NAME[,..]")]
    pub net: Vec<String>,
    /// Where the console of each clone goes; {} stands for its number (default: to a file)
    #[arg(long, value_name = "WHERE")]
    pub console: Option<String>,
    /// The clones start paused
    #[arg(long)]
    pub pause: bool,
}

/// How long a clone may take until it answers on its control socket.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time between two tries.
const POLL: Duration = Duration::from_millis(5);

/// Stands for the number of the clone.
const NUMBER: &str = "{}";

/// Starts clones of the machine whose control socket is at `socket`. Each is clone 1, 2 and so on:
/// it has a directory with that number, with its control socket `ctl` and its log. Returns the text
/// to print: a line for each clone.
///
/// # Errors
/// Fails if the directory is not new, if the machine refuses the snapshot, or if a clone does not
/// start. Then no clone runs, and the directory is removed.
pub fn fork(socket: &Path, fork: &Fork) -> Result<String> {
    let dir = absolute(&fork.dir).context("Failed to find the working directory")?;
    let failed = || format!("Failed to create directory {dir:?}");
    match fs::remove_dir(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // An empty directory is as good as none.
        removed => removed.with_context(failed)?,
    }
    DirBuilder::new()
        .mode(0o700)
        .create(&dir)
        .with_context(failed)?;
    let started = start(socket, fork, &dir);
    if started.is_err() {
        let _ = fs::remove_dir_all(&dir);
    }
    started
}

fn start(socket: &Path, fork: &Fork, dir: &Path) -> Result<String> {
    let snapshot = dir.join("snapshot");
    let of = SnapshotOf {
        dir: snapshot.clone(),
        what: What::All,
        live: true,
        disks: true,
    };
    let reply = client::ask(socket, control::Command::Snapshot(of))?;
    let Reply::Snapshot(taken) = reply else {
        bail!("the machine answered, but not about the snapshot");
    };
    let saved = SavedMachine::open(&snapshot)?;
    let mut clones = Vec::new();
    let mut lines = taken.to_string();
    for number in 1..=fork.count {
        let own = dir.join(number.to_string());
        let clone = Clone::start(fork, number, &own, &snapshot, saved.config())?;
        lines += &format!(
            "clone {number}: process {}, {:?}\n",
            clone.0.id(),
            own.join("ctl")
        );
        clones.push(clone);
    }
    for (number, clone) in (1..).zip(&mut clones) {
        clone.wait(&dir.join(format!("{number}")))?;
    }
    // They live on.
    clones.into_iter().for_each(std::mem::forget);
    Ok(lines)
}

/// A clone. Dropping it ends it.
struct Clone(Child);

impl Clone {
    fn start(
        fork: &Fork,
        number: u32,
        own: &Path,
        snapshot: &Path,
        config: &VmConfig,
    ) -> Result<Self> {
        let failed = || format!("Failed to start clone {number}");
        DirBuilder::new()
            .mode(0o700)
            .create(own)
            .with_context(failed)?;
        let log = File::create(own.join("log")).with_context(failed)?;
        let mut command = Command::new(std::env::current_exe().with_context(failed)?);
        command.arg("restore").arg(snapshot);
        command.arg("--ctl").arg(own.join("ctl"));
        for flag in flags(fork, number, own, snapshot, config).with_context(failed)? {
            command.arg(flag);
        }
        let errors = log.try_clone().with_context(failed)?;
        // Not in our process group: Ctrl-C does not end it.
        command.process_group(0).stdin(Stdio::null());
        command.stdout(log).stderr(errors);
        Ok(Self(command.spawn().with_context(failed)?))
    }

    /// Waits until the clone answers on its control socket.
    fn wait(&mut self, own: &Path) -> Result<()> {
        let (socket, began) = (own.join("ctl"), Instant::now());
        while client::ask(&socket, control::Command::Status).is_err() {
            if self.0.try_wait()?.is_some() {
                let log = fs::read_to_string(own.join("log")).unwrap_or_default();
                let why = log.lines().last().unwrap_or("it wrote no message");
                bail!("the clone in {own:?} has ended: {why}");
            }
            if began.elapsed() > PATIENCE {
                let seconds = PATIENCE.as_secs();
                bail!("the clone in {own:?} has not answered for {seconds} s");
            }
            sleep(POLL);
        }
        Ok(())
    }
}

impl Drop for Clone {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The flags of clone `number` that differ from those of the other clones.
fn flags(
    fork: &Fork,
    number: u32,
    own: &Path,
    snapshot: &Path,
    config: &VmConfig,
) -> Result<Vec<String>> {
    let text = number.to_string();
    let console = match &fork.console {
        Some(console) => console.replace(NUMBER, &text),
        None => format!("file={}", own.join("console").display()),
    };
    let mut flags = vec![format!("--console={console}")];
    if config.virtio_console.is_some() {
        flags.push("--virtio-console=none".into());
    }
    for (index, disk) in config
        .disk
        .iter()
        .enumerate()
        .filter(|(_, disk)| disk.is_written())
    {
        let name = disk.name(index);
        let disk = DiskConfig {
            path: snapshot.join(disk_copy(&name)),
            id: Some(name),
            direct: false,
            // The guest may have written bytes that look like another format.
            format: Some(DiskFormat::Raw),
            snapshot: true,
            snapshot_dir: Some(own.to_owned()),
            ..disk.clone()
        };
        flags.push(format!("--disk={disk}"));
    }
    let (has, given) = (config.net.len(), fork.net.len());
    if has != given {
        bail!(
            "the machine has {has} network interfaces, and --net is given {given} times: each \
             clone needs a tap for each, as in --net 'tap=clone{{}}'"
        );
    }
    for net in &fork.net {
        let net: NetConfig = net
            .replace(NUMBER, &text)
            .parse()
            .map_err(anyhow::Error::msg)?;
        let mac = match net.mac {
            Some(mac) => mac,
            None => new_mac()?,
        };
        let net = NetConfig {
            mac: Some(mac),
            ..net
        };
        flags.push(format!("--net={net}"));
    }
    if fork.pause {
        flags.push("--pause".into());
    }
    Ok(flags)
}

/// A random address that is locally administered, with the first bytes of QEMU's addresses.
fn new_mac() -> Result<Mac> {
    let [a, b, c, d] = random::bytes()?;
    Ok(Mac([0x52, 0x54, a, b, c, d]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fork_of(net: &[&str], console: Option<&str>) -> Fork {
        Fork {
            count: 2,
            dir: "/d".into(),
            net: net.iter().map(|net| (*net).into()).collect(),
            console: console.map(Into::into),
            pause: true,
        }
    }

    fn config() -> VmConfig {
        VmConfig {
            disk: ["/a.img,cache=unsafe", "/b.img,readonly", "/c,d.img,id=c"]
                .map(|text| match text.strip_prefix("/c") {
                    Some(_) => "\"/c,d.img\",id=c,direct".parse().unwrap(),
                    None => text.parse().unwrap(),
                })
                .into(),
            net: vec!["tap=t0".parse().unwrap()],
            ..VmConfig::default()
        }
    }

    #[test]
    fn each_clone_has_its_own_files() {
        let fork = fork_of(&["tap=c{},mac=52:54:00:00:00:0{}"], None);
        let (own, snapshot) = (Path::new("/d/7"), Path::new("/d/snapshot"));
        assert_eq!(
            flags(&fork, 7, own, snapshot, &config()).unwrap(),
            [
                "--console=file=/d/7/console",
                "--disk=cache=unsafe,format=raw,id=disk0,path=/d/snapshot/disk-disk0,snapshot=on,\
                 snapshot-dir=/d/7",
                "--disk=format=raw,id=c,path=/d/snapshot/disk-c,snapshot=on,snapshot-dir=/d/7",
                "--net=mac=52:54:00:00:00:07,tap=c7",
                "--pause",
            ]
        );
    }

    #[test]
    fn addresses_differ() {
        let fork = fork_of(&["tap=c{}"], Some("socket=/x{}"));
        let of = |number| flags(&fork, number, Path::new("/d"), Path::new("/s"), &config());
        let (one, two) = (of(1).unwrap(), of(2).unwrap());
        assert_eq!(one[0], "--console=socket=/x1");
        let mac = |flags: &[String]| flags[3].split(',').next().unwrap().to_owned();
        assert_ne!(mac(&one), mac(&two));
    }

    #[test]
    fn an_interface_needs_a_tap() {
        let none = flags(
            &fork_of(&[], None),
            1,
            Path::new("/d"),
            Path::new("/s"),
            &config(),
        );
        let line = none.unwrap_err().to_string();
        assert!(line.contains("--net 'tap=clone{}'"), "{line}");
    }
}
