//! What rvmm does when a guest cannot go on: it reports why, and acts by `--on-crash`.

use anyhow::Result;
use log::warn;

use super::command::stays_paused;
use super::life::Vcpus;
use super::watcher::Hang;
use super::{End, Outcome, Running, status};
use crate::config::CrashAct;
use crate::control::{Reply, State};
use crate::hypervisor;
use crate::report::Report;
use crate::util::stderr::print_lines;
use crate::util::{RateLimit, guest_warn};
use crate::vcpu::Stop;
use crate::vcpu::hart::Hart;

/// Reports in five seconds. A guest that crashes after each reset causes many.
const REPORTS: u32 = 3;

const PAUSED: &str = "the guest is paused: rvmm ctl PATH reset, and then resume, starts it again";

/// Harts that a report explains. The others only have their position.
const EXPLAINED: usize = 8;

impl Running<'_> {
    /// Handles the end of hart `hart`, because of `stop`. Returns how this life ends. None if the
    /// machine is paused instead.
    ///
    /// # Errors
    /// Fails if the host fails, so that the machine cannot go on.
    pub(super) fn stopped(
        &mut self,
        hart: u32,
        stop: Stop,
        vcpus: &mut Vcpus,
    ) -> Result<Option<End>> {
        if stop == Stop::Breakpoint && self.debug.is_some() {
            self.at_breakpoint(hart, vcpus)?;
            return Ok(None);
        }
        let outcome = Outcome::Guest(stop);
        if stop == Stop::Reset && self.how.reboot {
            return Ok(Some(End::Reset(None)));
        }
        if outcome.exit_status() != status::CANNOT_GO_ON {
            return Ok(Some(End::Over(outcome)));
        }
        vcpus.park(&mut self.main)?;
        if may_report() {
            print_lines(&self.report(vcpus, Some(hart))?);
        }
        if self.crash_to_gdb(hart, vcpus)? {
            guest_warn!(RateLimit::named("crashes"), "{stop}");
            return Ok(None);
        }
        let act = self.machine.config.on_crash.act;
        if act != CrashAct::Report {
            guest_warn!(RateLimit::named("crashes"), "{stop}");
        }
        match act {
            // The caller prints the reason.
            CrashAct::Report => Ok(Some(End::Over(outcome))),
            CrashAct::Reset => Ok(Some(End::Reset(None))),
            CrashAct::Pause => {
                self.count_time(State::Running);
                self.pause_devices()?;
                warn!("{PAUSED}");
                Ok(None)
            }
        }
    }

    /// Reports that hart `hart` gets nowhere. Returns how this life ends; None if the guest runs on
    /// or is paused.
    ///
    /// # Errors
    /// As [`Running::stopped`].
    pub(super) fn hangs(
        &mut self,
        hart: u32,
        hang: Hang,
        vcpus: &mut Vcpus,
    ) -> Result<Option<End>> {
        guest_warn!(
            RateLimit::named("hangs"),
            "hart {hart} gets nowhere: {hang}"
        );
        if may_report() {
            let report =
                self.while_parked(vcpus, |running, vcpus| running.report(vcpus, Some(hart)))?;
            match report {
                Ok(report) => print_lines(&report),
                Err(error) => drop(stays_paused(error)),
            }
        }
        let act = self.machine.config.on_crash.act;
        if act != CrashAct::Report && self.crash_to_gdb(hart, vcpus)? {
            // GDB's user looks at it.
            return Ok(None);
        }
        match act {
            CrashAct::Report => {}
            CrashAct::Reset => return Ok(Some(End::Reset(None))),
            CrashAct::Pause => {
                self.pause(vcpus)?;
                warn!("{PAUSED}");
            }
        }
        Ok(None)
    }

    /// The command `report`: what all harts are doing.
    pub(super) fn report_to_client(&mut self, vcpus: &mut Vcpus) -> Result<Reply> {
        let report = self.while_parked(vcpus, |running, vcpus| running.report(vcpus, None))?;
        Ok(report.map_or_else(stays_paused, Reply::Report))
    }

    /// Ctrl-A R: prints what all harts are doing.
    pub(super) fn report_to_user(&mut self, vcpus: &mut Vcpus) -> Result<()> {
        let report = self.while_parked(vcpus, |running, vcpus| running.report(vcpus, None))?;
        match report {
            Ok(report) => print_lines(&format!("\n{report}")),
            // This warns.
            Err(error) => drop(stays_paused(error)),
        }
        Ok(())
    }

    /// The report on the harts of `vcpus`, which must be parked: on hart `only`, or on all of them.
    fn report(&self, vcpus: &Vcpus, only: Option<u32>) -> Result<String> {
        let harts: hypervisor::Result<Vec<Hart>> = (0..)
            .zip(vcpus.parked())
            .map(|(number, parked)| Hart::read(number, parked.vcpu.as_ref()))
            .collect();
        let harts = harts?;
        let mut text = String::new();
        let mut symbols = self.machine.symbols().unwrap_or_else(|error| {
            text += &format!("no symbols: {error:#}\n");
            None
        });
        if let Some(symbols) = &mut symbols {
            harts.iter().for_each(|hart| symbols.follow(hart.stvec));
        }
        let (ram, hardware) = (self.machine.ram(), self.machine.hardware()?);
        let place = |physical| hardware.place(ram, physical);
        let shown = harts
            .iter()
            .filter(|hart| only.is_none_or(|only| hart.number == only));
        for (index, hart) in shown.enumerate() {
            let report = Report {
                hart,
                ram,
                symbols: symbols.as_ref(),
                place: &place,
            };
            text += &match index < EXPLAINED {
                true => report.to_string(),
                false => report.heading(),
            };
        }
        Ok(text)
    }
}

/// Whether there were not too many reports lately.
fn may_report() -> bool {
    let limit = RateLimit::with_burst("crash reports", REPORTS);
    limit.admit().is_some()
}
