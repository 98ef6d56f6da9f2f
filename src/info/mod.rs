//! `rvmm info`: what this host offers guests, asked of KVM on machines made for the question.

mod probe;
mod text;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use serde::Serialize;

use crate::boot::isa::HartFacts;
use crate::hypervisor::host::{kernel_release, legacy_sbi_is_safe};
use crate::hypervisor::{Hypervisor, RegId, Vcpu, extensions, regs};
use crate::irqchip::aia::InKernelAia;
use crate::machine::{harts, layout};
use crate::util::ByteSize;

/// All of it. The text is for people, the JSON for scripts.
#[derive(Debug, Serialize)]
pub struct Info {
    /// This rvmm.
    rvmm: &'static str,
    /// The host kernel's release.
    kernel: String,
    /// KVM's capabilities by name, 0 where it has none.
    kvm: BTreeMap<&'static str, i32>,
    /// Bits of a guest-physical address.
    gpa_bits: u32,
    /// The G-stage's page tables.
    g_stage: &'static str,
    /// The most vCPUs of one guest.
    max_vcpus: u32,
    /// The AIA in the kernel, if there is one.
    aia: Option<AiaInfo>,
    /// What a guest's hart has.
    hart: HartInfo,
    /// SBI extensions.
    sbi: Vec<ExtensionInfo>,
    /// A legacy console call reaches rvmm; elsewhere such guests need DBCN or the UART.
    legacy_sbi_console: bool,
    /// Huge pages.
    hugepages: HugePageInfo,
    /// Bugs of this host's kernel that rvmm looked for.
    bugs: Vec<Bug>,
}

/// The in-kernel AIA.
#[derive(Debug, Serialize)]
struct AiaInfo {
    /// The host has guest interrupt files (mode AUTO), so that MSIs need no exit.
    guest_files: bool,
    /// Interrupt identities of a guest's IMSIC.
    identities: u32,
}

/// A guest's hart.
#[derive(Debug, Serialize)]
struct HartInfo {
    /// As a device tree has it.
    isa: String,
    /// The largest page tables of the guest's own.
    mmu: &'static str,
    /// Ticks a second of the `time` CSR.
    timebase: u64,
    /// ISA extensions.
    extensions: Vec<ExtensionInfo>,
}

/// An extension that a guest can have.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct ExtensionInfo {
    /// As --cpu and --sbi name it.
    name: &'static str,
    /// On in a machine of rvmm's, unless it is asked for otherwise.
    on: bool,
    /// KVM can switch it off.
    can_be_off: bool,
}

/// Huge pages for guest RAM.
#[derive(Debug, Default, Serialize)]
struct HugePageInfo {
    /// Transparent ones: "always", "madvise" or "never"; none without the kernel's support.
    transparent: Option<String>,
    /// Reserved ones.
    reserved: Vec<Pool>,
}

/// Reserved huge pages of one size.
#[derive(Debug, Serialize)]
struct Pool {
    /// Bytes of a page.
    size: ByteSize,
    /// Pages.
    total: u64,
    /// Those that nobody has.
    free: u64,
}

/// A bug that was looked for.
#[derive(Debug, Serialize)]
struct Bug {
    /// A short name.
    name: &'static str,
    /// It was found; none where it could not be looked for.
    present: Option<bool>,
    /// What it does, and what rvmm does about it.
    meaning: &'static str,
}

impl Info {
    /// Asks this host.
    ///
    /// # Errors
    /// KVM refused what every machine needs.
    pub fn gather(hypervisor: &dyn Hypervisor) -> Result<Self> {
        let vm = hypervisor.create_vm()?;
        let gpa_bits = vm.gpa_bits();
        let max_vcpus = vm.max_vcpus().min(layout::MAX_HARTS);
        let vcpu = vm.create_vcpu(0)?;
        let facts = HartFacts::of(vcpu.as_ref())?;
        let scounteren = vcpu.reg(regs::SCOUNTEREN)?;
        let hart = HartInfo {
            isa: facts.isa_string(),
            mmu: facts.mmu_type(),
            timebase: facts.timebase,
            extensions: isa(vcpu.as_ref(), &facts)?,
        };
        let sbi = sbi(vcpu.as_ref())?;
        drop((vcpu, vm));
        let (aia, lossy) = aia(hypervisor)?;
        let probed = probe::run(hypervisor)?;
        let kernel = kernel_release();
        let legacy_console = probed.legacy_console && legacy_sbi_is_safe(&kernel);
        Ok(Self {
            rvmm: env!("CARGO_PKG_VERSION"),
            kernel,
            kvm: hypervisor.capabilities().into_iter().collect(),
            gpa_bits,
            g_stage: g_stage(gpa_bits),
            max_vcpus,
            aia,
            hart,
            sbi,
            legacy_sbi_console: legacy_console,
            hugepages: hugepages(Path::new("/sys/kernel/mm")),
            bugs: bugs(&Found {
                lossy,
                legacy_unsafe: probed.legacy_console && !legacy_console,
                sign_extends: probed.sign_extends,
                loses_illegal: probed.loses_illegal,
                scounteren,
            }),
        })
    }
}

/// What the bugs are told by.
struct Found {
    lossy: Option<bool>,
    legacy_unsafe: bool,
    sign_extends: bool,
    loses_illegal: bool,
    scounteren: Option<u64>,
}

fn bugs(found: &Found) -> Vec<Bug> {
    let bug = |name, present, meaning| Bug {
        name,
        present,
        meaning,
    };
    vec![
        bug(
            "imsic-upper-half",
            found.lossy,
            "an emulated IMSIC loses the upper half of every 64 identities; rvmm offers guests what \
             needs at most 31",
        ),
        bug(
            "mmio-zero-extends",
            Some(!found.sign_extends),
            "lb, lh and lw from a device do not extend the sign; guests that rely on it misread",
        ),
        bug(
            "legacy-ipi",
            Some(found.legacy_unsafe),
            "a guest's legacy SBI call can crash this kernel; rvmm keeps those calls off",
        ),
        bug(
            "lost-illegal",
            Some(found.loses_illegal),
            "an instruction that is illegal on this host, or a vector instruction while vector is off, \
             loses the hart that runs it; emulated hosts do so",
        ),
        bug(
            "scounteren-zero",
            found.scounteren.map(|value| value == 0),
            "a hart starts and resumes with scounteren 0, so that processes may not read time; rvmm \
             sets it",
        ),
    ]
}

/// The G-stage mode that gives so many bits (The RISC-V Instruction Set Manual, volume II,
/// "Two-Stage Address Translation").
fn g_stage(gpa_bits: u32) -> &'static str {
    match gpa_bits {
        41 => "Sv39x4",
        50 => "Sv48x4",
        59 => "Sv57x4",
        _ => "unknown",
    }
}

fn isa(vcpu: &dyn Vcpu, facts: &HartFacts) -> Result<Vec<ExtensionInfo>> {
    let register = extensions::isa_register;
    let names = facts.extensions.iter();
    let infos = names.filter_map(|name| Some((*name, register(name)?)));
    infos
        .map(|(name, register)| {
            Ok(ExtensionInfo {
                name,
                on: true,
                can_be_off: can_be_off(vcpu, register)?,
            })
        })
        .collect()
}

fn sbi(vcpu: &dyn Vcpu) -> Result<Vec<ExtensionInfo>> {
    let mut infos = Vec::new();
    let choices = harts::sbi_choices();
    for name in extensions::SBI {
        let Some(register) = extensions::sbi_register(name) else {
            continue;
        };
        let Some(value) = vcpu.reg(register)? else {
            continue;
        };
        let choice = choices.iter().find(|(chosen, _)| *chosen == register);
        infos.push(ExtensionInfo {
            name,
            on: choice.map_or(value == 1, |(_, on)| *on),
            can_be_off: can_be_off(vcpu, register)?,
        });
    }
    Ok(infos)
}

/// Tries it, on a vCPU that never runs, and puts back what was there.
fn can_be_off(vcpu: &dyn Vcpu, register: RegId) -> Result<bool> {
    let before = vcpu.reg(register)?.unwrap_or(0);
    let off = vcpu.set_reg(register, 0).is_ok();
    if off {
        vcpu.set_reg(register, before)?;
    }
    Ok(off)
}

/// What the AIA is, and whether it loses identities.
fn aia(hypervisor: &dyn Hypervisor) -> Result<(Option<AiaInfo>, Option<bool>)> {
    let vm = hypervisor.create_vm()?;
    let Some(device) = vm.create_aia()? else {
        return Ok((None, None));
    };
    let _vcpu = vm.create_vcpu(0)?;
    let aia = InKernelAia::start(Arc::clone(&vm), device, layout::AIA, 1, false)?;
    let info = AiaInfo {
        guest_files: aia.has_guest_files(),
        identities: aia.identities(),
    };
    Ok((Some(info), Some(aia.is_lossy())))
}

fn hugepages(mm: &Path) -> HugePageInfo {
    let read = |path: &Path| fs::read_to_string(path).ok();
    let transparent = read(&mm.join("transparent_hugepage/enabled")).and_then(|text| {
        let chosen = text.split_whitespace().find(|word| word.starts_with('['))?;
        Some(chosen.trim_matches(['[', ']']).to_owned())
    });
    let mut reserved = Vec::new();
    for entry in fs::read_dir(mm.join("hugepages"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let number = |file: &str| read(&entry.path().join(file))?.trim().parse::<u64>().ok();
        let name = entry.file_name();
        let kib = name.to_str().and_then(|name| {
            let size = name.strip_prefix("hugepages-")?.strip_suffix("kB")?;
            size.parse().ok()
        });
        if let (Some(kib), Some(total), Some(free)) =
            (kib, number("nr_hugepages"), number("free_hugepages"))
        {
            let size = ByteSize::kib(kib);
            reserved.push(Pool { size, total, free });
        }
    }
    reserved.sort_by_key(|pool| pool.size);
    HugePageInfo {
        transparent,
        reserved,
    }
}

#[cfg(test)]
mod tests;
