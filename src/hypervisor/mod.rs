//! The seam to the kernel: what rvmm needs of a hypervisor, in values that any host can make.
//!
//! `kvm` speaks to KVM, on riscv64 only; unit tests have `fake`. Nothing outside this module
//! names an ioctl.

pub mod counters;
pub mod extensions;
pub mod host;
pub mod memslot;
pub mod regs;

#[cfg(target_arch = "riscv64")]
pub mod kvm;

#[cfg(test)]
pub(crate) mod fake;

use std::io;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;
use crate::util::ByteSize;
pub use counters::Counter;
pub use memslot::Memslot;
pub use regs::RegId;

/// A request that the kernel refused, or that cannot be made on this host.
#[derive(Debug, Error)]
pub enum Error {
    /// The act and its object, with the kernel's reason.
    #[error("Failed to {act}")]
    Refused {
        /// "create vCPU 3", "map guest RAM".
        act: String,
        /// The errno.
        source: io::Error,
    },
    /// This host cannot run guests at all.
    #[error(transparent)]
    Host(#[from] host::Unfit),
    /// More guest RAM than guest-physical addresses reach.
    #[error(
        "{size} of guest RAM end beyond this host's {bits}-bit guest-physical addresses: \
         --mem can be at most {}", .max.as_flag_at_most()
    )]
    GpaWidth {
        /// What was asked for.
        size: ByteSize,
        /// Width of a guest-physical address (G-stage mode).
        bits: u32,
        /// The most that fits above the RAM's base.
        max: ByteSize,
    },
    /// More guest RAM than one memslot holds.
    #[error(
        "{size} of guest RAM are more than one KVM memslot holds: --mem can be at most {}",
        .max.as_flag_at_most()
    )]
    MemslotSize {
        /// What was asked for.
        size: ByteSize,
        /// KVM_MEM_MAX_NR_PAGES in bytes.
        max: ByteSize,
    },
}

impl Error {
    /// A refused request: "Failed to `act`", with the errno of `source`.
    pub fn refused(act: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Error::Refused {
            act: act.into(),
            source: source.into(),
        }
    }
}

/// The outcome of a request to the hypervisor.
pub type Result<T> = std::result::Result<T, Error>;

/// Makes virtual machines. One per process: `kvm::Kvm`, or a fake.
pub trait Hypervisor: Send + Sync {
    /// Capabilities by name (KVM_CHECK_EXTENSION), 0 where there is none.
    fn capabilities(&self) -> Vec<(&'static str, i32)>;

    /// A machine without RAM and vCPUs.
    fn create_vm(&self) -> Result<Arc<dyn Vm>>;
}

/// A virtual machine. All calls may come from any thread.
pub trait Vm: Send + Sync {
    /// Refuses RAM of `size` bytes at `base` that no memslot or guest-physical address could
    /// hold, before the host is asked for that much.
    fn check_ram(&self, base: GuestAddress, size: ByteSize) -> Result<()>;

    /// Width of a guest-physical address.
    fn gpa_bits(&self) -> u32;

    /// The most vCPUs the kernel gives one machine.
    fn max_vcpus(&self) -> u32;

    /// Makes `ram`, which is one region, the guest's RAM: the memslot called [`RAM`].
    fn map_ram(&self, ram: &GuestMemory) -> Result<()> {
        ram.iter().try_for_each(|region| {
            self.add_memslot(Memslot {
                name: RAM,
                gpa: region.start_addr(),
                mapping: region.get_mmap(),
                readonly: false,
            })
        })
    }

    /// Gives the guest memory. The VM keeps it mapped as long as it has the memslot and a vCPU
    /// lives.
    ///
    /// # Errors
    /// A memslot has this name or overlaps, or it is not whole pages.
    fn add_memslot(&self, memslot: Memslot) -> Result<()>;

    /// Takes the memslot `name` away: the guest's accesses are exits from then on.
    fn remove_memslot(&self, name: &str) -> Result<()>;

    /// Has the kernel log the pages of memslot `name` that the guest writes, or not any more. What
    /// rvmm itself writes is in [`crate::memory::DirtyLog`] instead.
    ///
    /// Linux 6.12 with huge pages reserved for the guest: a page that the guest has touched makes
    /// its next store fail (`gstage_set_pte`), unless the memslot is removed and added with its log
    /// on.
    fn set_dirty_log(&self, name: &str, on: bool) -> Result<()>;

    /// The pages of memslot `name` that the guest wrote since the last call: bit 0 of the first
    /// word is its first page (KVM_GET_DIRTY_LOG). Where [`Vm::clear_dirty_log_by_hand`] said yes,
    /// since they were cleared.
    ///
    /// # Errors
    /// Its log is off.
    fn dirty_log(&self, name: &str) -> Result<Vec<u64>>;

    /// From now on pages stay in the log until [`Vm::clear_dirty_log`]: so a page can be cleared
    /// right before it is read, and the kernel write-protects few at a time. False where the host
    /// cannot (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2). For good, and for all memslots.
    fn clear_dirty_log_by_hand(&self) -> Result<bool>;

    /// Clears pages of memslot `name`: the bits of `pages`, whose first word is the word `first` of
    /// the log (KVM_CLEAR_DIRTY_LOG).
    ///
    /// # Errors
    /// The log is cleared by [`Vm::dirty_log`], is off, or has not that many words.
    fn clear_dirty_log(&self, name: &str, first: usize, pages: &[u64]) -> Result<()>;

    /// Creates the vCPU of hart `id`. The first one created boots; the others start stopped.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>>;

    /// Creates the in-kernel AIA, before any vCPU; `None` where the host has no AIA.
    fn create_aia(&self) -> Result<Option<Box<dyn Aia>>>;

    /// Sets the level of wired interrupt `source` (1 and up) of the in-kernel APLIC.
    fn set_irq_line(&self, source: u32, high: bool) -> Result<()>;

    /// From now on a guest's store to `doorbell` signals `fd` inside the kernel, and causes no exit (KVM_IOEVENTFD).
    fn connect_doorbell(&self, doorbell: Doorbell, fd: &EventFd) -> Result<()>;

    /// Ends what [`Vm::connect_doorbell`] began, with the same values.
    fn disconnect_doorbell(&self, doorbell: Doorbell, fd: &EventFd) -> Result<()>;

    /// From now on a signal of `fd` is the interrupt `gsi` (KVM_IRQFD), also one that came before.
    /// Only a VM with an in-kernel AIA delivers it.
    fn connect_irqfd(&self, gsi: u32, fd: &EventFd) -> Result<()>;

    /// Ends what [`Vm::connect_irqfd`] began: signals stay in `fd`.
    fn disconnect_irqfd(&self, gsi: u32, fd: &EventFd) -> Result<()>;

    /// What each interrupt number is, in place of all that was said before (KVM_SET_GSI_ROUTING).
    /// At most [`MSI_ROUTES_MAX`].
    fn set_msi_routes(&self, routes: &[(u32, MsiMessage)]) -> Result<()>;
}

/// The name of the memslot that is the guest's RAM.
pub const RAM: &str = "RAM";

/// Interrupt numbers that KVM routes (KVM_MAX_IRQ_ROUTES).
pub const MSI_ROUTES_MAX: u32 = 4096;

/// A register whose stores only wake somebody up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// Guest-physical address.
    pub gpa: u64,
    /// Only 32-bit stores of this value ring; without it, a store of any width and value.
    pub value: Option<u32>,
}

/// A message-signalled interrupt: the store that makes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Guest-physical address of an IMSIC's page.
    pub address: u64,
    /// The interrupt identity.
    pub data: u32,
}

/// The in-kernel AIA (`arch/riscv/kvm/aia_device.c`).
pub trait Aia: Send + Sync {
    /// Sets an attribute of group CONFIG, `KVM_DEV_RISCV_AIA_CONFIG_*`.
    fn set_config(&self, attr: AiaConfig, value: u32) -> Result<()>;
    /// Reads an attribute of group CONFIG.
    fn config(&self, attr: AiaConfig) -> Result<u32>;
    /// Places the APLIC's registers, 16 KiB.
    fn place_aplic(&self, base: GuestAddress) -> Result<()>;
    /// Places the IMSIC page of the vCPU that was created as number `index`.
    fn place_imsic(&self, index: u32, base: GuestAddress) -> Result<()>;
    /// Ends configuration, after all vCPUs exist.
    fn init(&self) -> Result<()>;
    /// Reads the register `select` (an `miselect` value) of the IMSIC of hart `hart`, after `init`.
    fn imsic(&self, hart: u32, select: u64) -> Result<u64>;
    /// Writes it.
    fn set_imsic(&self, hart: u32, select: u64, value: u64) -> Result<()>;
    /// Reads the APLIC's register at `offset`, as its domain has it in memory, after `init`. A look
    /// at `in_clrip` tells the inputs of active sources only.
    fn aplic(&self, offset: u32) -> Result<u32>;
    /// Writes it. A write to `genmsi` sends a message.
    fn set_aplic(&self, offset: u32, value: u32) -> Result<()>;
}

/// Values of [`AiaConfig::Mode`], with KVM's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AiaMode {
    /// KVM emulates each IMSIC.
    Emulated = 0,
    /// Each IMSIC is a guest interrupt file of the host's, or the vCPU cannot run.
    Hardware = 1,
    /// A guest interrupt file where one is free, emulation elsewhere.
    Auto = 2,
}

/// Attributes of the AIA's CONFIG group, with KVM's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AiaConfig {
    /// An [`AiaMode`].
    Mode = 0,
    /// Interrupt identities an IMSIC file has.
    Ids = 1,
    /// Wired sources of the APLIC.
    Sources = 2,
    /// Bits of the hart index in IMSIC addresses.
    HartBits = 5,
    /// Bits of the guest index in IMSIC addresses.
    GuestBits = 6,
}

/// A virtual hart. It belongs to the thread that runs it.
pub trait Vcpu: Send {
    /// Completes the last exit with `entry` and runs the guest until the next exit.
    ///
    /// # Errors
    /// The kernel failed in a way no guest can cause.
    fn run(&mut self, entry: VmEntry) -> Result<VmExit>;

    /// Completes the last exit with `entry`, and runs nothing: what the guest gets from its load,
    /// call or CSR is in its registers then, and the next [`Vcpu::run`] takes [`VmEntry::Run`].
    /// Registers read before this are not those of a guest between two instructions.
    ///
    /// A reset that waits for the hart (SBI HSM or SUSP) still waits: KVM serves it only on its way
    /// into the guest. It may come at any time, also twice. A kick that another thread sets or
    /// takes back meanwhile stays as that thread has it: see [`Kicker`].
    ///
    /// # Errors
    /// The kernel failed in a way no guest can cause.
    fn complete(&mut self, entry: VmEntry) -> Result<()>;

    /// Reads a register of up to 64 bits; `None` where this host has no such register.
    fn reg(&self, id: RegId) -> Result<Option<u64>>;

    /// Writes a register of up to 64 bits.
    fn set_reg(&self, id: RegId, value: u64) -> Result<()>;

    /// Reads a register of any width, [`RegId::width`] bytes in the guest's order (little-endian);
    /// `None` where this host has no such register.
    fn reg_bytes(&self, id: RegId) -> Result<Option<Vec<u8>>>;

    /// Writes a register of any width.
    ///
    /// # Errors
    /// `bytes` are not as many as the register has; or the host's.
    fn set_reg_bytes(&self, id: RegId, bytes: &[u8]) -> Result<()>;

    /// The registers that this vCPU has (KVM_GET_REG_LIST), in the kernel's order, which is not one
    /// they can be restored in. Switches of extensions are among them; those of several at once are
    /// not.
    fn reg_list(&self) -> Result<Vec<RegId>>;

    /// From now on each `ebreak` of the guest is [`VmExit::Breakpoint`], or its own trap again
    /// (KVM_SET_GUEST_DEBUG). There are no watchpoints and no single steps on riscv64.
    fn set_guest_debug(&self, on: bool) -> Result<()>;

    /// The wire to this hart's external interrupt; it may outlive the vCPU.
    fn external_irq(&self) -> Result<Arc<dyn ExternalIrq>>;

    /// Whether the hart is started (KVM_GET_MP_STATE).
    fn hart_state(&self) -> Result<HartState>;

    /// Starts or stops it (KVM_SET_MP_STATE). Registers stay as they are.
    fn set_hart_state(&self, state: HartState) -> Result<()>;

    /// KVM's counters of this vCPU.
    fn counters(&self) -> Result<Vec<Counter>>;

    /// A handle with which other threads see this vCPU wait for an interrupt.
    fn waiting(&self) -> Result<Box<dyn Waiting>>;

    /// The vCPU as KVM's, where it is one: the loop of its thread is compiled for it.
    #[cfg(target_arch = "riscv64")]
    fn as_kvm(&mut self) -> Option<&mut kvm::KvmVcpu> {
        None
    }

    /// A handle with which other threads get this vCPU out of [`Vcpu::run`].
    fn kicker(&self) -> Result<Box<dyn Kicker>>;
}

/// Who serves exits.
pub trait Serve {
    /// What comes of an exit.
    type Next;

    /// Serves `exit`. To be inlined: see [`RunAnd`].
    fn serve(&mut self, exit: VmExit) -> Self::Next;
}

/// The step of a vCPU's loop: run the guest, and serve its exit. For KVM's vCPU each frequent kind of exit has
/// its own copy of [`Serve::serve`], so that no exit is written to memory and read back.
pub trait RunAnd {
    /// [`Vcpu::run`], and what `server` makes of the exit.
    ///
    /// # Errors
    /// As [`Vcpu::run`].
    fn run_and<S: Serve>(&mut self, entry: VmEntry, server: &mut S) -> Result<S::Next>;

    /// Any vCPU.
    fn as_vcpu(&mut self) -> &mut dyn Vcpu;
}

impl RunAnd for &mut dyn Vcpu {
    fn run_and<S: Serve>(&mut self, entry: VmEntry, server: &mut S) -> Result<S::Next> {
        self.run(entry).map(|exit| server.serve(exit))
    }

    fn as_vcpu(&mut self) -> &mut dyn Vcpu {
        *self
    }
}

/// A hart's state by the SBI's HSM extension, as far as KVM keeps it (KVM_MP_STATE_*).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HartState {
    /// Started, or about to be: KVM_RUN runs it.
    Started,
    /// Stopped: KVM_RUN sleeps until another hart starts it.
    Stopped,
}

/// Sees from another thread whether a vCPU waits for an interrupt.
pub trait Waiting: Send + Sync {
    /// True while the guest's WFI sleeps in the kernel. False where that cannot be known.
    fn waits(&self) -> bool;
}

/// Lets another thread interrupt a vCPU: set, then signal the thread.
///
/// KVM has one byte for this, `immediate_exit`, and asks only whether it is 0. Bit 0 of it is the
/// kicker's, bit 1 is [`Vcpu::complete`]'s while that runs. Each changes its own bit alone, so
/// neither undoes the other.
pub trait Kicker: Send + Sync {
    /// While true, [`Vcpu::run`] completes the last exit and returns [`VmExit::Interrupted`]
    /// without running the guest (KVM's `immediate_exit`).
    fn set_immediate_exit(&self, on: bool);
}

/// The supervisor external interrupt of one hart, for an interrupt controller in userspace.
pub trait ExternalIrq: Send + Sync {
    /// Sets its level, from any thread; the hart may be running.
    fn set_external(&self, high: bool) -> Result<()>;
}

/// Why the guest stopped running. Values only: nothing borrows the vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmExit {
    /// A load of `len` bytes (1, 2, 4, 8) from an address without RAM.
    MmioRead {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes to read.
        len: usize,
    },
    /// A store of `len` bytes to an address without RAM.
    MmioWrite {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes written.
        len: usize,
        /// The bytes, in guest order, the first `len` of them valid.
        data: [u8; 8],
    },
    /// An ecall that KVM does not serve itself.
    Sbi(SbiCall),
    /// An access to a CSR that KVM does not serve itself.
    Csr {
        /// The CSR's number.
        number: u64,
    },
    /// SRST, or the legacy shutdown call.
    System(SystemEvent),
    /// An `ebreak`, which the program counter is at: see [`Vcpu::set_guest_debug`].
    Breakpoint,
    /// A signal, or `immediate_exit`.
    Interrupted,
    /// The guest did what KVM cannot emulate: KVM_RUN failed with this errno.
    Unrunnable {
        /// EOPNOTSUPP, EIO or EFAULT.
        errno: i32,
        /// The program counter, where it could be read.
        pc: u64,
    },
    /// The host could not enter the guest on this CPU.
    FailEntry {
        /// KVM's hardware reason.
        reason: u64,
        /// The host CPU.
        cpu: u32,
    },
    /// An exit this rvmm does not know.
    Unknown {
        /// `kvm_run.exit_reason`.
        reason: u32,
    },
}

/// How the last exit is completed when the vCPU runs again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmEntry {
    /// Nothing to hand in.
    Run,
    /// The value loaded, little-endian, for [`VmExit::MmioRead`].
    MmioRead(u64),
    /// The answer to [`VmExit::Sbi`].
    Sbi(SbiRet),
    /// The CSR's old value for [`VmExit::Csr`].
    Csr(u64),
}

/// An SBI call as the guest made it: raw register values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SbiCall {
    /// Extension id, a7.
    pub extension: u64,
    /// Function id, a6.
    pub function: u64,
    /// a0 to a5.
    pub args: [u64; 6],
}

/// The answer to an SBI call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SbiRet {
    /// a0: 0 or a negative error.
    pub error: i64,
    /// a1.
    pub value: u64,
}

/// What the guest asked of the whole system (SBI SRST, chapter "System Reset Extension").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemEvent {
    /// Power off; `reason` 0 none, 1 system failure.
    Shutdown {
        /// The SRST reset reason.
        reason: u64,
    },
    /// Reboot, cold or warm: KVM does not tell which.
    Reset {
        /// The SRST reset reason.
        reason: u64,
    },
    /// A type that riscv's KVM does not make today.
    Other {
        /// `kvm_run.system_event.type`.
        kind: u32,
    },
}
