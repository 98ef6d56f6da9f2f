//! Carries out the commands of the control socket.

use anyhow::Result;
use log::{debug, warn};

use super::frozen::Clock;
use super::life::Vcpus;
use super::{End, Outcome, Running};
use crate::control::server::Client;
use crate::control::{Command, Reply, State, Status};
use crate::hypervisor;
use crate::util::Hex;

impl Running<'_> {
    /// Carries out `command`, and sends the reply to `client`. Returns how this life ends, if the
    /// command ends it.
    ///
    /// # Errors
    /// Fails if the host fails, so that the machine cannot go on.
    pub(super) fn obey(
        &mut self,
        command: Command,
        client: Client,
        vcpus: &mut Vcpus,
    ) -> Result<Option<End>> {
        let reply = match command {
            Command::Status => Reply::Status(self.status(vcpus)?),
            Command::Pause | Command::Resume | Command::ResumeAndJump | Command::Snapshot(_)
                if self.is_held() =>
            {
                Reply::Refused("GDB has stopped the guest: let it go on in GDB, or detach".into())
            }
            Command::Pause => self.pause(vcpus)?,
            Command::Resume => self.resume(vcpus, Clock::Stop)?,
            Command::ResumeAndJump => self.resume(vcpus, Clock::Jump)?,
            Command::Snapshot(of) => self.snapshot(&of, vcpus)?,
            Command::Stop => {
                self.main.answer(client, &Reply::Done);
                return Ok(Some(End::Over(Outcome::Commanded)));
            }
            // The reply follows after the reset.
            Command::Reset => return Ok(Some(End::Reset(Some(client)))),
            Command::Stats => self.stats(vcpus)?,
            Command::Report => self.report_to_client(vcpus)?,
            Command::DumpDtb => Reply::DeviceTree(Hex(self.machine.device_tree().to_vec())),
        };
        self.main.answer(client, &reply);
        Ok(None)
    }

    /// Stops vCPUs, then devices. Signals act meanwhile: a device may wait for the host's disk.
    pub(super) fn pause(&mut self, vcpus: &mut Vcpus) -> Result<Reply> {
        if vcpus.state() == State::Running {
            vcpus.park(&mut self.main)?;
            vcpus.freeze()?;
            self.count_time(State::Running);
            self.pause_devices()?;
            debug!("the guest is paused");
        }
        Ok(Reply::Done)
    }

    /// Pauses the devices. No vCPU may run.
    pub(super) fn pause_devices(&mut self) -> Result<()> {
        let devices = &self.machine.hardware()?.devices;
        self.main.while_serving(|| devices.pause())
    }

    /// Calls `look` while the vCPUs are parked, and then lets them run again if they ran before.
    /// The inner result is that of [`Vcpus::start`]: if they cannot be started, the machine is
    /// paused.
    pub(super) fn while_parked<T>(
        &mut self,
        vcpus: &mut Vcpus,
        look: impl FnOnce(&mut Self, &Vcpus) -> Result<T>,
    ) -> Result<hypervisor::Result<T>> {
        let state = vcpus.state();
        vcpus.park(&mut self.main)?;
        let seen = look(self, vcpus)?;
        if state == State::Running {
            if let Err(error) = vcpus.start(self.machine.hardware()?, &self.post) {
                self.count_time(State::Running);
                self.pause_devices()?;
                return Ok(Err(error));
            }
        }
        Ok(Ok(seen))
    }

    fn resume(&mut self, vcpus: &mut Vcpus, clock: Clock) -> Result<Reply> {
        let reply = self.go_on(vcpus, clock)?;
        Ok(reply.map_or_else(stays_paused, |()| Reply::Done))
    }

    /// Resumes a paused machine. Does nothing if it runs. The inner result is that of
    /// [`Vcpus::resume`].
    ///
    /// # Errors
    /// Fails if the machine is powered off.
    pub(super) fn go_on(
        &mut self,
        vcpus: &mut Vcpus,
        clock: Clock,
    ) -> Result<hypervisor::Result<()>> {
        if vcpus.state() == State::Running {
            return Ok(Ok(()));
        }
        let resumed = vcpus.resume(self.machine.hardware()?, &self.post, clock);
        if resumed.is_ok() {
            self.count_time(State::Paused);
            debug!("the guest is resumed");
        }
        Ok(resumed)
    }

    /// Counts the time since the last call: in it the guest was in `state`.
    pub(super) fn count_time(&mut self, state: State) {
        if let Some(stats) = &mut self.stats {
            stats.guest_was(state);
        }
    }

    fn status(&mut self, vcpus: &Vcpus) -> Result<Status> {
        let devices = self.machine.hardware()?.devices.describe();
        let config = &self.machine.config;
        Ok(Status {
            state: vcpus.state(),
            vcpus: config.cpus,
            ram: config.mem.size.bytes(),
            resets: self.resets,
            devices,
        })
    }

    /// Returns the statistics so far. Refused without `--stats`.
    fn stats(&mut self, vcpus: &mut Vcpus) -> Result<Reply> {
        let Some(mut stats) = self.stats.clone() else {
            let reason = "this machine has no statistics: start it with --stats";
            return Ok(Reply::Refused(reason.into()));
        };
        // Each vCPU counts on its own thread, so park the vCPUs to read their statistics.
        let state = vcpus.state();
        let added = self.while_parked(vcpus, |running, vcpus| {
            let hardware = running.machine.hardware()?;
            stats.guest_was(state);
            stats.add(vcpus.counted(), |gpa| hardware.registers_at(gpa));
            Ok(Reply::Stats(stats.json()))
        })?;
        Ok(added.unwrap_or_else(stays_paused))
    }
}

/// The reply if vCPUs cannot be started.
pub(super) fn stays_paused(error: hypervisor::Error) -> Reply {
    let error = anyhow::Error::from(error);
    let reason = format!("the guest stays paused, because it cannot be resumed now: {error:#}");
    warn!("{reason}");
    Reply::Refused(reason)
}
