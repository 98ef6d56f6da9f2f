//! Creates the machine's vCPUs as configured, and collects their features for the device tree.

use anyhow::{Context, Error, Result, bail};

use super::layout::MAX_HARTS;
use crate::boot::isa::HartFacts;
use crate::config::{Hex, IsaSwitch, VmConfig};
use crate::hypervisor::host::{kernel_release, legacy_sbi_is_safe};
use crate::hypervisor::{RegId, Vcpu, Vm, extensions, regs};
use crate::util::{RateLimit, guest_warn};

/// Checks the parts of the configuration that do not depend on the host: the number of harts, and
/// the names of extensions.
///
/// # Errors
/// Returns a message of one line that names the wrong flag.
pub(crate) fn check(config: &VmConfig) -> Result<(), String> {
    if config.cpus > MAX_HARTS {
        let cpus = config.cpus;
        return Err(format!(
            "--cpus {cpus}: a machine has at most {MAX_HARTS} harts"
        ));
    }
    let isa = config.cpu.iter().flat_map(|cpu| cpu.extensions.keys());
    isa.into_iter()
        .try_for_each(|name| isa_switch(name).map(drop))?;
    let sbi = config.sbi.iter().flat_map(|sbi| sbi.extensions.keys());
    sbi.into_iter()
        .try_for_each(|name| sbi_switch(name).map(drop))
}

/// The register that turns the ISA extension `name` on or off.
fn isa_switch(name: &str) -> Result<RegId, String> {
    extensions::isa_register(name).ok_or_else(|| {
        format!("--cpu {name}: KVM has no such ISA extension; rvmm info lists those of this host")
    })
}

/// The register that turns the SBI extension `name` on or off.
fn sbi_switch(name: &str) -> Result<RegId, String> {
    extensions::sbi_register(name).ok_or_else(|| {
        format!("--sbi {name}: KVM has no such SBI extension; rvmm info lists those of this host")
    })
}

/// Creates the vCPUs, for harts 0 and up, and turns extensions on or off. This must be done before
/// a vCPU runs: KVM refuses it later.
pub(super) fn create(config: &VmConfig, vm: &dyn Vm) -> Result<Vec<Box<dyn Vcpu>>> {
    check(config).map_err(Error::msg)?;
    let max = vm.max_vcpus();
    if config.cpus > max {
        bail!(
            "--cpus {}: this host's KVM runs at most {max} vCPUs",
            config.cpus
        );
    }
    let sbi = sbi_choices();
    let mut vcpus = Vec::new();
    for id in 0..config.cpus {
        let vcpu = vm.create_vcpu(id)?;
        choose_sbi(vcpu.as_ref(), &sbi)?;
        switch_off(config, vcpu.as_ref())?;
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// The SBI extensions that rvmm turns on or off, whatever KVM's default. On are those that rvmm
/// handles. Off are those that rvmm does not handle, or that are unsafe on this host. `--sbi` is
/// applied after this.
pub(crate) fn sbi_choices() -> [(RegId, bool); 5] {
    [
        (regs::SBI_DBCN, true),
        (regs::SBI_SUSP, true),
        (regs::SBI_V01, legacy_sbi_is_safe(&kernel_release())),
        (regs::SBI_EXPERIMENTAL, false),
        (regs::SBI_VENDOR, false),
    ]
}

/// Turns SBI extensions on or off by `choices`. Skips extensions that the host lacks.
fn choose_sbi(vcpu: &dyn Vcpu, choices: &[(RegId, bool)]) -> Result<()> {
    for &(register, on) in choices {
        match vcpu.reg(register)? {
            Some(_) => vcpu.set_reg(register, on.into())?,
            None if register == regs::SBI_DBCN => {
                let limit = RateLimit::named("no DBCN");
                guest_warn!(limit, "this host's KVM has no SBI debug console");
            }
            None => {}
        }
    }
    Ok(())
}

/// Turns off the extensions that `--cpu` and `--sbi` name, if the host has them, and sets the ids
/// that `--cpu` gives.
fn switch_off(config: &VmConfig, vcpu: &dyn Vcpu) -> Result<()> {
    if let Some(cpu) = &config.cpu {
        for (name, switch) in &cpu.extensions {
            let register = isa_switch(name).map_err(Error::msg)?;
            if *switch == IsaSwitch::Off && vcpu.reg(register)? == Some(1) {
                vcpu.set_reg(register, 0).with_context(|| {
                    format!(
                        "--cpu {name}=off: this host's KVM cannot turn it off; {name}=hidden \
                         removes it from the device tree only"
                    )
                })?;
            }
        }
        for (register, id) in [
            (regs::MVENDORID, cpu.mvendorid),
            (regs::MARCHID, cpu.marchid),
            (regs::MIMPID, cpu.mimpid),
        ] {
            if let Some(Hex(id)) = id {
                vcpu.set_reg(register, id)?;
            }
        }
    }
    for name in config.sbi.iter().flat_map(|sbi| sbi.extensions.keys()) {
        let register = sbi_switch(name).map_err(Error::msg)?;
        if vcpu.reg(register)? == Some(1) {
            vcpu.set_reg(register, 0)
                .with_context(|| format!("--sbi {name}=off: this host's KVM cannot turn it off"))?;
        }
    }
    Ok(())
}

/// The features that the device tree shows. Without an AIA in this machine, they do not include
/// Ssaia.
pub(super) fn facts(config: &VmConfig, vcpus: &[Box<dyn Vcpu>], is_aia: bool) -> Result<HartFacts> {
    let mut facts = HartFacts::of(first(vcpus)?)?;
    if !is_aia {
        facts.hide("ssaia");
    }
    hidden(config).for_each(|name| facts.hide(name));
    Ok(facts)
}

/// Checks that a guest that has an AIA, if `is_aia`, can use it.
pub(super) fn check_for_aia(config: &VmConfig, is_aia: bool) -> Result<()> {
    // A guest uses the IMSIC only if it sees Ssaia.
    if is_aia && hidden(config).any(|name| name == "ssaia") {
        bail!("--cpu ssaia: the guest needs it to use the AIA: add --irqchip plic");
    }
    Ok(())
}

/// The extensions that the user has turned off.
fn hidden(config: &VmConfig) -> impl Iterator<Item = &str> {
    let extensions = config.cpu.iter().flat_map(|cpu| cpu.extensions.keys());
    extensions.map(String::as_str)
}

/// The vCPU of the boot hart.
pub(super) fn first(vcpus: &[Box<dyn Vcpu>]) -> Result<&dyn Vcpu> {
    let vcpu = vcpus.first().context("a machine needs a vCPU")?;
    Ok(vcpu.as_ref())
}
