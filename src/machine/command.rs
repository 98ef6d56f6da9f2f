//! Carries out the commands of the control socket.

use anyhow::{Error, Result};
use log::{debug, warn};

use super::life::Vcpus;
use super::{End, Outcome, Running};
use crate::control::server::Client;
use crate::control::{Command, Hex, Reply, State, Status};

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
            Command::Pause => self.pause(vcpus)?,
            Command::Resume => self.resume(vcpus)?,
            Command::Stop => {
                self.main.answer(client, &Reply::Done);
                return Ok(Some(End::Over(Outcome::Commanded)));
            }
            // The reply follows after the reset.
            Command::Reset => return Ok(Some(End::Reset(Some(client)))),
            Command::Stats => self.stats(vcpus)?,
            Command::DumpDtb => Reply::DeviceTree(Hex(self.machine.device_tree().to_vec())),
        };
        self.main.answer(client, &reply);
        Ok(None)
    }

    fn pause(&mut self, vcpus: &mut Vcpus) -> Result<Reply> {
        if vcpus.state() == State::Running {
            vcpus.pause(self.machine.hardware()?, &mut self.main)?;
            self.count_time(State::Running);
            debug!("the guest is paused");
        }
        Ok(Reply::Done)
    }

    fn resume(&mut self, vcpus: &mut Vcpus) -> Result<Reply> {
        match self.go_on(vcpus) {
            Ok(()) => Ok(Reply::Done),
            Err(error) => Ok(stays_paused(&error)),
        }
    }

    /// Resumes a paused machine. Does nothing if it runs.
    ///
    /// # Errors
    /// As [`Vcpus::resume`].
    pub(super) fn go_on(&mut self, vcpus: &mut Vcpus) -> Result<()> {
        if vcpus.state() == State::Paused {
            vcpus.resume(self.machine.hardware()?, &self.post, &mut self.main)?;
            self.count_time(State::Paused);
            debug!("the guest is resumed");
        }
        Ok(())
    }

    fn count_time(&mut self, state: State) {
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
        vcpus.park(&mut self.main)?;
        let hardware = self.machine.hardware()?;
        stats.guest_was(state);
        stats.add(vcpus.counted(), |gpa| hardware.registers_at(gpa));
        if state == State::Running {
            if let Err(error) = vcpus.start(hardware, &self.post) {
                self.main.while_serving(|| hardware.devices.pause())?;
                self.count_time(State::Running);
                return Ok(stays_paused(&error));
            }
        }
        Ok(Reply::Stats(stats.json()))
    }
}

/// The reply if vCPUs cannot be started.
fn stays_paused(error: &Error) -> Reply {
    let reason = format!("the guest stays paused, because it cannot be resumed now: {error:#}");
    warn!("{reason}");
    Reply::Refused(reason)
}
