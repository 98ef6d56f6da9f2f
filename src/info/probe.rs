//! Tests of the host that need a running guest: a few instructions, in a VM with one page of RAM.

use anyhow::{Context, Result, bail};
use vm_memory::{Bytes, GuestAddress};

use crate::config::MemConfig;
use crate::hypervisor::{Hypervisor, SbiRet, VmEntry, VmExit, regs};
use crate::machine::layout::RAM_BASE;
use crate::memory;
use crate::util::ByteSize;

/// The probe's code. Address 0 is outside RAM, so an access there is an exit.
///
/// ```text
/// addi a7, zero, 1      legacy putchar
/// addi a0, zero, 0
/// ecall
/// lb   t0, 0(zero)      rvmm returns 0x80
/// sd   t0, 0(zero)      reports whether it was sign-extended
/// auipc t1, 0
/// addi t1, t1, 16
/// csrw stvec, t1        traps go to the csrr below
/// (0)                   an illegal instruction
/// csrr t0, scause
/// sd   t0, 0(zero)      reports the cause of the trap
/// ```
const CODE: [u32; 11] = [
    0x0010_0893,
    0x0000_0513,
    0x0000_0073,
    0x0000_0283,
    0x0050_3023,
    0x0000_0317,
    0x0103_0313,
    0x1053_1073,
    0,
    0x1420_22f3,
    0x0050_3023,
];

/// `scause` of an illegal instruction.
const ILLEGAL_INSTRUCTION: u64 = 2;

/// The legacy extension's putchar.
const LEGACY_PUTCHAR: u64 = 1;
/// The most exits of the probe. It needs fewer; the rest is for interruptions by signals.
const EXITS_MAX: u32 = 100;

/// Results of the probe.
pub(super) struct Probed {
    /// Whether a legacy putchar reaches userspace.
    pub(super) legacy_console: bool,
    /// Whether a byte load from a device is sign-extended.
    pub(super) sign_extends: bool,
    /// Whether the trap of an illegal instruction does not reach the guest.
    pub(super) loses_illegal: bool,
}

/// Runs the probe.
pub(super) fn run(hypervisor: &dyn Hypervisor) -> Result<Probed> {
    let vm = hypervisor.create_vm()?;
    let base = GuestAddress(RAM_BASE);
    let ram = memory::create(
        base,
        MemConfig::new(ByteSize(memory::PAGE_SIZE)),
        memory::Backing::Private,
    )?;
    let code: Vec<u8> = CODE.iter().flat_map(|word| word.to_le_bytes()).collect();
    ram.write_slice(&code, base)
        .context("Failed to write the probe")?;
    vm.map_ram(&ram)?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_reg(regs::PC, RAM_BASE)?;
    let mut legacy_console = false;
    let mut sign_extends = None;
    let mut entry = VmEntry::Run;
    for _ in 0..EXITS_MAX {
        let exit = vcpu.run(entry)?;
        entry = match (exit, sign_extends) {
            // Unrunnable: the trap was lost, and the guest continued at an address of the host's
            // kernel.
            (VmExit::MmioWrite { .. } | VmExit::Unrunnable { .. }, Some(sign_extends)) => {
                let trap = match exit {
                    VmExit::MmioWrite { data, .. } => Some(u64::from_le_bytes(data)),
                    _ => None,
                };
                return Ok(Probed {
                    legacy_console,
                    sign_extends,
                    loses_illegal: trap != Some(ILLEGAL_INSTRUCTION),
                });
            }
            (VmExit::Sbi(call), _) => {
                legacy_console |= call.extension == LEGACY_PUTCHAR;
                VmEntry::Sbi(SbiRet { error: 0, value: 0 })
            }
            (VmExit::MmioRead { .. }, _) => VmEntry::MmioRead(0x80),
            (VmExit::MmioWrite { data, .. }, None) => {
                sign_extends = Some(u64::from_le_bytes(data) == u64::MAX << 7);
                VmEntry::Run
            }
            (VmExit::Interrupted, _) => VmEntry::Run,
            (other, _) => {
                bail!("Failed to probe this host: KVM ended the probe with {other:?}")
            }
        };
    }
    bail!("Failed to probe this host: the probe did not end after {EXITS_MAX} exits")
}
