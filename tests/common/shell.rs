//! A Linux guest that runs commands: a line each, typed at its console.

use std::ffi::OsStr;

use super::{Outcome, POWERED_OFF, Rvmm, Vm};

/// A guest that runs what it is told, one command after the other.
pub(crate) struct Shell {
    pub(crate) vm: Vm,
    commands: usize,
}

const READY: &str = "rvmm-guest: ready";
const STATUS: &str = "rvmm-guest: status ";

impl Shell {
    /// Linux with the drivers for virtio, and `flags` for rvmm.
    pub(crate) fn start<I: IntoIterator<Item: AsRef<OsStr>>>(flags: I) -> Self {
        Self::of(Rvmm::virtio("console=ttyS0 quiet panic=-1 rvmm.action=sh").args(flags))
    }

    /// The same of a command line that has that action.
    pub(crate) fn of(rvmm: Rvmm) -> Self {
        Self::on(rvmm.spawn())
    }

    /// The same of a guest that has not been ready before.
    pub(crate) fn on(vm: Vm) -> Self {
        vm.wait_for(READY);
        Self { vm, commands: 0 }
    }

    /// Runs `command` with the guest's `sh`: its status, and what it wrote.
    pub(crate) fn run(&mut self, command: &str) -> (i32, String) {
        assert!(!command.contains('\n'), "one line: {command:?}");
        let before = self.vm.console().len();
        self.commands += 1;
        self.vm.send(format!("{command}\n"));
        self.vm.wait_for_times(READY, self.commands + 1);
        let console = self.vm.console();
        let (output, rest) = console[before..].split_once(STATUS).expect("a status");
        let status = rest.split_whitespace().next().expect("a number");
        (status.parse().expect("a number"), output.replace('\r', ""))
    }

    /// The same of a command that succeeds.
    #[track_caller]
    pub(crate) fn ok(&mut self, command: &str) -> String {
        let (status, output) = self.run(command);
        assert_eq!(status, 0, "{command}: {output}");
        output.trim().to_owned()
    }

    /// The guest was started again, and has said so since the last command.
    pub(crate) fn restarted(&mut self) {
        self.answered(1);
    }

    /// So many commands have ended that were sent without [`Shell::run`].
    pub(crate) fn answered(&mut self, commands: usize) {
        self.commands += commands;
        self.vm.wait_for_times(READY, self.commands + 1);
    }

    /// Ends the guest.
    pub(crate) fn power_off(mut self) -> Outcome {
        self.vm.send("exec poweroff -f\n");
        let end = self.vm.finish();
        end.assert_status(POWERED_OFF);
        end
    }
}
