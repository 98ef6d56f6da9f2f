//! The subcommands of rvmm.

use std::io;
use std::path::{self, PathBuf};

use clap::Subcommand;

use super::restore::{ClockFlag, Restore};
use crate::control::{self, SnapshotOf, What};
use crate::fork::Fork;

/// What rvmm does instead of running a machine.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show what this host's KVM offers guests, and which known bugs it has
    Info {
        /// Print JSON, for scripts
        #[arg(long)]
        json: bool,
    },
    /// Print a trace, the FILE of --trace, as text, and a summary of it
    Trace {
        /// The file
        file: PathBuf,
        /// Print only the N events that took longest
        #[arg(long, value_name = "N")]
        slowest: Option<usize>,
        /// Print only events whose name has this text, such as MMIO, SBI or request
        #[arg(long, value_name = "TEXT")]
        kind: Option<String>,
        /// Print only the exits of this hart's vCPU
        #[arg(long, value_name = "HART")]
        vcpu: Option<u32>,
        /// Print only the summary
        #[arg(long)]
        summary: bool,
    },
    /// Go on with the guest of a snapshot that rvmm ctl PATH snapshot has written
    #[command(args_override_self = true)]
    Restore(Box<Restore>),
    /// Show or check a snapshot
    Snapshot {
        /// What to do with it
        #[command(subcommand)]
        act: SnapshotAct,
    },
    /// Control a machine that was started with --ctl PATH
    Ctl {
        /// The socket that was given to --ctl
        path: PathBuf,
        /// The command for the machine
        #[command(subcommand)]
        act: Act,
    },
}

/// The commands of `rvmm ctl`.
#[derive(Debug, Subcommand)]
pub enum Act {
    /// Show whether the guest runs, and the state of its devices
    Status {
        /// Print JSON, for scripts
        #[arg(long)]
        json: bool,
    },
    /// Pause the guest's vCPUs and devices; nothing is lost
    Pause,
    /// Resume a paused guest
    Resume {
        /// stop: the guest's time goes on where it was; jump: it catches up
        #[arg(long, value_enum, value_name = "HOW", default_value_t)]
        clock: ClockFlag,
    },
    /// Write a snapshot of the machine to DIR; the guest is paused for a moment
    Snapshot {
        /// The directory must be new, empty or hold an earlier snapshot, which it replaces
        dir: PathBuf,
        /// Copy most of RAM while the guest still runs, so that it is frozen for a shorter time
        #[arg(long)]
        live: bool,
        /// From now on, track what changes, for --diff; vhost is off meanwhile
        #[arg(long)]
        track: bool,
        /// Write only the RAM that has changed since the last --track or --diff; rvmm snapshot
        /// merge makes a whole snapshot of it
        #[arg(long, conflicts_with_all = ["track", "live"])]
        diff: bool,
        /// Also copy the images of the disks that the guest can write to, to DIR/disk-NAME
        #[arg(long)]
        disks: bool,
    },
    /// Start N clones of the machine, which goes on itself
    Fork(Fork),
    /// End the machine, as Ctrl-A X does
    Stop,
    /// Restart the guest, as if power was off for a moment
    Reset,
    /// Show how many exits the guest has caused and the time they took, as JSON; the machine must
    /// have been started with --stats
    Stats,
    /// Explain what the guest's harts are doing: registers, the last trap, page tables, callers
    Report,
    /// Write the guest's device tree to FILE, or to standard output
    DumpDtb {
        /// The file must be new, empty or hold an earlier tree of rvmm
        file: Option<PathBuf>,
    },
}

/// The commands of `rvmm snapshot`.
#[derive(Debug, Subcommand)]
pub enum SnapshotAct {
    /// Show which machine a snapshot is of, and what is in it
    Show {
        /// The directory of the snapshot
        dir: PathBuf,
        /// Print JSON, for scripts
        #[arg(long)]
        json: bool,
    },
    /// Read all of a snapshot, and check it
    Verify {
        /// The directory of the snapshot
        dir: PathBuf,
    },
    /// Make a whole snapshot of one and the changes after it
    Merge {
        /// A whole snapshot, taken with --track, and those with --diff after it, in their order
        #[arg(required = true, num_args = 2.., value_name = "DIR")]
        dirs: Vec<PathBuf>,
        /// The new snapshot
        #[arg(long, value_name = "DIR")]
        into: PathBuf,
    },
}

impl Act {
    /// The command that is sent to the machine. None if it takes more than one command.
    ///
    /// # Errors
    /// Fails if the working directory cannot be found, which a relative path depends on.
    pub fn command(&self) -> io::Result<Option<control::Command>> {
        Ok(Some(match self {
            Act::Status { .. } => control::Command::Status,
            Act::Pause => control::Command::Pause,
            Act::Resume { clock } => match clock {
                ClockFlag::Stop => control::Command::Resume,
                ClockFlag::Jump => control::Command::ResumeAndJump,
            },
            Act::Fork(_) => return Ok(None),
            Act::Snapshot {
                dir,
                live,
                track,
                diff,
                disks,
            } => control::Command::Snapshot(SnapshotOf {
                dir: path::absolute(dir)?,
                live: *live,
                disks: *disks,
                what: match (track, diff) {
                    (_, true) => What::Diff,
                    (true, _) => What::Track,
                    _ => What::All,
                },
            }),
            Act::Stop => control::Command::Stop,
            Act::Reset => control::Command::Reset,
            Act::Stats => control::Command::Stats,
            Act::DumpDtb { .. } => control::Command::DumpDtb,
            Act::Report => control::Command::Report,
        }))
    }
}
