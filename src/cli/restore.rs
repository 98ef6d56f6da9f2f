//! `rvmm restore`: which parts of a saved machine the user replaces.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::run::RunFlags;
use crate::config::{ConsoleConfig, DiskConfig, NetConfig, VmConfig};
use crate::machine::Clock;

/// What to restore, and what is different now. The doc comments are the text of `--help`.
#[derive(Args, Debug)]
pub struct Restore {
    /// The directory of the snapshot
    pub dir: PathBuf,

    /// Use another file for a disk
    ///
    /// id=NAME says which disk: disk0 is the first one, unless it has a name. The other keys are
    /// those of rvmm --disk. The disk must have the content that it had when the snapshot was
    /// taken. Example: --disk copy.img,id=disk0
    #[arg(
        help_heading = "Devices",
        short,
        long,
        value_name = "PATH,id=NAME[,..]"
    )]
    pub disk: Vec<DiskConfig>,

    /// Use another host tap for an interface
    ///
    /// The first --net is for the first interface, and so on. Keys are those of rvmm --net. Without
    /// mac= the interface keeps its address. A driver that runs already uses another address only
    /// after it was bound to the interface again.
    #[arg(help_heading = "Devices", short, long, value_name = "tap=NAME[,..]")]
    pub net: Vec<NetConfig>,

    /// stdio, none, pty, file=, socket=
    ///
    /// Where the guest's console goes. Without this flag, where it went before.
    #[arg(help_heading = "Devices", long, value_name = "WHERE")]
    pub console: Option<ConsoleConfig>,

    /// Where the second console goes
    #[arg(help_heading = "Devices", long, value_name = "WHERE")]
    pub virtio_console: Option<ConsoleConfig>,

    /// stop (default) or jump
    ///
    /// What the guest's time does. With stop it goes on where it was when the snapshot was taken.
    /// With jump it catches up with the host's clock.
    #[arg(
        help_heading = "Control",
        hide_default_value = true,
        hide_possible_values = true,
        long,
        value_enum,
        value_name = "HOW",
        default_value_t
    )]
    pub clock: ClockFlag,

    /// How to run it.
    #[command(flatten)]
    pub run: RunFlags,
}

/// What the guest's time does after a pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ClockFlag {
    /// It goes on where it was
    #[default]
    Stop,
    /// It catches up with the host's clock
    Jump,
}

impl From<ClockFlag> for Clock {
    fn from(flag: ClockFlag) -> Self {
        match flag {
            ClockFlag::Stop => Clock::Stop,
            ClockFlag::Jump => Clock::Jump,
        }
    }
}

impl Restore {
    /// The configuration `saved` with what the user replaces.
    ///
    /// # Errors
    /// Returns a message of one line if the machine has no such disk, interface or console, or if
    /// the result is not a configuration that rvmm can run.
    pub fn apply(&self, saved: &VmConfig) -> Result<VmConfig, String> {
        let mut config = saved.clone();
        for disk in &self.disk {
            let (index, name) = find_disk(&config, disk)?;
            // The name is the machine's, also if it is the default one.
            config.disk[index] = disk.clone();
            config.disk[index].id = name;
        }
        if self.net.len() > config.net.len() {
            let has = config.net.len();
            return Err(format!(
                "--net: the machine of the snapshot has {has} interfaces"
            ));
        }
        for (interface, other) in config.net.iter_mut().zip(&self.net) {
            let mac = other.mac.or(interface.mac);
            *interface = NetConfig {
                mac,
                ..other.clone()
            };
        }
        if let Some(console) = &self.console {
            config.console = console.clone();
        }
        if let Some(console) = &self.virtio_console {
            if config.virtio_console.is_none() {
                return Err("--virtio-console: the machine of the snapshot has none".into());
            }
            config.virtio_console = Some(console.clone());
        }
        config.validate().map_err(|error| error.to_string())?;
        Ok(config)
    }
}

/// The index of the disk that `given` is for, and the name that it has in the configuration.
fn find_disk(config: &VmConfig, given: &DiskConfig) -> Result<(usize, Option<String>), String> {
    let path = &given.path;
    let Some(wanted) = &given.id else {
        return Err(format!(
            "--disk {path:?}: say which disk, as in --disk {path:?},id=disk0"
        ));
    };
    let is_it = |(index, disk): &(usize, &DiskConfig)| match &disk.id {
        Some(id) => id == wanted,
        None => *wanted == format!("disk{index}"),
    };
    let found = config.disk.iter().enumerate().find(is_it);
    let found = found.map(|(index, disk)| (index, disk.id.clone()));
    found.ok_or_else(|| format!("--disk id={wanted}: the machine of the snapshot has no such disk"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Command, Request, parse};
    use std::ffi::OsString;

    fn restore(line: &str) -> Restore {
        let words = format!("rvmm restore /snap {line}");
        match parse(words.split_whitespace().map(OsString::from)) {
            Request::Do(Command::Restore(restore)) => *restore,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn saved() -> VmConfig {
        VmConfig {
            kernel: Some("/k".into()),
            disk: ["/a.img,cache=unsafe", "/b.img,id=data"]
                .map(|disk| disk.parse().unwrap())
                .into(),
            net: vec!["tap=t0,mac=52:54:00:00:00:01".parse().unwrap()],
            ..VmConfig::default()
        }
    }

    #[test]
    fn nothing_changes_by_itself() {
        assert_eq!(restore("").apply(&saved()), Ok(saved()));
        assert_eq!(restore("").clock, ClockFlag::Stop);
    }

    #[test]
    fn parts_are_replaced() {
        let line = "--disk /c.img,id=disk0 --disk /d.img,id=data,readonly --net tap=t9 \
                    --console none --clock jump --pause --ctl /x";
        let restore = restore(line);
        let config = restore.apply(&saved()).unwrap();
        assert_eq!(config.disk[0], "/c.img".parse().unwrap());
        assert_eq!(config.disk[1], "/d.img,id=data,readonly".parse().unwrap());
        assert_eq!(
            config.net[0],
            "tap=t9,mac=52:54:00:00:00:01".parse().unwrap()
        );
        assert_eq!(config.console, ConsoleConfig::None);
        assert!(restore.run.pause);
        assert_eq!(Clock::from(restore.clock), Clock::Jump);
    }

    #[test]
    fn what_the_machine_does_not_have_is_refused() {
        for (line, part) in [
            ("--disk /c.img", "say which disk"),
            ("--disk /c.img,id=disk1", "id=disk1: the machine"),
            ("--net tap=a --net tap=b", "has 1 interfaces"),
            ("--virtio-console none", "has none"),
            ("--disk /c.img,id=disk0,direct,snapshot", "exclude"),
        ] {
            let message = restore(line).apply(&saved()).unwrap_err();
            assert!(message.contains(part), "{line}: {message}");
        }
    }
}
