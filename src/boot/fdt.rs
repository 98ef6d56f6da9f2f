//! The device tree. This module writes the skeleton; each device writes its own node in `/soc`.
//!
//! Devicetree Specification 0.4, and the riscv bindings of
//! `Documentation/devicetree/bindings/riscv`. Nodes and properties have a fixed order, so that two
//! trees can be compared as text.

use std::ops::Range;

use crate::bus::{Device, FdtError, FdtWriter};
use crate::irqchip::hart_intc_phandle;
use crate::util::ByteSize;

use super::isa::HartFacts;

/// Size in bytes of `rng-seed`, the entropy for the guest's kernel.
pub(crate) const RNG_SEED_SIZE: usize = 64;

/// The machine that the tree describes.
pub(crate) struct Machine<'a> {
    /// Kernel command line.
    pub(crate) cmdline: &'a str,
    /// Path of the console's node.
    pub(crate) stdout_path: &'a str,
    /// Guest-physical range of the initrd.
    pub(crate) initrd: Option<&'a Range<u64>>,
    /// Fresh entropy for the guest's kernel.
    pub(crate) rng_seed: [u8; RNG_SEED_SIZE],
    /// Guest-physical start of RAM.
    pub(crate) ram_base: u64,
    /// Size of RAM.
    pub(crate) ram_size: ByteSize,
    /// Features of each hart; all harts are alike.
    pub(crate) hart: &'a HartFacts,
    /// Number of harts. Hart ids start at 0.
    pub(crate) harts: u32,
    /// Devices in `/soc`, in the order of their nodes.
    pub(crate) devices: &'a [&'a dyn Device],
}

/// Returns the tree as a flattened blob.
///
/// # Errors
/// Fails if a name or value cannot be encoded, such as a command line with a NUL byte.
pub(crate) fn build(machine: &Machine) -> Result<Vec<u8>, FdtError> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_string("compatible", "riscv-virtio")?;
    fdt.property_string("model", "rvmm")?;
    chosen(machine, &mut fdt)?;
    memory(machine, &mut fdt)?;
    cpus(machine, &mut fdt)?;
    soc(machine, &mut fdt)?;
    fdt.end_node(root)?;
    fdt.finish()
}

/// Whether `bytes` are a tree that `build` made, not one of another program.
pub fn is_ours(bytes: &[u8]) -> bool {
    /// Specification 0.4, section 5.2. The words at 0, 4 and 8 of the header are the magic number,
    /// the total size, and the offset of the structure block.
    const MAGIC: u32 = 0xd00d_feed;
    const ROOT: usize = 256;
    let word = |at: usize| {
        let bytes = bytes.get(at..at + 4)?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    };
    let structure = word(8).and_then(|at| bytes.get(usize::try_from(at).ok()?..));
    let mut model = structure.unwrap_or_default().windows(5).take(ROOT);
    word(0) == Some(MAGIC)
        && word(4).and_then(|size| usize::try_from(size).ok()) == Some(bytes.len())
        && model.any(|bytes| bytes == b"rvmm\0")
}

fn chosen(machine: &Machine, fdt: &mut FdtWriter) -> Result<(), FdtError> {
    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", machine.cmdline)?;
    fdt.property_string("stdout-path", machine.stdout_path)?;
    if let Some(initrd) = machine.initrd {
        fdt.property_u64("linux,initrd-start", initrd.start)?;
        fdt.property_u64("linux,initrd-end", initrd.end)?;
    }
    fdt.property("rng-seed", &machine.rng_seed)?;
    fdt.end_node(node)
}

fn memory(machine: &Machine, fdt: &mut FdtWriter) -> Result<(), FdtError> {
    let node = fdt.begin_node(&format!("memory@{:x}", machine.ram_base))?;
    fdt.property_string("device_type", "memory")?;
    fdt.property_array_u64("reg", &[machine.ram_base, machine.ram_size.bytes()])?;
    fdt.end_node(node)
}

fn cpus(machine: &Machine, fdt: &mut FdtWriter) -> Result<(), FdtError> {
    let node = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    // The binding has one cell for it. No machine's timebase reaches 4 GHz.
    let timebase = u32::try_from(machine.hart.timebase).unwrap_or(u32::MAX);
    fdt.property_u32("timebase-frequency", timebase)?;
    for hart in 0..machine.harts {
        cpu(machine, hart, fdt)?;
    }
    fdt.end_node(node)
}

fn cpu(machine: &Machine, hart: u32, fdt: &mut FdtWriter) -> Result<(), FdtError> {
    let facts = machine.hart;
    let extensions = facts.extensions.iter().map(ToString::to_string).collect();
    let node = fdt.begin_node(&format!("cpu@{hart:x}"))?;
    fdt.property_string("device_type", "cpu")?;
    fdt.property_string("compatible", "riscv")?;
    fdt.property_u32("reg", hart)?;
    fdt.property_string("status", "okay")?;
    fdt.property_string("riscv,isa", &facts.isa_string())?;
    fdt.property_string("riscv,isa-base", "rv64i")?;
    fdt.property_string_list("riscv,isa-extensions", extensions)?;
    fdt.property_string("mmu-type", facts.mmu_type())?;
    for (name, size) in [
        ("riscv,cbom-block-size", facts.cbom_block),
        ("riscv,cboz-block-size", facts.cboz_block),
        ("riscv,cbop-block-size", facts.cbop_block),
    ] {
        if let Some(size) = size.and_then(|size| u32::try_from(size).ok()) {
            fdt.property_u32(name, size)?;
        }
    }
    let intc = fdt.begin_node("interrupt-controller")?;
    fdt.property_string("compatible", "riscv,cpu-intc")?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 1)?;
    fdt.property_u32("#address-cells", 0)?;
    fdt.property_phandle(hart_intc_phandle(hart))?;
    fdt.end_node(intc)?;
    fdt.end_node(node)
}

fn soc(machine: &Machine, fdt: &mut FdtWriter) -> Result<(), FdtError> {
    let node = fdt.begin_node("soc")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_string("compatible", "simple-bus")?;
    fdt.property_null("ranges")?;
    for device in machine.devices {
        device.fdt_node(fdt)?;
    }
    fdt.end_node(node)
}

#[cfg(test)]
mod tests;
