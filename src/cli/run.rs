//! The flags that say how to run a machine: a new one, or one of a snapshot.

use std::path::PathBuf;

use clap::Args;

use crate::config::{GdbConfig, Time, TraceConfig};

/// How to run a machine. The doc comments are the text of `--help`.
#[derive(Args, Clone, Debug)]
pub struct RunFlags {
    /// End after this time, such as 30s
    ///
    /// TIME is written as 30s, 5m or 1h 30m. rvmm then ends with status 124.
    #[arg(
        help_heading = "Control",
        long,
        value_name = "TIME",
        allow_hyphen_values = true
    )]
    pub timeout: Option<Time>,

    /// End when the guest wants a reset
    ///
    /// rvmm then ends with status 120. Without this flag, it restarts the guest.
    #[arg(help_heading = "Control", long)]
    pub no_reboot: bool,

    /// Report the guest's exits at the end
    ///
    /// The report has the number of exits, and the time they took. It is text on standard error, or
    /// JSON in FILE. FILE must be new, empty or hold earlier statistics.
    #[arg(
        help_heading = "Messages and reports",
        long,
        value_name = "FILE",
        num_args = 0..=1,
        require_equals = true
    )]
    pub stats: Option<Option<PathBuf>>,

    /// Record exits and disk requests in a file
    ///
    /// FILE gets each exit to rvmm and each request of a disk, with the time it took, in the format
    /// of Perfetto and Chrome (JSON). rvmm trace FILE prints it as text. FILE must be new, empty or
    /// hold an earlier trace. FILE,limit=SIZE sets its largest size, which is 256M.
    #[arg(help_heading = "Messages and reports", long, value_name = "FILE")]
    pub trace: Option<TraceConfig>,

    /// Socket for commands of rvmm ctl
    ///
    /// rvmm creates a Unix socket at PATH. The commands pause, resume, reset and end the machine,
    /// and report its state.
    #[arg(help_heading = "Control", long, value_name = "PATH")]
    pub ctl: Option<PathBuf>,

    /// Debug the guest with GDB
    ///
    /// GDB connects with "target remote". The harts are its threads. WHERE is a TCP port of this
    /// host, which all its users can reach, or unix:PATH, which only you can reach. With WHERE,wait
    /// the guest does not run before GDB lets it go on.
    #[arg(help_heading = "Control", long, value_name = "WHERE[,wait]")]
    pub gdb: Option<GdbConfig>,

    /// Start paused; needs --ctl
    ///
    /// The guest does not run until rvmm ctl resumes it.
    #[arg(help_heading = "Control", long, requires = "ctl")]
    pub pause: bool,

    /// Print more messages; -vv for details
    ///
    /// -v prints what rvmm does. -vv prints details too.
    #[arg(help_heading = "Messages and reports", short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// Append rvmm's messages to a file
    ///
    /// The log goes to FILE instead of standard error. The reason for a failure goes to both.
    #[arg(help_heading = "Messages and reports", long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
}
