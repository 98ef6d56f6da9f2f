//! A vCPU on KVM: registers by ONE_REG, and `kvm_run` decoded into values.

use std::ffi::c_void;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTR, KVM_EXIT_MMIO, KVM_EXIT_RISCV_CSR, KVM_EXIT_RISCV_SBI,
    KVM_EXIT_SYSTEM_EVENT, KVM_INTERRUPT_SET, KVM_INTERRUPT_UNSET, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_STOPPED, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, KVMIO, kvm_interrupt,
    kvm_mp_state, kvm_run,
};
use kvm_ioctls::VcpuFd;
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr};

use super::VmInner;
use crate::hypervisor::{
    Counter, Error, ExternalIrq, HartState, Kicker, RegId, Result, RunAnd, SbiCall, Serve,
    SystemEvent, Vcpu, VmEntry, VmExit, Waiting, counters, regs,
};

/// A vCPU of KVM's.
pub struct KvmVcpu {
    fd: VcpuFd,
    /// The same descriptor, for KVM_RUN.
    run: BorrowedFd<'static>,
    /// Keeps the guest's RAM mapped.
    _vm: Arc<VmInner>,
    id: u32,
}

impl KvmVcpu {
    pub(super) fn new(fd: VcpuFd, vm: Arc<VmInner>, id: u32) -> Self {
        // SAFETY: it is used as long as `fd` is open, which is as long as this vCPU lives.
        let run = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        Self {
            fd,
            run,
            _vm: vm,
            id,
        }
    }

    /// Writes what the guest is to see of its last exit into `kvm_run`.
    #[inline(always)]
    fn enter(&mut self, entry: VmEntry) {
        let run = self.fd.get_kvm_run();
        match entry {
            VmEntry::Run => {}
            VmEntry::MmioRead(value) => {
                run.__bindgen_anon_1.mmio.data = value.to_le_bytes();
            }
            VmEntry::Sbi(ret) => {
                run.__bindgen_anon_1.riscv_sbi.ret = [ret.error as u64, ret.value];
            }
            VmEntry::Csr(value) => run.__bindgen_anon_1.riscv_csr.ret_value = value,
        }
    }

    /// The file of KVM's statistics, and what is in it now.
    fn statistics(&self) -> Result<(File, Vec<u8>)> {
        // SAFETY: the descriptor is a vCPU's; the ioctl takes no argument.
        let fd = unsafe { vmm_sys_util::ioctl::ioctl(&self.fd, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return Err(self.no_statistics(io::Error::last_os_error()));
        }
        // SAFETY: KVM made the descriptor just now, for this call.
        let mut file = unsafe { File::from_raw_fd(fd) };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)
            .map_err(|e| self.no_statistics(e))?;
        Ok((file, bytes))
    }

    fn no_statistics(&self, error: io::Error) -> Error {
        let act = format!("read the statistics of vCPU {} (KVM_GET_STATS_FD)", self.id);
        Error::refused(act, error)
    }

    /// An errno of KVM_RUN that the guest can cause (`vcpu_exit.c`, `vcpu_insn.c`).
    #[cold]
    #[inline(never)]
    fn failed_run(&self, errno: Errno) -> Result<VmExit> {
        match errno {
            Errno::INTR | Errno::AGAIN => Ok(VmExit::Interrupted),
            Errno::OPNOTSUPP | Errno::IO | Errno::FAULT => Ok(VmExit::Unrunnable {
                errno: errno.raw_os_error(),
                pc: self.reg(regs::PC)?.unwrap_or_default(),
            }),
            _ => Err(Error::refused(format!("run vCPU {}", self.id), errno)),
        }
    }
}

impl RunAnd for KvmVcpu {
    #[inline(always)]
    fn run_and<S: Serve>(&mut self, entry: VmEntry, server: &mut S) -> Result<S::Next> {
        self.enter(entry);
        // Not kvm-ioctls' `run`: it decodes `kvm_run` too, for every architecture, and this is the
        // path of every exit.
        // SAFETY: the descriptor is a vCPU's; the ioctl takes no argument.
        match unsafe { ioctl(self.run, RunVcpu) } {
            Ok(()) => {}
            Err(errno) => return Ok(server.serve(self.failed_run(errno)?)),
        }
        let run = self.fd.get_kvm_run();
        let exit = &run.__bindgen_anon_1;
        // The union member that `exit_reason` selects, copied out.
        Ok(match run.exit_reason {
            KVM_EXIT_MMIO => {
                // SAFETY: KVM filled the member that belongs to the exit reason; it is plain integers.
                let mmio = unsafe { exit.mmio };
                let (gpa, len, data) = (mmio.phys_addr, mmio.len.min(8) as usize, mmio.data);
                if mmio.is_write == 0 {
                    server.serve(VmExit::MmioRead { gpa, len })
                } else {
                    server.serve(VmExit::MmioWrite { gpa, len, data })
                }
            }
            KVM_EXIT_RISCV_SBI => {
                // SAFETY: as above.
                let sbi = unsafe { exit.riscv_sbi };
                server.serve(VmExit::Sbi(SbiCall {
                    extension: sbi.extension_id,
                    function: sbi.function_id,
                    args: sbi.args,
                }))
            }
            _ => server.serve(decode(run)),
        })
    }

    fn as_vcpu(&mut self) -> &mut dyn Vcpu {
        self
    }
}

/// Hands exits on.
struct AsItIs;

impl Serve for AsItIs {
    type Next = VmExit;

    fn serve(&mut self, exit: VmExit) -> VmExit {
        exit
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, entry: VmEntry) -> Result<VmExit> {
        self.run_and(entry, &mut AsItIs)
    }

    fn complete(&mut self, entry: VmEntry) -> Result<()> {
        // KVM_RUN does this first, and then looks at the flag (kvm_arch_vcpu_ioctl_run).
        self.fd.set_kvm_immediate_exit(1);
        match self.run(entry)? {
            VmExit::Interrupted => Ok(()),
            exit => {
                let act = format!("complete the last exit of vCPU {}", self.id);
                Err(Error::refused(act, io::Error::other(format!("{exit:?}"))))
            }
        }
    }

    fn reg(&self, id: RegId) -> Result<Option<u64>> {
        let mut bytes = [0; 8];
        match self.fd.get_one_reg(id.0, &mut bytes) {
            Ok(_) => Ok(Some(u64::from_le_bytes(bytes))),
            // Linux 6.12 says ENOENT for some absent registers and EINVAL for others.
            Err(e) if e.errno() == Errno::NOENT.raw_os_error() => Ok(None),
            Err(e) if e.errno() == Errno::INVAL.raw_os_error() => Ok(None),
            Err(e) => Err(Error::refused(
                format!("read register {:#x} of vCPU {}", id.0, self.id),
                e,
            )),
        }
    }

    fn set_reg(&self, id: RegId, value: u64) -> Result<()> {
        match self.fd.set_one_reg(id.0, &value.to_le_bytes()) {
            Ok(_) => Ok(()),
            Err(e) => Err(Error::refused(
                format!("write register {:#x} of vCPU {}", id.0, self.id),
                e,
            )),
        }
    }

    fn external_irq(&self) -> Result<Arc<dyn ExternalIrq>> {
        // SAFETY: `fd` is open, and outlives this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) };
        let fd = fd.try_clone_to_owned().map_err(|e| {
            Error::refused(format!("duplicate the descriptor of vCPU {}", self.id), e)
        })?;
        Ok(Arc::new(InterruptFd { fd, id: self.id }))
    }

    fn hart_state(&self) -> Result<HartState> {
        let state = self
            .fd
            .get_mp_state()
            .map_err(|e| Error::refused(format!("read the state of vCPU {}", self.id), e))?;
        Ok(match state.mp_state {
            KVM_MP_STATE_STOPPED => HartState::Stopped,
            _ => HartState::Started,
        })
    }

    fn set_hart_state(&self, state: HartState) -> Result<()> {
        let mp_state = match state {
            HartState::Started => KVM_MP_STATE_RUNNABLE,
            HartState::Stopped => KVM_MP_STATE_STOPPED,
        };
        let set = self.fd.set_mp_state(kvm_mp_state { mp_state });
        set.map_err(|e| Error::refused(format!("write the state of vCPU {}", self.id), e))
    }

    fn counters(&self) -> Result<Vec<Counter>> {
        let (_, bytes) = self.statistics()?;
        counters::parse(&bytes).ok_or_else(|| self.no_statistics(io::ErrorKind::InvalidData.into()))
    }

    fn waiting(&self) -> Result<Box<dyn Waiting>> {
        let (file, bytes) = self.statistics()?;
        let at = counters::offset(&bytes, "blocking").map(|at| at as u64);
        Ok(Box::new(Blocking { file, at }))
    }

    fn as_kvm(&mut self) -> Option<&mut KvmVcpu> {
        Some(self)
    }

    fn kicker(&self) -> Result<Box<dyn Kicker>> {
        let act = || format!("map the run page of vCPU {}", self.id);
        let page = RunPage::map(&self.fd).map_err(|e| Error::refused(act(), e))?;
        Ok(Box::new(page))
    }
}

/// Exits that are rarer than MMIO and SBI calls.
#[inline(never)]
fn decode(run: &kvm_run) -> VmExit {
    let exit = &run.__bindgen_anon_1;
    match run.exit_reason {
        KVM_EXIT_RISCV_CSR => {
            // SAFETY: KVM filled the member that belongs to the exit reason; all are plain integers.
            let number = unsafe { exit.riscv_csr.csr_num };
            VmExit::Csr { number }
        }
        // SAFETY: as above.
        KVM_EXIT_SYSTEM_EVENT => decode_system_event(unsafe { exit.system_event }),
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: as above.
            let fail = unsafe { exit.fail_entry };
            VmExit::FailEntry {
                reason: fail.hardware_entry_failure_reason,
                cpu: fail.cpu,
            }
        }
        KVM_EXIT_INTR => VmExit::Interrupted,
        reason => VmExit::Unknown { reason },
    }
}

type Event = kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_19;

fn decode_system_event(event: Event) -> VmExit {
    // SAFETY: `data` and `flags` share a place and are both u64s.
    let data = unsafe { event.__bindgen_anon_1.data };
    let reason = if event.ndata > 0 { data[0] } else { 0 };
    VmExit::System(match event.type_ {
        KVM_SYSTEM_EVENT_SHUTDOWN => SystemEvent::Shutdown { reason },
        KVM_SYSTEM_EVENT_RESET => SystemEvent::Reset { reason },
        kind => SystemEvent::Other { kind },
    })
}

/// KVM_RUN, which kvm-ioctls keeps to itself.
struct RunVcpu;

// SAFETY: KVM_RUN takes no argument and returns 0; what it writes is the mapped `kvm_run`.
unsafe impl Ioctl for RunVcpu {
    type Output = ();
    // It writes memory that no argument names.
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        const KVMIO: u8 = 0xae;
        opcode::none(KVMIO, 0x80)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

// kvm-ioctls has no KVM_INTERRUPT on riscv64, and KVM_GET_STATS_FD nowhere.
ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// A vCPU's descriptor, for KVM_INTERRUPT alone: the one ioctl that takes no lock of the vCPU's.
struct InterruptFd {
    fd: OwnedFd,
    id: u32,
}

impl ExternalIrq for InterruptFd {
    fn set_external(&self, high: bool) -> Result<()> {
        let irq = if high {
            KVM_INTERRUPT_SET
        } else {
            KVM_INTERRUPT_UNSET
        };
        let request = kvm_interrupt { irq: irq as u32 };
        // SAFETY: the descriptor is a vCPU's, and KVM reads a kvm_interrupt.
        match unsafe { ioctl_with_ref(&self.fd, KVM_INTERRUPT(), &request) } {
            0 => Ok(()),
            _ => Err(Error::refused(
                format!("set the external interrupt of vCPU {}", self.id),
                io::Error::last_os_error(),
            )),
        }
    }
}

/// KVM's statistic `blocking` of a vCPU: 1 while kvm_vcpu_block waits (`virt/kvm/kvm_main.c`).
struct Blocking {
    file: File,
    /// Where in the file it is; none on a host that has no such value.
    at: Option<u64>,
}

impl Waiting for Blocking {
    fn waits(&self) -> bool {
        let mut value = [0; 8];
        let read = self.at.map(|at| self.file.read_exact_at(&mut value, at));
        matches!(read, Some(Ok(()))) && u64::from_le_bytes(value) != 0
    }
}

/// A mapping of a vCPU's `kvm_run` page of its own, so that it may outlive the vCPU's.
struct RunPage(NonNull<kvm_run>);

// SAFETY: only `immediate_exit` is touched, and atomically.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn map(fd: &VcpuFd) -> io::Result<Self> {
        // SAFETY: `fd` is open, and outlives this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        // SAFETY: a new mapping at an address of the kernel's choice; KVM's first page of a vCPU
        // is its `kvm_run`.
        let page = unsafe {
            mmap(
                std::ptr::null_mut(),
                size_of::<kvm_run>(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )
        }?;
        NonNull::new(page.cast())
            .map(Self)
            .ok_or_else(|| Errno::FAULT.into())
    }
}

impl Kicker for RunPage {
    fn set_immediate_exit(&self, on: bool) {
        // SAFETY: the page is mapped until drop; KVM and this are the only users of the byte, and
        // KVM reads it once per KVM_RUN (READ_ONCE in kvm_arch_vcpu_ioctl_run).
        let flag = unsafe {
            AtomicU8::from_ptr(std::ptr::addr_of_mut!((*self.0.as_ptr()).immediate_exit))
        };
        flag.store(on.into(), Ordering::Release);
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and not unmapped since. A failure could only
        // leak the page.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}
