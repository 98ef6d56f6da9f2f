//! The in-kernel AIA of the floors, set up as in rvmm.

use anyhow::Result;
use kvm_bindings::*;
use kvm_ioctls::{DeviceFd, VmFd};
use rvmm::machine::layout::{APLIC, IMSIC};

/// Creates the AIA. To be called before the vCPUs are created.
pub(crate) fn create(vm: &VmFd) -> Result<DeviceFd> {
    let mut device = kvm_create_device {
        type_: kvm_device_type_KVM_DEV_TYPE_RISCV_AIA,
        fd: 0,
        flags: 0,
    };
    Ok(vm.create_device(&mut device)?)
}

/// Places and starts the AIA of one hart. To be called after the vCPU is created.
pub(crate) fn start(aia: &DeviceFd) -> Result<()> {
    let config = KVM_DEV_RISCV_AIA_GRP_CONFIG;
    let mode = KVM_DEV_RISCV_AIA_CONFIG_MODE;
    set(aia, config, mode, KVM_DEV_RISCV_AIA_MODE_AUTO.into())
        .or_else(|_| set(aia, config, mode, KVM_DEV_RISCV_AIA_MODE_EMUL.into()))?;
    let sources = KVM_DEV_RISCV_AIA_CONFIG_SRCS;
    set(aia, config, sources, rvmm::irqchip::aia::SOURCES.into())?;
    set(aia, config, KVM_DEV_RISCV_AIA_CONFIG_HART_BITS, 0)?;
    let addr = KVM_DEV_RISCV_AIA_GRP_ADDR;
    set(aia, addr, KVM_DEV_RISCV_AIA_ADDR_APLIC, APLIC.start)?;
    set(aia, addr, 1, IMSIC.start)?;
    let ctrl = KVM_DEV_RISCV_AIA_GRP_CTRL;
    set(aia, ctrl, KVM_DEV_RISCV_AIA_CTRL_INIT, 0)
}

/// Sets an attribute.
pub(crate) fn set(aia: &DeviceFd, group: u32, attr: u32, value: u64) -> Result<()> {
    let request = kvm_device_attr {
        flags: 0,
        group,
        attr: attr.into(),
        addr: std::ptr::from_ref(&value) as u64,
    };
    Ok(aia.set_device_attr(&request)?)
}
