//! A Linux guest that runs commands, typed at its console one per line.

use std::ffi::OsStr;

use super::files::TempDir;
use super::{Outcome, POWERED_OFF, Rvmm, Vm};

/// A guest that runs commands one after the other.
pub(crate) struct Shell {
    pub(crate) vm: Vm,
    /// How often the guest has said so far that it is ready.
    ready: usize,
}

const READY: &str = "rvmm-guest: ready";
const STATUS: &str = "rvmm-guest: status ";

impl Shell {
    /// Starts Linux with the drivers for virtio, and `flags` for rvmm.
    pub(crate) fn start<I: IntoIterator<Item: AsRef<OsStr>>>(flags: I) -> Self {
        Self::of(Rvmm::virtio("console=ttyS0 quiet panic=-1 rvmm.action=sh").args(flags))
    }

    /// Starts `rvmm`, whose guest must have the action `sh`.
    pub(crate) fn of(rvmm: Rvmm) -> Self {
        Self::on(rvmm.spawn())
    }

    /// A guest of `vm`, which has not been ready before. Waits until it is.
    pub(crate) fn on(vm: Vm) -> Self {
        vm.wait_for(READY);
        Self { vm, ready: 1 }
    }

    /// A guest of `vm`, which was restored from a snapshot while it waited for a command.
    pub(crate) fn restored(vm: Vm) -> Self {
        Self { vm, ready: 0 }
    }

    /// Runs `command` in the guest's `sh`. Returns its status and its output.
    pub(crate) fn run(&mut self, command: &str) -> (i32, String) {
        assert!(!command.contains('\n'), "one line: {command:?}");
        let before = self.vm.console().len();
        self.ready += 1;
        self.vm.send(format!("{command}\n"));
        self.vm.wait_for_times(READY, self.ready);
        let console = self.vm.console();
        let (output, rest) = console[before..].split_once(STATUS).expect("a status");
        let status = rest.split_whitespace().next().expect("a number");
        (status.parse().expect("a number"), output.replace('\r', ""))
    }

    /// Runs a command that must succeed, and returns its output.
    #[track_caller]
    pub(crate) fn ok(&mut self, command: &str) -> String {
        let (status, output) = self.run(command);
        assert_eq!(status, 0, "{command}: {output}");
        output.trim().to_owned()
    }

    /// Waits until the guest, which was started again, is ready again.
    pub(crate) fn restarted(&mut self) {
        self.answered(1);
    }

    /// Waits until so many `commands` have ended that were sent without [`Shell::run`].
    pub(crate) fn answered(&mut self, commands: usize) {
        self.ready += commands;
        self.vm.wait_for_times(READY, self.ready);
    }

    /// Ends the guest.
    pub(crate) fn power_off(mut self) -> Outcome {
        self.vm.send("exec poweroff -f\n");
        let end = self.vm.finish();
        end.assert_status(POWERED_OFF);
        end
    }
}

/// The /proc/kallsyms of the Linux under test. The guest writes it to a disk in `scratch`.
pub(crate) fn kallsyms(scratch: &TempDir) -> Vec<u8> {
    let disk = scratch.file("kallsyms", vec![0; 32 << 20]);
    let mut shell = Shell::start([OsStr::new("--disk"), disk.as_os_str()]);
    let length = shell
        .ok("dd bs=64k if=/proc/kallsyms of=/dev/vda 2>/dev/null; sync; wc -c </proc/kallsyms");
    shell.power_off();
    let mut symbols = std::fs::read(&disk).expect("the disk");
    symbols.truncate(length.parse().expect("a number"));
    symbols
}
