//! How each VMM is started.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Guest RAM in MiB, the same for all.
pub(crate) const MEM_MIB: u64 = 256;

/// A guest to start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: Option<&'a Path>,
    pub(crate) cmdline: &'a str,
    pub(crate) cpus: u32,
    pub(crate) hugepages: bool,
    /// An image for its first disk.
    pub(crate) disk: Option<&'a Path>,
    /// Its network interface.
    pub(crate) link: Option<Link>,
}

/// A tap, and who moves its packets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    pub(crate) tap: &'static str,
    pub(crate) vhost: bool,
}

/// A VMM to measure.
#[derive(Clone, Debug)]
pub(crate) struct Contestant {
    pub(crate) name: String,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    /// This build or another one, with its default transport or with MMIO.
    Rvmm { program: String, mmio: bool },
    /// This build, with a trace in this file.
    Traced(String),
    /// With this machine type.
    Qemu(&'static str),
    /// With the in-kernel AIA, and with a device tree for that. `own` if the host's guests have the
    /// same interrupt controller by default.
    Floor { aia: bool, own: bool, dtb: String },
    /// A command with placeholders for kernel, initrd, command line and RAM.
    Peer(Vec<String>),
}

/// The kind of host that L1 is, as the contestants see it.
pub(crate) struct Host {
    aia: bool,
}

impl Host {
    pub(crate) fn of(kind: &str) -> Result<Self> {
        match kind {
            "aia" | "aia-emul" => Ok(Self { aia: true }),
            "none" => Ok(Self { aia: false }),
            other => bail!("no such kind of host: {other}"),
        }
    }
}

fn contestant(name: &str, kind: Kind) -> Contestant {
    let name = name.into();
    Contestant { name, kind }
}

/// rvmm, or another build of it.
fn build(name: &str, program: &str, mmio: bool) -> Contestant {
    let program = program.into();
    contestant(name, Kind::Rvmm { program, mmio })
}

/// All contestants for this host. If `quick`, rvmm only with its default transport, and only the
/// floor with the host's interrupt controller. `dir` is for their files.
pub(crate) fn all(host: &Host, dir: &Path, quick: bool) -> Result<Vec<Contestant>> {
    let before = env::var("RVMM_BENCH_BEFORE").unwrap_or_default();
    if !before.is_empty() {
        return Ok(vec![
            build("rvmm", "rvmm", false),
            build("again", "rvmm", false),
            build("before", &before, false),
        ]);
    }
    let floor = |name, aia, irqchip| -> Contestant {
        let dtb = dir.join(format!("{irqchip}.dtb")).display().to_string();
        let own = aia == host.aia;
        contestant(name, Kind::Floor { aia, own, dtb })
    };
    let machine = if host.aia {
        "virt,aia=aplic-imsic"
    } else {
        "virt"
    };
    let trace = dir.join("trace").display().to_string();
    let mut all = vec![
        build("rvmm", "rvmm", false),
        build("rvmm/mmio", "rvmm", true),
        contestant("rvmm/trace", Kind::Traced(trace)),
        contestant("qemu", Kind::Qemu(machine)),
        floor("floor", false, "plic"),
    ];
    if host.aia {
        all.push(floor("floor+aia", true, "aia"));
    }
    if quick {
        all.retain(|contestant| match contestant.kind {
            Kind::Rvmm { mmio, .. } => !mmio,
            Kind::Floor { own, .. } => own,
            _ => true,
        });
    }
    let peers = env::var("RVMM_BENCH_PEERS").unwrap_or_default();
    for line in peers.lines() {
        let (name, command) = line.split_once('=').context("RVMM_BENCH_PEERS")?;
        let words = command.split_whitespace().map(Into::into).collect();
        all.push(contestant(name, Kind::Peer(words)));
    }
    Ok(all)
}

impl Contestant {
    /// Whether a group of figures applies to it.
    pub(crate) fn takes_part(&self, group: &str) -> bool {
        match self.kind {
            Kind::Rvmm { mmio: true, .. } => ["blk", "net"].contains(&group),
            Kind::Traced(_) => group == "exits",
            Kind::Rvmm { .. } => true,
            // Its guests are those of rvmm's snapshots.
            Kind::Floor { own, .. } if group == "snapshot" => own,
            _ => !["snapshot", "clones"].contains(&group),
        }
    }

    /// Whether it can run this guest at all.
    pub(crate) fn can(&self, job: &Job) -> bool {
        match self.kind {
            Kind::Rvmm { .. } | Kind::Traced(_) | Kind::Qemu(_) => true,
            Kind::Floor { .. } => job.link.is_none() && job.cpus == 1,
            Kind::Peer(ref words) => {
                let cpus = job.cpus == 1 || words.iter().any(|word| word.contains("{cpus}"));
                cpus && job.disk.is_none() && job.link.is_none() && !job.hugepages
            }
        }
    }

    /// Whether it has interrupts and a real console. The floor has neither.
    pub(crate) fn is_machine(&self) -> bool {
        !matches!(self.kind, Kind::Floor { .. })
    }

    /// The command that runs `job`, with the guest's console on standard output.
    pub(crate) fn command(&self, job: &Job) -> Result<Command> {
        Ok(match &self.kind {
            Kind::Rvmm { program, mmio } => {
                let mut command = rvmm(program, job);
                command.args(
                    mmio.then_some(["--transport", "mmio"])
                        .into_iter()
                        .flatten(),
                );
                command
            }
            Kind::Traced(file) => {
                let mut command = rvmm("rvmm", job);
                command.arg(format!("--trace={file}"));
                command
            }
            Kind::Qemu(machine) => qemu(machine, job),
            Kind::Floor { aia, .. } if job.disk.is_some() => disk_floor(*aia, job),
            Kind::Floor { aia, dtb, .. } => floor(*aia, dtb, job)?,
            Kind::Peer(words) => peer(words, job)?,
        })
    }

    /// The name of the snapshot that it restores: its own, or rvmm's.
    pub(crate) fn snapshot(&self) -> String {
        let taker = match self.kind {
            Kind::Floor { .. } => "rvmm",
            _ => &self.name,
        };
        format!("snapshot-{taker}")
    }

    /// The command that restores the snapshot in `dir`, with the guest's console on standard input
    /// and output.
    pub(crate) fn restore(&self, dir: &Path) -> Result<Command> {
        Ok(match &self.kind {
            Kind::Rvmm { program, .. } => {
                let mut command = Command::new(program);
                command.arg("restore").arg(dir);
                command
            }
            Kind::Floor { aia, .. } => restore_floor(*aia, dir)?,
            _ => bail!("it has no snapshots"),
        })
    }

    /// The command that gives `words` to the machine with the control socket `socket`.
    pub(crate) fn control(&self, socket: &Path, words: &[&str]) -> Result<Command> {
        let Kind::Rvmm { program, .. } = &self.kind else {
            bail!("it has no control socket");
        };
        let mut command = Command::new(program);
        command.arg("ctl").arg(socket).args(words);
        Ok(command)
    }
}

/// The floor of a restore, with its own form of the snapshot's state.
fn restore_floor(aia: bool, dir: &Path) -> Result<Command> {
    let state = dir.join("floor");
    let mut prepare = Command::new("restore-floor");
    let prepared = prepare.arg("--prepare").arg(dir).arg(&state).status();
    let prepared = prepared.context("cannot run restore-floor")?;
    anyhow::ensure!(prepared.success(), "restore-floor --prepare: {prepared}");
    let mut command = Command::new("restore-floor");
    command.arg(state).arg(dir.join("memory"));
    command.args(aia.then_some("--aia"));
    Ok(command)
}

fn rvmm(program: &str, job: &Job) -> Command {
    let mut command = Command::new(program);
    add_flags(&mut command, job);
    command
}

/// rvmm's machine with the minimal disk.
fn disk_floor(aia: bool, job: &Job) -> Command {
    let mut command = Command::new("disk-floor");
    add_flags(&mut command, job);
    command.args(["--irqchip", if aia { "aia" } else { "plic" }]);
    command
}

/// rvmm's flags.
fn add_flags(command: &mut Command, job: &Job) {
    let pages = if job.hugepages { ",hugepages=2M" } else { "" };
    command.arg("--kernel").arg(job.kernel);
    command.args(["--mem", &format!("{MEM_MIB}M{pages}")]);
    command.args(["--cmdline", job.cmdline]);
    command.args(["--cpus", &job.cpus.to_string()]);
    if let Some(initrd) = job.initrd {
        command.arg("--initrd").arg(initrd);
    }
    if let Some(disk) = job.disk {
        command.arg("--disk").arg(disk);
    }
    if let Some(Link { tap, vhost }) = job.link {
        let vhost = if vhost { ",vhost" } else { "" };
        command.arg("--net").arg(format!("tap={tap}{vhost}"));
    }
}

fn qemu(machine: &str, job: &Job) -> Command {
    let mut command = Command::new("qemu-system-riscv64");
    command.args(["-M", machine, "-accel", "kvm", "-cpu", "host"]);
    command.args(["-smp", &job.cpus.to_string()]);
    command.args(["-m", &format!("{MEM_MIB}M"), "-no-reboot"]);
    command.args([
        "-nodefaults",
        "-display",
        "none",
        "-monitor",
        "none",
        "-serial",
        "stdio",
    ]);
    command.arg("-kernel").arg(job.kernel);
    if let Some(initrd) = job.initrd {
        command.arg("-initrd").arg(initrd);
        command.args(["-append", job.cmdline]);
    }
    if job.hugepages {
        command.args(["-mem-path", "/dev/hugepages"]);
    }
    if let Some(disk) = job.disk {
        let drive = format!(
            "file={},format=raw,if=none,id=disk,aio=io_uring",
            disk.display()
        );
        command.args(["-object", "iothread,id=io", "-drive", &drive]);
        command.args(["-device", "virtio-blk-pci,drive=disk,iothread=io"]);
    }
    if let Some(Link { tap, vhost }) = job.link {
        let vhost = if vhost { ",vhost=on" } else { "" };
        let netdev = format!("tap,id=net,ifname={tap},script=no,downscript=no{vhost}");
        command.args([
            "-netdev",
            &netdev,
            "-device",
            "virtio-net-pci,netdev=net,romfile=",
        ]);
    }
    command
}

/// Its device tree is the one that rvmm makes for the same guest.
fn floor(aia: bool, dtb: &str, job: &Job) -> Result<Command> {
    let mut command = Command::new("floor");
    command.arg("--kernel").arg(job.kernel);
    command.args(["--mem", &MEM_MIB.to_string()]);
    if aia {
        command.arg("--aia");
    }
    if job.hugepages {
        command.arg("--hugepages");
    }
    if let Some(initrd) = job.initrd {
        let irqchip = if aia { "aia" } else { "plic" };
        let mut dump = rvmm(
            "rvmm",
            &Job {
                hugepages: false,
                ..*job
            },
        );
        dump.args(["--irqchip", irqchip, "--dump-dtb", dtb]);
        let made = dump.status().context("cannot run rvmm --dump-dtb")?;
        anyhow::ensure!(made.success(), "rvmm --dump-dtb: {made}");
        command.arg("--initrd").arg(initrd).args(["--dtb", dtb]);
    }
    Ok(command)
}

fn peer(words: &[String], job: &Job) -> Result<Command> {
    let path = |path: &Path| path.display().to_string();
    let places = [
        ("{kernel}", path(job.kernel)),
        ("{initrd}", path(job.initrd.unwrap_or(job.kernel))),
        ("{cmdline}", job.cmdline.to_owned()),
        ("{mem}", MEM_MIB.to_string()),
        ("{cpus}", job.cpus.to_string()),
    ];
    let filled = words.iter().map(|word| {
        let fill = |word: String, (place, value): &(&str, String)| word.replace(place, value);
        places.iter().fold(word.clone(), fill)
    });
    let filled: Vec<String> = filled.collect();
    let (program, arguments) = filled.split_first().context("an empty command")?;
    let mut command = Command::new(program);
    command.args(arguments);
    Ok(command)
}
