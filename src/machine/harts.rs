//! The machine's vCPUs, as the configuration wants them, and what the guest is told of them.

use anyhow::{Context, Error, Result, bail};

use super::irqchip::Choice;
use super::layout::MAX_HARTS;
use crate::boot::isa::HartFacts;
use crate::config::{Hex, IsaSwitch, VmConfig};
use crate::hypervisor::host::{kernel_release, legacy_sbi_is_safe};
use crate::hypervisor::{RegId, Vcpu, Vm, extensions, regs};
use crate::util::{RateLimit, guest_warn};

/// Checks what no host changes: the number of harts, and the names of extensions.
///
/// # Errors
/// One line that names the flag.
pub(crate) fn check(config: &VmConfig) -> Result<(), String> {
    if config.cpus > MAX_HARTS {
        let cpus = config.cpus;
        return Err(format!(
            "--cpus {cpus}: rvmm's machine has room for {MAX_HARTS} harts"
        ));
    }
    let isa = config.cpu.iter().flat_map(|cpu| cpu.extensions.keys());
    isa.into_iter()
        .try_for_each(|name| isa_switch(name).map(drop))?;
    let sbi = config.sbi.iter().flat_map(|sbi| sbi.extensions.keys());
    sbi.into_iter()
        .try_for_each(|name| sbi_switch(name).map(drop))
}

/// The register that switches the ISA extension `name`.
fn isa_switch(name: &str) -> Result<RegId, String> {
    extensions::isa_register(name).ok_or_else(|| {
        format!("--cpu {name}: KVM has no such ISA extension; rvmm info lists this host's")
    })
}

/// The register that switches the SBI extension `name`.
fn sbi_switch(name: &str) -> Result<RegId, String> {
    extensions::sbi_register(name).ok_or_else(|| {
        format!("--sbi {name}: KVM has no such SBI extension; rvmm info lists this host's")
    })
}

/// Creates the vCPUs of harts 0 and up, and sets which SBI extensions reach userspace. This comes
/// before the first run: later KVM refuses.
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

/// The SBI extensions that rvmm switches on or off, whatever KVM's default: on, what rvmm serves;
/// off, what nothing here serves or the host serves badly. `--sbi` comes after this.
pub(crate) fn sbi_choices() -> [(RegId, bool); 5] {
    [
        (regs::SBI_DBCN, true),
        (regs::SBI_SUSP, true),
        (regs::SBI_V01, legacy_sbi_is_safe(&kernel_release())),
        (regs::SBI_EXPERIMENTAL, false),
        (regs::SBI_VENDOR, false),
    ]
}

/// Sets what `choices` says. A host without an extension has no such register.
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

/// Takes away what `--cpu` and `--sbi` name. What the host does not have is away already.
fn switch_off(config: &VmConfig, vcpu: &dyn Vcpu) -> Result<()> {
    if let Some(cpu) = &config.cpu {
        for (name, switch) in &cpu.extensions {
            let register = isa_switch(name).map_err(Error::msg)?;
            if *switch == IsaSwitch::Off && vcpu.reg(register)? == Some(1) {
                vcpu.set_reg(register, 0).with_context(|| {
                    format!(
                        "--cpu {name}=off: this host's KVM cannot switch it off; {name}=hidden \
                         keeps it from the device tree only"
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
            vcpu.set_reg(register, 0).with_context(|| {
                format!("--sbi {name}=off: this host's KVM cannot switch it off")
            })?;
        }
    }
    Ok(())
}

/// What the guest is told of its harts; of the AIA only where it has one.
pub(super) fn facts(
    config: &VmConfig,
    vcpus: &[Box<dyn Vcpu>],
    choice: &Choice,
) -> Result<HartFacts> {
    let mut facts = HartFacts::of(first(vcpus)?)?;
    if !choice.is_aia() {
        facts.hide("ssaia");
    }
    for name in config.cpu.iter().flat_map(|cpu| cpu.extensions.keys()) {
        // By it a guest knows that its interrupts are an IMSIC's.
        if name == "ssaia" && choice.is_aia() {
            bail!("--cpu {name}: the guest needs it to find its AIA: give --irqchip plic too");
        }
        facts.hide(name);
    }
    Ok(facts)
}

/// The hart that boots.
pub(super) fn first(vcpus: &[Box<dyn Vcpu>]) -> Result<&dyn Vcpu> {
    let vcpu = vcpus.first().context("a machine needs a vCPU")?;
    Ok(vcpu.as_ref())
}
