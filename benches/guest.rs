//! What both floors do with KVM: the guest's RAM and KVM_RUN.

use std::os::fd::{AsRawFd, RawFd};

use anyhow::{Result, bail, ensure};
use kvm_bindings::{kvm_run, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use rvmm::machine::layout::RAM_BASE;

/// KVM_RUN, `_IO(KVMIO, 0x80)`.
const KVM_RUN: libc::Ioctl = 0xae80;

/// Maps `size` bytes privately, of `file` or of the host's free memory (-1), and gives them to the
/// VM as its RAM. `more` are flags of mmap. The mapping stays as long as the process.
pub(crate) fn map_ram(vm: &VmFd, size: usize, file: RawFd, more: i32) -> Result<*mut u8> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | more;
    // SAFETY: a new mapping at an address that the kernel chooses, never unmapped.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), size, access, flags, file, 0) };
    let error = std::io::Error::last_os_error();
    ensure!(at != libc::MAP_FAILED, "no RAM: {error}");
    let slot = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: RAM_BASE,
        memory_size: size as u64,
        userspace_addr: at as u64,
    };
    // SAFETY: the mapping exists as long as the process.
    unsafe { vm.set_user_memory_region(slot) }?;
    Ok(at.cast())
}

/// A vCPU and the page that it shares with KVM.
pub(crate) struct Cpu {
    pub(crate) fd: VcpuFd,
    page: *mut kvm_run,
}

impl Cpu {
    pub(crate) fn new(mut fd: VcpuFd) -> Self {
        let page: *mut kvm_run = fd.get_kvm_run();
        Self { fd, page }
    }

    /// Runs the guest to its next exit.
    pub(crate) fn run(&mut self) -> Result<&mut kvm_run> {
        // SAFETY: the vCPU is alive, and KVM_RUN takes no argument.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_RUN, 0) } < 0 {
            bail!("KVM_RUN: {}", std::io::Error::last_os_error());
        }
        // SAFETY: the page is mapped as long as the vCPU lives, and KVM writes it only in KVM_RUN.
        Ok(unsafe { &mut *self.page })
    }
}
