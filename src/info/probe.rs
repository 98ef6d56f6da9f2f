//! What only a guest can find out: a few instructions, run on a machine of one page.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use vm_memory::{Bytes, GuestAddress};

use crate::config::MemConfig;
use crate::hypervisor::{Hypervisor, SbiRet, VmEntry, VmExit, regs};
use crate::machine::layout::RAM_BASE;
use crate::memory;
use crate::util::ByteSize;

/// The probe's code. Address 0 is no RAM: an access there is an exit.
///
/// ```text
/// addi a7, zero, 1      legacy putchar
/// addi a0, zero, 0
/// ecall
/// lb   t0, 0(zero)      reads 0x80
/// sd   t0, 0(zero)      tells what became of it
/// ```
const CODE: [u32; 5] = [
    0x0010_0893,
    0x0000_0513,
    0x0000_0073,
    0x0000_0283,
    0x0050_3023,
];

/// The legacy extension's putchar.
const LEGACY_PUTCHAR: u64 = 1;
/// The least exits that bring the probe to its end, and some for signals.
const EXITS_MAX: u32 = 100;

/// What was found.
pub(super) struct Probed {
    /// A legacy putchar comes to userspace.
    pub(super) legacy_console: bool,
    /// A byte load from a device extends the sign.
    pub(super) sign_extends: bool,
}

/// Runs the probe.
pub(super) fn run(hypervisor: &dyn Hypervisor) -> Result<Probed> {
    let vm = hypervisor.create_vm()?;
    let base = GuestAddress(RAM_BASE);
    let ram = memory::create(base, MemConfig::new(ByteSize(memory::PAGE_SIZE)))?;
    let code: Vec<u8> = CODE.iter().flat_map(|word| word.to_le_bytes()).collect();
    ram.write_slice(&code, base)
        .context("Failed to write the probe")?;
    vm.map_ram(Arc::clone(&ram))?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_reg(regs::PC, RAM_BASE)?;
    let mut legacy_console = false;
    let mut entry = VmEntry::Run;
    for _ in 0..EXITS_MAX {
        entry = match vcpu.run(entry)? {
            VmExit::Sbi(call) => {
                legacy_console |= call.extension == LEGACY_PUTCHAR;
                VmEntry::Sbi(SbiRet { error: 0, value: 0 })
            }
            VmExit::MmioRead { .. } => VmEntry::MmioRead(0x80),
            VmExit::MmioWrite { data, .. } => {
                return Ok(Probed {
                    legacy_console,
                    sign_extends: u64::from_le_bytes(data) == u64::MAX << 7,
                });
            }
            VmExit::Interrupted => VmEntry::Run,
            other => bail!("Failed to probe this host: its KVM ended the probe with {other:?}"),
        };
    }
    bail!("Failed to probe this host: its KVM does not run the probe to its end")
}
