//! The command line.

mod command;
mod file;
mod names;
mod restore;
mod run;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser};

use crate::config::{ConfigError, CrashAct, VmConfig};
use crate::machine::{harts, status};
pub use command::{Act, Command, SnapshotAct};
pub use restore::Restore;
pub use run::RunFlags;

const NOTES: &str = "\
Example:
  rvmm --kernel Image --initrd initramfs.cpio.gz --mem 256M

On a terminal, Ctrl-A X ends rvmm and Ctrl-A H shows the other keys.
If a flag is given twice, the last one counts; each --disk and --net adds one.";

const BARE_HELP: &str = "\
rvmm runs a RISC-V virtual machine on KVM.

  rvmm --kernel Image --initrd initramfs.cpio.gz --mem 128M

rvmm info shows what this host offers, rvmm ctl controls a machine and takes snapshots, rvmm
restore goes on with one, rvmm --help lists all flags.
";

/// Runs a RISC-V virtual machine on KVM
#[derive(Debug, Parser)]
#[command(name = "rvmm", version, max_term_width = 100)]
#[command(after_help = "rvmm --help explains each flag, and lists the exit statuses.")]
#[command(after_long_help = after_help())]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
// If a flag is given twice the last one counts; flags that are lists collect all values.
#[command(args_override_self = true)]
pub struct Cli {
    /// What to do instead of running a machine.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// The machine.
    #[command(flatten)]
    pub vm: VmConfig,

    /// Read the machine from a JSON file
    ///
    /// The file has the format that --print-config writes. Flags override the file. --disk or --net
    /// replaces the file's whole list.
    #[arg(help_heading = "Control", long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Print the machine as JSON, and end
    ///
    /// The JSON goes to standard output. The guest does not run.
    #[arg(
        help_heading = "Control",
        hide_short_help = true,
        long,
        conflicts_with = "dump_dtb"
    )]
    pub print_config: bool,

    /// Write the device tree, and end
    ///
    /// The guest does not run. FILE must be new, empty or hold an earlier tree of rvmm.
    #[arg(
        help_heading = "Messages and reports",
        hide_short_help = true,
        long,
        value_name = "FILE"
    )]
    pub dump_dtb: Option<PathBuf>,

    /// How to run it.
    #[command(flatten)]
    pub run: RunFlags,
}

/// The parser of `rvmm restore` alone. clap makes all parts of a parser before it looks at the
/// first word, and the whole parser has ten times as many.
#[derive(Debug, Parser)]
#[command(args_override_self = true)]
struct RestoreAlone {
    #[command(flatten)]
    restore: Restore,
}

impl RestoreAlone {
    /// The command, if this is a valid `rvmm restore`. If not, the whole parser says why, or prints
    /// its help.
    fn of(args: &[OsString]) -> Option<Command> {
        let words = args.get(1..)?;
        if words.first()? != "restore" {
            return None;
        }
        let parsed = Self::try_parse_from(words).ok()?;
        Some(Command::Restore(Box::new(parsed.restore)))
    }
}

/// The request that a command line makes.
#[derive(Debug)]
pub enum Request {
    /// Run a VM.
    Run(Box<Cli>),
    /// Run another command.
    Do(Command),
    /// Print this on standard output and end with 0: help, or the version.
    Print(String),
    /// Print this on standard error and end with this status: a wrong command line or file.
    Refuse(String, u8),
}

/// A machine that pauses after a crash needs somebody who can go on with it.
fn check_crash(cli: &Cli) -> Result<(), String> {
    let pauses = cli.vm.on_crash.act == CrashAct::Pause && !cli.print_config;
    match pauses && cli.run.ctl.is_none() && cli.run.gdb.is_none() {
        true => Err("--on-crash pause needs --ctl or --gdb: the pause has no other end".into()),
        false => Ok(()),
    }
}

/// Parses and validates a command line, program name first.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Request {
    let args: Vec<OsString> = args.into_iter().collect();
    if args.len() <= 1 {
        return Request::Print(BARE_HELP.into());
    }
    if let Some(command) = RestoreAlone::of(&args) {
        return Request::Do(command);
    }
    let parsed = Cli::command()
        .try_get_matches_from(args)
        .and_then(|matches| Ok((Cli::from_arg_matches(&matches)?, matches)));
    let (mut cli, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                return Request::Print(error.render().to_string());
            }
            _ => return Request::Refuse(one_line(&error), status::USAGE),
        },
    };
    if let Some(command) = cli.command {
        return Request::Do(command);
    }
    if let Some(path) = &cli.config {
        match file::merge(path, &cli.vm, &matches) {
            Ok(vm) => cli.vm = vm,
            Err(error) => return Request::Refuse(error.to_string(), error.status()),
        }
    }
    let valid = match cli.vm.validate() {
        // The kernel may be given on the command line later.
        Err(ConfigError::NoKernel) if cli.print_config => Ok(()),
        valid => valid.map_err(|error| error.to_string()),
    };
    let valid = valid.and_then(|()| harts::check(&cli.vm));
    let valid = valid.and_then(|()| check_crash(&cli));
    if let Err(message) = valid.and_then(|()| names::check(&cli)) {
        return Request::Refuse(message, status::USAGE);
    }
    if cli.print_config {
        return match file::print(&cli.vm) {
            Ok(json) => Request::Print(json),
            Err(error) => {
                let message = format!(
                    "Failed to write the machine as JSON, which allows only UTF-8: {error}: rename \
                     the file"
                );
                Request::Refuse(message, status::USAGE)
            }
        };
    }
    Request::Run(Box::new(cli))
}

/// clap's message as one line, without its usage and hints, but with a pointer to --help.
fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let message = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = message.split_whitespace().collect();
    let message = words.join(" ");
    let mut message = message
        .strip_prefix("error: ")
        .unwrap_or(&message)
        .to_owned();
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        Some(ContextValue::Strings(texts)) => texts.first().map(String::as_str),
        _ => None,
    };
    if let Some(word) = context(ContextKind::InvalidSubcommand) {
        message = format!(
            "unexpected argument '{word}': values follow their flag, as in --kernel FILE or \
             --stats=FILE"
        );
    }
    let similar = [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand];
    if let Some(similar) = similar.into_iter().find_map(context) {
        message.push_str(&format!("; did you mean {similar}?"));
    }
    format!("{message}; rvmm --help lists all flags")
}

/// The text of `--help` below the flags.
fn after_help() -> String {
    let table = status::table().into_iter();
    let rows = table.map(|(status, meaning)| format!("\n  {status:<10}{meaning}"));
    format!("{NOTES}\n\nExit status:{}", rows.collect::<String>())
}

/// The complete text of `--help`.
pub fn help() -> String {
    Cli::command().render_long_help().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Time, cmdline};
    use crate::util::ByteSize;
    use std::time::Duration;

    fn parsed(line: &str) -> Request {
        parse(line.split(' ').map(OsString::from))
    }

    fn refused(line: &str) -> String {
        match parsed(line) {
            Request::Refuse(message, status::USAGE) => message,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn the_command_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_restore_is_parsed_alone_as_by_the_whole_parser() {
        let args = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        RestoreAlone::command().debug_assert();
        for line in [
            "rvmm restore /snap",
            "rvmm restore /snap -vv --ctl /a --ctl /b --pause --clock jump -d x,id=disk0",
            "rvmm restore --stats -n tap=a -n tap=b --console=none -- --snap",
        ] {
            let alone = RestoreAlone::of(&args(line)).unwrap();
            let whole = Cli::try_parse_from(args(line)).unwrap().command;
            assert_eq!(format!("{alone:?}"), format!("{:?}", whole.unwrap()));
        }
        for line in [
            "rvmm",
            "rvmm -v",
            "rvmm restore",
            "rvmm restore --help",
            "rvmm restore /snap --pause",
            "rvmm info",
        ] {
            assert!(RestoreAlone::of(&args(line)).is_none(), "{line}");
        }
    }

    #[test]
    fn flags_make_a_machine() {
        let Request::Run(cli) = parsed("rvmm --kernel Image --initrd i --mem 1G -vv --timeout 1m")
        else {
            panic!("refused");
        };
        assert_eq!(cli.vm.kernel, Some(PathBuf::from("Image")));
        assert_eq!(cli.vm.mem.size, ByteSize::mib(1024));
        assert_eq!(cli.vm.cmdline, "console=ttyS0");
        assert_eq!(cli.run.verbose, 2);
        assert_eq!(cli.run.timeout, Some(Time(Duration::from_secs(60))));
    }

    #[test]
    fn flags_have_short_names() {
        let line = "rvmm -k Image -i initrd -p quiet -m 1G -c 2 -d a.img -n tap=t";
        let long = "rvmm --kernel Image --initrd initrd --cmdline quiet --mem 1G --cpus 2 \
                    --disk a.img --net tap=t";
        let machine = |line| match parsed(line) {
            Request::Run(cli) => cli.vm,
            other => panic!("{line}: {other:?}"),
        };
        assert_eq!(machine(line), machine(long));
    }

    #[test]
    fn of_a_flag_given_twice_the_last_wins() {
        let line = "rvmm --kernel a --mem 1G --cpus 2 --no-reboot --transport pci --disk a.img \
                    --kernel b --mem 512M --cpus 1 --no-reboot --transport mmio --disk b.img \
                    --timeout 1s --timeout 2s --stats --stats=x --log-file l --log-file m";
        let line: Vec<&str> = line.split_whitespace().collect();
        let Request::Run(cli) = parsed(&line.join(" ")) else {
            panic!("refused");
        };
        assert_eq!(cli.vm.kernel, Some(PathBuf::from("b")));
        assert_eq!(cli.vm.mem.size, ByteSize::mib(512));
        assert_eq!(cli.vm.cpus, 1);
        assert_eq!(cli.run.timeout, Some(Time(Duration::from_secs(2))));
        assert_eq!(cli.run.stats, Some(Some(PathBuf::from("x"))));
        assert_eq!(cli.run.log_file, Some(PathBuf::from("m")));
        assert_eq!(cli.vm.disk.len(), 2);
    }

    /// A user may repeat a flag that a script has given: no flag is refused because it is given
    /// twice.
    #[test]
    fn no_flag_is_refused_for_standing_twice() {
        for arg in Cli::command().get_arguments() {
            let Some(long) = arg
                .get_long()
                .filter(|long| !["help", "version"].contains(long))
            else {
                continue;
            };
            let value = match long {
                "mem" => "64M",
                "cpus" => "1",
                "cpu" => "v=off",
                "sbi" => "pmu=off",
                "net" => "tap=t",
                "disk" => "x.img",
                "console" | "virtio-console" => "none",
                "transport" => "pci",
                "irqchip" => "auto",
                "kernel-format" => "auto",
                "timeout" => "1s",
                "on-sigterm" => "poweroff",
                "on-crash" => "pause",
                "gdb" => "1234",
                _ => "x",
            };
            let one = match arg.get_action() {
                clap::ArgAction::SetTrue | clap::ArgAction::Count => format!("--{long}"),
                _ => format!("--{long}={value}"),
            };
            // --pause needs --ctl.
            let twice = ["rvmm", "--kernel", "k", "--ctl=x", &one, &one].map(OsString::from);
            let matches = Cli::command().try_get_matches_from(twice);
            assert!(matches.is_ok(), "{one}: {}", matches.unwrap_err());
        }
    }

    #[test]
    fn wrong_usage_is_one_line() {
        for (line, part) in [
            ("rvmm --kernel", "--kernel <FILE>"),
            ("rvmm --mem 1G", "no kernel"),
            ("rvmm --kernel x --irqchip apic", "plic"),
            ("rvmm --kernel x --console tty", "socket=PATH"),
            ("rvmm --kernel x --timeout 0s", "longer than zero"),
            ("rvmm --kernel x --timeout soon", "30s"),
            ("rvmm --kernel x --mem 12Q", "not a size"),
            ("rvmm --kernel x --mem -1", "--mem"),
            ("rvmm --kernel x --mem 0", "--mem 0"),
            ("rvmm --kernel x --mem 64M,hugepages=4M", "`2M`"),
            ("rvmm --kernel x --mem 64M,huge=2M", "`hugepages`"),
            ("rvmm --kernel x --cpus 0", "--cpus 1"),
            ("rvmm --kernel x --nope", "--nope"),
            ("rvmm x", "'x'"),
            ("rvmm --kernel x --stats out.json", "'out.json': values"),
            ("rvmm --kernl x", "did you mean --kernel?"),
            ("rvmm inf", "did you mean info?"),
            ("rvmm --kernel x --cpus two", "a number of harts"),
            ("rvmm --kernel x --cpus -1", "a number of harts"),
            ("rvmm --kernel x --cpus 513", "512"),
            ("rvmm --kernel x --cpu foo=off", "--cpu foo"),
            ("rvmm --kernel x --sbi foo=off", "--sbi foo"),
            ("rvmm --kernel x --net user", "`tap`"),
            ("rvmm --kernel x --disk a.img,ro", "`readonly`"),
            ("rvmm --kernel x --disk a.img,", "comma"),
            ("rvmm --kernel x --mem 256", "write 256M"),
            ("rvmm --kernel x --mem 3M,hugepages=2M", "3M"),
            ("rvmm --kernel x --cpus 99999999999", "512"),
            ("rvmm --kernel x --timeout -5s", "30s"),
            ("rvmm --kernel x --net tap0", "as in tap=tap0"),
            ("rvmm --kernel x --net ", "empty"),
            ("rvmm --kernel x --disk ,readonly", "PATH or"),
            (
                "rvmm --kernel x --disk a,snapshot,snapshot-dir=",
                "snapshot-dir",
            ),
            ("rvmm --kernel x --on-sigterm timeout=3s", "as in poweroff"),
            ("rvmm --print-config --kernel x --cpus 0", "--cpus 1"),
            ("rvmm --print-config --kernel x --dump-dtb y", "--dump-dtb"),
        ] {
            let message = refused(line);
            assert!(message.contains(part), "{line}: {message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn help_tells_the_limits_of_the_command_line() {
        let help = help();
        let words: Vec<&str> = help.split_whitespace().collect();
        let (linux, all) = (cmdline::LINUX_MAX, cmdline::MAX);
        let limits = format!("keeps {linux} bytes, the device tree takes {all}");
        assert!(words.join(" ").contains(&limits));
    }

    #[test]
    fn the_short_help_fits_on_a_screen() {
        let help = Cli::command().term_width(80).render_help().to_string();
        assert!(help.lines().count() <= 56, "{help}");
        let widest = help.lines().map(|line| line.chars().count()).max();
        assert!(widest <= Some(80), "{help}");
        for heading in ["Boot:", "Machine:", "Devices:", "Control:"] {
            assert!(help.contains(heading), "{help}");
        }
    }

    #[test]
    fn help_tells_every_exit_status() {
        let Request::Print(short) = parsed("rvmm") else {
            panic!("bare rvmm helps");
        };
        assert!(short.lines().count() < 10);
        for (status, meaning) in status::table() {
            assert!(help().contains(&format!("\n  {status:<9} {meaning}\n")));
        }
        assert!(help().contains(&format!("with status {}", status::RESET)));
    }
}
