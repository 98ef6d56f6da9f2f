//! The subcommands of rvmm.

use std::path::PathBuf;

use clap::Subcommand;

use crate::control;

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
    Resume,
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

impl Act {
    /// The command that is sent to the machine.
    pub fn command(&self) -> control::Command {
        match self {
            Act::Status { .. } => control::Command::Status,
            Act::Pause => control::Command::Pause,
            Act::Resume => control::Command::Resume,
            Act::Stop => control::Command::Stop,
            Act::Reset => control::Command::Reset,
            Act::Stats => control::Command::Stats,
            Act::DumpDtb { .. } => control::Command::DumpDtb,
            Act::Report => control::Command::Report,
        }
    }
}
