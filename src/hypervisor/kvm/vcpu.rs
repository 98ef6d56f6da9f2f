//! A vCPU of KVM: reads and writes its registers (ONE_REG), and decodes `kvm_run` into values.

use std::ffi::c_void;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTR, KVM_EXIT_MMIO, KVM_EXIT_RISCV_CSR,
    KVM_EXIT_RISCV_SBI, KVM_EXIT_SYSTEM_EVENT, KVM_GUESTDBG_ENABLE, KVM_INTERRUPT_SET,
    KVM_INTERRUPT_UNSET, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_STOPPED, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, KVMIO, kvm_guest_debug, kvm_interrupt, kvm_mp_state, kvm_run,
};
use kvm_ioctls::VcpuFd;
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

use super::VmInner;
use crate::hypervisor::{
    Counter, Error, ExternalIrq, HartState, Kicker, RegId, Result, RunAnd, SbiCall, Serve,
    SystemEvent, Vcpu, VmEntry, VmExit, Waiting, counters, regs,
};

/// A vCPU of KVM.
pub struct KvmVcpu {
    fd: VcpuFd,
    /// The descriptor of `fd`, for KVM_RUN.
    run: BorrowedFd<'static>,
    /// Keeps the guest's RAM mapped.
    _vm: Arc<VmInner>,
    id: u32,
}

impl KvmVcpu {
    pub(super) fn new(fd: VcpuFd, vm: Arc<VmInner>, id: u32) -> Self {
        // SAFETY: only this vCPU uses `run`, and it keeps `fd` open as long as it lives.
        let run = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        Self {
            fd,
            run,
            _vm: vm,
            id,
        }
    }

    /// Writes the result of the last exit into `kvm_run`. The next KVM_RUN gives it to the guest.
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

    /// Reads a register into `bytes`, which has to have room for it. Returns false if the vCPU has
    /// no such register on this host.
    fn read_reg(&self, id: RegId, bytes: &mut [u8]) -> Result<bool> {
        match self.fd.get_one_reg(id.0, bytes) {
            Ok(_) => Ok(true),
            // Linux 6.12 returns ENOENT for some absent registers, and EINVAL for others.
            Err(e) if e.errno() == Errno::NOENT.raw_os_error() => Ok(false),
            Err(e) if e.errno() == Errno::INVAL.raw_os_error() => Ok(false),
            Err(e) => Err(self.refused_reg("read", id, e)),
        }
    }

    fn write_reg(&self, id: RegId, bytes: &[u8]) -> Result<()> {
        let written = self.fd.set_one_reg(id.0, bytes);
        written.map_err(|e| self.refused_reg("write", id, e))?;
        Ok(())
    }

    fn refused_reg(&self, act: &str, id: RegId, error: impl Into<io::Error>) -> Error {
        let register = format!("register {id} ({:#x})", id.0);
        Error::refused(format!("{act} {register} of vCPU {}", self.id), error)
    }

    /// The file with KVM's statistics of this vCPU, and its content now.
    fn statistics(&self) -> Result<(File, Vec<u8>)> {
        // SAFETY: the descriptor is a vCPU's; the ioctl takes no argument.
        let fd = unsafe { vmm_sys_util::ioctl::ioctl(&self.fd, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return Err(self.no_statistics(io::Error::last_os_error()));
        }
        // SAFETY: KVM has created the descriptor for this call, so nothing else owns it.
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

    /// Decodes the error of a KVM_RUN. EOPNOTSUPP, EIO and EFAULT are those that the guest can
    /// cause (`vcpu_exit.c`, `vcpu_insn.c`).
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
        // This is the path of every exit, so it does not use kvm-ioctls' `run`: that decodes
        // `kvm_run` too, for every architecture. SAFETY: the descriptor is a vCPU's; the ioctl
        // takes no argument.
        match unsafe { ioctl(self.run, RunVcpu) } {
            Ok(()) => {}
            Err(errno) => return Ok(server.serve(self.failed_run(errno)?)),
        }
        let run = self.fd.get_kvm_run();
        let exit = &run.__bindgen_anon_1;
        // Copy the member of the union that `exit_reason` selects.
        Ok(match run.exit_reason {
            KVM_EXIT_MMIO => {
                // SAFETY: KVM has filled the member for this exit reason, and all its fields are
                // integers.
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

/// Returns each exit unchanged.
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
        self.enter(entry);
        let run: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: the page is mapped as long as `self.fd` lives, and all accesses to the byte are
        // atomic.
        let immediate_exit = unsafe { immediate_exit(run) };
        immediate_exit.fetch_or(COMPLETING, Ordering::Release);
        // SAFETY: the descriptor is a vCPU's; the ioctl takes no argument.
        let ended = unsafe { ioctl(self.run, RunVcpu) };
        immediate_exit.fetch_and(!COMPLETING, Ordering::Release);
        // KVM first commits the last exit to the registers, and checks the byte then
        // (kvm_arch_vcpu_ioctl_run).
        let error = match ended {
            Err(Errno::INTR) => return Ok(()),
            Err(errno) => errno.into(),
            Ok(()) => io::Error::other("KVM_RUN ran the guest, in spite of immediate_exit"),
        };
        let act = format!("complete the last exit of vCPU {}", self.id);
        Err(Error::refused(act, error))
    }

    fn reg(&self, id: RegId) -> Result<Option<u64>> {
        let mut bytes = [0; 8];
        let is_there = self.read_reg(id, &mut bytes)?;
        Ok(is_there.then(|| u64::from_le_bytes(bytes)))
    }

    fn set_reg(&self, id: RegId, value: u64) -> Result<()> {
        self.write_reg(id, &value.to_le_bytes())
    }

    fn reg_bytes(&self, id: RegId) -> Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; id.width().unwrap_or(0)];
        Ok(self.read_reg(id, &mut bytes)?.then_some(bytes))
    }

    fn set_reg_bytes(&self, id: RegId, bytes: &[u8]) -> Result<()> {
        if id.width() != Some(bytes.len()) {
            return Err(self.refused_reg("write", id, Errno::INVAL));
        }
        self.write_reg(id, bytes)
    }

    fn reg_list(&self) -> Result<Vec<RegId>> {
        // kvm-ioctls' RegList holds only 200 ids, and a vCPU has more.
        let list = regs::read_list(|list| {
            // SAFETY: the descriptor is a vCPU's. The first word is the number of ids that the list
            // has room for behind it. KVM writes no more.
            match unsafe { ioctl_with_mut_ptr(&self.fd, KVM_GET_REG_LIST(), list.as_mut_ptr()) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
        let act = || format!("list the registers of vCPU {} (KVM_GET_REG_LIST)", self.id);
        list.map_err(|e| Error::refused(act(), e))
    }

    fn set_guest_debug(&self, on: bool) -> Result<()> {
        let request = kvm_guest_debug {
            control: if on { KVM_GUESTDBG_ENABLE } else { 0 },
            ..Default::default()
        };
        // SAFETY: the descriptor is a vCPU's, and KVM reads a kvm_guest_debug.
        match unsafe { ioctl_with_ref(&self.fd, KVM_SET_GUEST_DEBUG(), &request) } {
            0 => Ok(()),
            _ => Err(Error::refused(
                format!("debug vCPU {} (KVM_SET_GUEST_DEBUG)", self.id),
                io::Error::last_os_error(),
            )),
        }
    }

    fn external_irq(&self) -> Result<Arc<dyn ExternalIrq>> {
        // SAFETY: `self.fd` is open, and outlives this borrow.
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

/// Decodes the exits that are rarer than MMIO and SBI calls.
#[inline(never)]
fn decode(run: &kvm_run) -> VmExit {
    let exit = &run.__bindgen_anon_1;
    match run.exit_reason {
        KVM_EXIT_RISCV_CSR => {
            // SAFETY: KVM has filled the member for this exit reason, and all its fields are
            // integers.
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
        KVM_EXIT_DEBUG => VmExit::Breakpoint,
        KVM_EXIT_INTR => VmExit::Interrupted,
        reason => VmExit::Unknown { reason },
    }
}

type Event = kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_19;

fn decode_system_event(event: Event) -> VmExit {
    // SAFETY: the union's members, `data` and `flags`, are u64s, so any bytes are valid.
    let data = unsafe { event.__bindgen_anon_1.data };
    let reason = if event.ndata > 0 { data[0] } else { 0 };
    VmExit::System(match event.type_ {
        KVM_SYSTEM_EVENT_SHUTDOWN => SystemEvent::Shutdown { reason },
        KVM_SYSTEM_EVENT_RESET => SystemEvent::Reset { reason },
        kind => SystemEvent::Other { kind },
    })
}

/// The ioctl KVM_RUN, which kvm-ioctls does not export.
struct RunVcpu;

// SAFETY: KVM_RUN takes no argument and returns 0. It writes only to the mapped `kvm_run`.
unsafe impl Ioctl for RunVcpu {
    type Output = ();
    // KVM_RUN writes to memory that is not among its arguments.
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

// Ioctls that kvm-ioctls does not have: KVM_INTERRUPT and KVM_SET_GUEST_DEBUG on riscv64, and
// KVM_GET_STATS_FD on any architecture. It does not export KVM_GET_REG_LIST. That ioctl's argument
// is a u64 with the ids behind it.
ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);
ioctl_iow_nr!(KVM_SET_GUEST_DEBUG, KVMIO, 0x9b, kvm_guest_debug);
ioctl_iowr_nr!(KVM_GET_REG_LIST, KVMIO, 0xb0, u64);
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// A vCPU's descriptor, used only for KVM_INTERRUPT: that ioctl does not take the vCPU's mutex in
/// the kernel, so it works while the vCPU runs.
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

/// KVM's statistic `blocking` of a vCPU. It is 1 while kvm_vcpu_block waits
/// (`virt/kvm/kvm_main.c`).
struct Blocking {
    file: File,
    /// Where in the file the value is. `None` if the host has no such statistic.
    at: Option<u64>,
}

impl Waiting for Blocking {
    fn waits(&self) -> bool {
        let mut value = [0; 8];
        let read = self.at.map(|at| self.file.read_exact_at(&mut value, at));
        matches!(read, Some(Ok(()))) && u64::from_le_bytes(value) != 0
    }
}

/// A second mapping of a vCPU's `kvm_run` page, which can outlive the vCPU's own mapping.
struct RunPage(NonNull<kvm_run>);

// SAFETY: only `immediate_exit` is accessed, and atomically.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn map(fd: &VcpuFd) -> io::Result<Self> {
        // SAFETY: `fd` is open, and outlives this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        // SAFETY: a new mapping, for which the kernel chooses a free address. The first page of a
        // vCPU's descriptor is its `kvm_run`.
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
        // SAFETY: the page is mapped until drop, and all accesses to the byte are atomic.
        let immediate_exit = unsafe { immediate_exit(self.0.as_ptr()) };
        if on {
            immediate_exit.fetch_or(KICKED, Ordering::Release);
        } else {
            immediate_exit.fetch_and(!KICKED, Ordering::Release);
        }
    }
}

/// The bit of `immediate_exit` that a kicker sets. KVM checks only whether the byte is 0.
const KICKED: u8 = 1 << 0;
/// The bit of `immediate_exit` that [`Vcpu::complete`] sets while it runs.
const COMPLETING: u8 = 1 << 1;

/// The byte that makes KVM_RUN return at once if it is not 0. KVM reads it once per KVM_RUN
/// (READ_ONCE), and never writes it.
///
/// # Safety
/// `run` has to be the `kvm_run` page of a vCPU, and has to stay mapped as long as the result is
/// used. All accesses to the byte have to go through this function.
unsafe fn immediate_exit<'a>(run: *mut kvm_run) -> &'a AtomicU8 {
    // SAFETY: the caller guarantees that the byte is mapped. A byte is always aligned.
    unsafe { AtomicU8::from_ptr(std::ptr::addr_of_mut!((*run).immediate_exit)) }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: `map` mapped this range, and nothing has unmapped it since. If munmap fails, the
        // page is leaked, which is harmless.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}
