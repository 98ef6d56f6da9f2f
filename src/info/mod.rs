//! `rvmm info`: reports what this host offers guests. It asks KVM, with VMs that it creates only
//! for this.

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

/// The report. It can be printed as text for people, or as JSON for scripts.
#[derive(Debug, Serialize)]
pub struct Info {
    /// Version of this rvmm.
    rvmm: &'static str,
    /// The host kernel's release.
    kernel: String,
    /// KVM's capabilities by name. 0 means that KVM lacks it.
    kvm: BTreeMap<&'static str, i32>,
    /// Width of a guest-physical address in bits.
    gpa_bits: u32,
    /// Mode of the G-stage page tables.
    g_stage: &'static str,
    /// The most vCPUs that a guest can have.
    max_vcpus: u32,
    /// The in-kernel AIA, if there is one.
    aia: Option<AiaInfo>,
    /// Features of a guest's hart.
    hart: HartInfo,
    /// SBI extensions.
    sbi: Vec<ExtensionInfo>,
    /// Whether legacy SBI console calls reach rvmm. If not, guests need DBCN or the UART.
    legacy_sbi_console: bool,
    /// Huge pages of the host.
    hugepages: HugePageInfo,
    /// Known bugs of KVM, and whether this host has them.
    bugs: Vec<Bug>,
}

/// The in-kernel AIA.
#[derive(Debug, Serialize)]
struct AiaInfo {
    /// Whether the host has guest interrupt files (mode AUTO). With them, MSIs need no exit.
    guest_files: bool,
    /// Number of interrupt identities of a guest's IMSIC.
    identities: u32,
}

/// A guest's hart.
#[derive(Debug, Serialize)]
struct HartInfo {
    /// The ISA string, as `riscv,isa` in a device tree.
    isa: String,
    /// The largest page table mode of the guest, as `mmu-type` in a device tree.
    mmu: &'static str,
    /// Frequency of the `time` CSR, in Hz.
    timebase: u64,
    /// ISA extensions.
    extensions: Vec<ExtensionInfo>,
}

/// An extension that a guest can have.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct ExtensionInfo {
    /// Name, as for --cpu and --sbi.
    name: &'static str,
    /// Whether it is on by default in a guest of rvmm.
    on: bool,
    /// Whether KVM can turn it off.
    can_be_off: bool,
}

/// Huge pages for guest RAM.
#[derive(Debug, Default, Serialize)]
struct HugePageInfo {
    /// Setting of transparent huge pages: "always", "madvise" or "never". None if the kernel does
    /// not support them.
    transparent: Option<String>,
    /// Pools of reserved huge pages.
    reserved: Vec<Pool>,
}

/// Reserved huge pages of one size.
#[derive(Debug, Serialize)]
struct Pool {
    /// Size of a page in bytes.
    size: ByteSize,
    /// Number of pages.
    total: u64,
    /// Number of free pages.
    free: u64,
}

/// A known bug of KVM.
#[derive(Debug, Serialize)]
struct Bug {
    /// A short name.
    name: &'static str,
    /// Whether this host has the bug. None if the bug cannot occur here.
    present: Option<bool>,
    /// The effect of the bug, and what rvmm does about it.
    meaning: &'static str,
}

impl Info {
    /// Collects the report from this host.
    ///
    /// # Errors
    /// Fails if a call to KVM fails, or if the probe does not run to its end.
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

/// Test results from which the list of bugs is made.
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
            "the emulated IMSIC loses the upper half of every 64 identities; rvmm needs at most 31 \
             of them",
        ),
        bug(
            "mmio-zero-extends",
            Some(!found.sign_extends),
            "lb, lh and lw from a device do not sign-extend; guests that rely on it read wrong \
             values",
        ),
        bug(
            "legacy-ipi",
            Some(found.legacy_unsafe),
            "a guest's legacy SBI call can crash this kernel; rvmm disables these calls",
        ),
        bug(
            "lost-illegal",
            Some(found.loses_illegal),
            "the host's firmware loses the trap of an illegal instruction, or of a vector \
             instruction while vector is off, and the hart cannot go on; seen on emulated hosts",
        ),
        bug(
            "scounteren-zero",
            found.scounteren.map(|value| value == 0),
            "a hart starts and resumes with scounteren 0, so that processes cannot read time; rvmm \
             sets it",
        ),
    ]
}

/// The G-stage mode with guest-physical addresses of `gpa_bits` bits (The RISC-V Instruction Set
/// Manual, volume II, "Two-Stage Address Translation").
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

/// Whether KVM can turn off the extension of `register`. Tries it on a vCPU that never runs, and
/// restores the old value.
fn can_be_off(vcpu: &dyn Vcpu, register: RegId) -> Result<bool> {
    let before = vcpu.reg(register)?.unwrap_or(0);
    let off = vcpu.set_reg(register, 0).is_ok();
    if off {
        vcpu.set_reg(register, before)?;
    }
    Ok(off)
}

/// The features of the AIA, and whether it loses identities.
fn aia(hypervisor: &dyn Hypervisor) -> Result<(Option<AiaInfo>, Option<bool>)> {
    let vm = hypervisor.create_vm()?;
    let Some(device) = vm.create_aia()? else {
        return Ok((None, None));
    };
    let _vcpu = vm.create_vcpu(0)?;
    let aia = InKernelAia::start(Arc::clone(&vm), device, layout::AIA, 1, false, None)?;
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
