//! The interface between rvmm and the hypervisor: traits, and plain values that any host can make.
//!
//! `kvm` implements it with KVM, on riscv64 only. `fake` implements it for unit tests. No other
//! module uses KVM's ioctls.

pub mod counters;
mod exit;
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
pub use exit::{SbiCall, SbiName, SbiRet, SystemEvent, VmEntry, VmExit};
pub use memslot::Memslot;
pub use regs::RegId;

/// A request that failed, or that this host cannot serve.
#[derive(Debug, Error)]
pub enum Error {
    /// The kernel refused a request.
    #[error("Failed to {act}")]
    Refused {
        /// What rvmm asked for, such as "create vCPU 3" or "map guest RAM".
        act: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// This host cannot run guests at all.
    #[error(transparent)]
    Host(#[from] host::Unfit),
    /// Guest RAM would end beyond the largest guest-physical address.
    #[error(
        "{size} of guest RAM end beyond this host's {bits}-bit guest-physical addresses: \
         --mem can be at most {}", .max.as_flag_at_most()
    )]
    GpaWidth {
        /// The configured size.
        size: ByteSize,
        /// The width of a guest-physical address in bits, which the G-stage mode sets.
        bits: u32,
        /// The largest size that fits above the base of RAM.
        max: ByteSize,
    },
    /// Guest RAM is larger than a memslot can be.
    #[error(
        "{size} of guest RAM are more than one KVM memslot holds: --mem can be at most {}",
        .max.as_flag_at_most()
    )]
    MemslotSize {
        /// The configured size.
        size: ByteSize,
        /// The largest size of a memslot: KVM_MEM_MAX_NR_PAGES in bytes.
        max: ByteSize,
    },
}

impl Error {
    /// An [`Error::Refused`] with the message "Failed to `act`" and the cause `source`.
    pub fn refused(act: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Error::Refused {
            act: act.into(),
            source: source.into(),
        }
    }
}

/// The result of a request to the hypervisor.
pub type Result<T> = std::result::Result<T, Error>;

/// Creates virtual machines. There is one per process: `kvm::Kvm`, or a fake.
pub trait Hypervisor: Send + Sync {
    /// The host's capabilities: name and value (KVM_CHECK_EXTENSION). The value of a missing one is
    /// 0.
    fn capabilities(&self) -> Vec<(&'static str, i32)>;

    /// Creates a machine without RAM and vCPUs.
    fn create_vm(&self) -> Result<Arc<dyn Vm>>;
}

/// A virtual machine. Any thread may call any method.
pub trait Vm: Send + Sync {
    /// Checks that the guest can have `size` bytes of RAM at `base`. To be called before the host
    /// allocates the RAM.
    ///
    /// # Errors
    /// Fails if RAM would end beyond the largest guest-physical address, or if it is too large for
    /// a memslot.
    fn check_ram(&self, base: GuestAddress, size: ByteSize) -> Result<()>;

    /// The width of a guest-physical address in bits.
    fn gpa_bits(&self) -> u32;

    /// The largest number of vCPUs that the kernel gives one machine.
    fn max_vcpus(&self) -> u32;

    /// Makes `ram` the guest's RAM, as the memslot with the name [`RAM`]. It has to be one region.
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

    /// Gives memory to the guest. The memory stays mapped until the memslot is removed, or until
    /// the VM and all its vCPUs are dropped.
    ///
    /// # Errors
    /// Fails if another memslot has this name or overlaps, or if the memslot is not whole pages.
    fn add_memslot(&self, memslot: Memslot) -> Result<()>;

    /// Takes the memslot `name` away from the guest. Each access to its addresses causes an exit
    /// from then on.
    fn remove_memslot(&self, name: &str) -> Result<()>;

    /// Turns the kernel's log of the pages that the guest writes on or off, for memslot `name`.
    /// rvmm's own writes are in [`crate::memory::DirtyLog`].
    ///
    /// Linux 6.12 has a bug (`gstage_set_pte`) if RAM is in reserved huge pages: the guest's next
    /// store to a page that it has touched fails. To avoid it, remove the memslot, and add it with
    /// its log on.
    fn set_dirty_log(&self, name: &str, on: bool) -> Result<()>;

    /// The pages of memslot `name` that the guest wrote since the last call (KVM_GET_DIRTY_LOG).
    /// Bit 0 of the first word is the first page of the memslot. After a
    /// [`Vm::clear_dirty_log_by_hand`] that returned true: the pages that the guest wrote since
    /// they were last cleared.
    ///
    /// # Errors
    /// Fails if the log of the memslot is off.
    fn dirty_log(&self, name: &str) -> Result<Vec<u64>>;

    /// From now on, pages stay in the log until [`Vm::clear_dirty_log`] clears them. So rvmm can
    /// clear a page right before it reads it, and the kernel write-protects few pages at a time.
    /// This is for all memslots, and cannot be undone. Returns false if the host cannot do it
    /// (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
    fn clear_dirty_log_by_hand(&self) -> Result<bool>;

    /// Clears pages in the log of memslot `name` (KVM_CLEAR_DIRTY_LOG): those whose bits are set in
    /// `pages`. The first word of `pages` is for word `first` of the log.
    ///
    /// # Errors
    /// Fails if [`Vm::dirty_log`] clears the log, if the log is off, or if it has fewer words.
    fn clear_dirty_log(&self, name: &str, first: usize, pages: &[u64]) -> Result<()>;

    /// Creates the vCPU of hart `id`. The hart that is created first is started; the others are
    /// stopped.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>>;

    /// Creates the in-kernel AIA. To be called before any vCPU is created. `None` if the host has
    /// no AIA.
    fn create_aia(&self) -> Result<Option<Box<dyn Aia>>>;

    /// Sets the level of wired interrupt `source` (1 and up) of the in-kernel APLIC.
    fn set_irq_line(&self, source: u32, high: bool) -> Result<()>;

    /// From now on, a store of the guest to `doorbell` makes the kernel signal `fd`, without an
    /// exit (KVM_IOEVENTFD).
    fn connect_doorbell(&self, doorbell: Doorbell, fd: &EventFd) -> Result<()>;

    /// Undoes [`Vm::connect_doorbell`]. The arguments have to be the same.
    fn disconnect_doorbell(&self, doorbell: Doorbell, fd: &EventFd) -> Result<()>;

    /// From now on, a signal of `fd` makes the kernel raise interrupt `gsi` (KVM_IRQFD). A signal
    /// from before this call counts too. Only a VM with an in-kernel AIA can deliver the interrupt.
    fn connect_irqfd(&self, gsi: u32, fd: &EventFd) -> Result<()>;

    /// Undoes [`Vm::connect_irqfd`]. Signals stay in `fd` from then on.
    fn disconnect_irqfd(&self, gsi: u32, fd: &EventFd) -> Result<()>;

    /// Sets the message that each interrupt number stands for (KVM_SET_GSI_ROUTING). Replaces all
    /// earlier routes. There can be at most [`MSI_ROUTES_MAX`].
    fn set_msi_routes(&self, routes: &[(u32, MsiMessage)]) -> Result<()>;

    /// Delivers `message` at once, without a route (KVM_SIGNAL_MSI): the identity becomes pending
    /// in the IMSIC of the hart at that address. Does nothing if no IMSIC is there.
    ///
    /// # Errors
    /// Fails if the VM has no AIA, or if the IMSIC does not have the identity.
    fn signal_msi(&self, message: MsiMessage) -> Result<()>;
}

/// The name of the memslot that is the guest's RAM.
pub const RAM: &str = "RAM";

/// The largest number of interrupts that KVM can route (KVM_MAX_IRQ_ROUTES).
pub const MSI_ROUTES_MAX: u32 = 4096;

/// A register to which a store does nothing but signal an eventfd, such as a virtio queue's notify
/// register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// Guest-physical address.
    pub gpa: u64,
    /// With a value, only a 32-bit store of this value signals. Without, a store of any width and
    /// value does.
    pub value: Option<u32>,
}

/// A message-signalled interrupt: the address and the data of the store that raises it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Guest-physical address in an IMSIC's page.
    pub address: u64,
    /// The interrupt identity.
    pub data: u32,
}

/// The in-kernel AIA (`arch/riscv/kvm/aia_device.c`).
pub trait Aia: Send + Sync {
    /// Sets an attribute of group CONFIG, `KVM_DEV_RISCV_AIA_CONFIG_*`.
    fn set_config(&self, attr: AiaConfig, value: u32) -> Result<()>;
    /// Reads an attribute of group CONFIG, `KVM_DEV_RISCV_AIA_CONFIG_*`.
    fn config(&self, attr: AiaConfig) -> Result<u32>;
    /// Sets the guest-physical address of the APLIC's registers (16 KiB).
    fn place_aplic(&self, base: GuestAddress) -> Result<()>;
    /// Sets the guest-physical address of the IMSIC page of the vCPU that was created as number
    /// `index`, counted from 0.
    fn place_imsic(&self, index: u32, base: GuestAddress) -> Result<()>;
    /// Ends the configuration. To be called when all vCPUs exist.
    fn init(&self) -> Result<()>;
    /// Reads a register of the IMSIC of hart `hart`, after [`Aia::init`]. `select` is the
    /// register's number in `siselect`.
    fn imsic(&self, hart: u32, select: u64) -> Result<u64>;
    /// Writes a register of the IMSIC of hart `hart`, as [`Aia::imsic`] reads it.
    fn set_imsic(&self, hart: u32, select: u64, value: u64) -> Result<()>;
    /// Reads the APLIC's register at `offset` bytes in its memory-mapped domain, after
    /// [`Aia::init`]. `in_clrip` shows the inputs of active sources only.
    fn aplic(&self, offset: u32) -> Result<u32>;
    /// Writes the APLIC's register at `offset`. A write to `genmsi` sends a message.
    fn set_aplic(&self, offset: u32, value: u32) -> Result<()>;
}

/// Values of [`AiaConfig::Mode`], with KVM's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AiaMode {
    /// KVM emulates each IMSIC.
    Emulated = 0,
    /// Each IMSIC is a guest interrupt file of the host. Without a free one, a vCPU cannot run.
    Hardware = 1,
    /// Each IMSIC is a guest interrupt file if one is free; if not, KVM emulates it.
    Auto = 2,
}

/// Attributes of the AIA's CONFIG group, with KVM's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AiaConfig {
    /// An [`AiaMode`].
    Mode = 0,
    /// The number of interrupt identities of an IMSIC file.
    Ids = 1,
    /// The number of wired sources of the APLIC.
    Sources = 2,
    /// The number of bits for the hart index in IMSIC addresses.
    HartBits = 5,
    /// The number of bits for the guest index in IMSIC addresses.
    GuestBits = 6,
}

/// A vCPU, which is one hart of the guest. It belongs to the thread that runs it.
pub trait Vcpu: Send {
    /// Completes the last exit with `entry`, and runs the guest until the next exit.
    ///
    /// # Errors
    /// Fails if KVM_RUN fails for a reason that a guest cannot cause.
    fn run(&mut self, entry: VmEntry) -> Result<VmExit>;

    /// Completes the last exit with `entry`, without running the guest. Then the result of the
    /// guest's load, SBI call or CSR access is in its registers, and the next [`Vcpu::run`] takes
    /// [`VmEntry::Run`]. Before this call, the registers may be in the middle of an instruction.
    ///
    /// Does not take a reset that is pending for the hart (SBI HSM or SUSP): KVM does that only
    /// when it enters the guest. May be called at any time, also twice. Does not change the
    /// immediate exit that another thread requests or takes back at the same time: see [`Kicker`].
    ///
    /// # Errors
    /// Fails if KVM_RUN fails for a reason that a guest cannot cause.
    fn complete(&mut self, entry: VmEntry) -> Result<()>;

    /// Reads a register of up to 64 bits. `None` if the vCPU has no such register on this host.
    fn reg(&self, id: RegId) -> Result<Option<u64>>;

    /// Writes a register of up to 64 bits.
    fn set_reg(&self, id: RegId, value: u64) -> Result<()>;

    /// Reads a register of any width: [`RegId::width`] bytes, little-endian. `None` if the vCPU has
    /// no such register on this host.
    fn reg_bytes(&self, id: RegId) -> Result<Option<Vec<u8>>>;

    /// Writes a register of any width. `bytes` are little-endian.
    ///
    /// # Errors
    /// Fails if the length of `bytes` is not the register's width, or if the kernel refuses the
    /// write.
    fn set_reg_bytes(&self, id: RegId, bytes: &[u8]) -> Result<()>;

    /// The registers that this vCPU has (KVM_GET_REG_LIST), in the kernel's order. Registers cannot
    /// be restored in this order. The list has the registers that switch one extension, but not
    /// those that switch several at once.
    fn reg_list(&self) -> Result<Vec<RegId>>;

    /// With `on`, each `ebreak` of the guest causes a [`VmExit::Breakpoint`]; without, it traps in
    /// the guest as usual (KVM_SET_GUEST_DEBUG). riscv64 has no watchpoints and no single steps.
    fn set_guest_debug(&self, on: bool) -> Result<()>;

    /// The wire to this hart's supervisor external interrupt. It may outlive the vCPU.
    fn external_irq(&self) -> Result<Arc<dyn ExternalIrq>>;

    /// Whether the hart is started (KVM_GET_MP_STATE).
    fn hart_state(&self) -> Result<HartState>;

    /// Starts or stops the hart (KVM_SET_MP_STATE). Its registers do not change.
    fn set_hart_state(&self, state: HartState) -> Result<()>;

    /// KVM's counters for this vCPU.
    fn counters(&self) -> Result<Vec<Counter>>;

    /// A handle by which other threads can see whether this vCPU waits for an interrupt.
    fn waiting(&self) -> Result<Box<dyn Waiting>>;

    /// The vCPU as a [`kvm::KvmVcpu`], if it is one. The loop of a vCPU's thread is compiled for
    /// that type: see [`RunAnd`].
    #[cfg(target_arch = "riscv64")]
    fn as_kvm(&mut self) -> Option<&mut kvm::KvmVcpu> {
        None
    }

    /// A handle by which other threads can make [`Vcpu::run`] return.
    fn kicker(&self) -> Result<Box<dyn Kicker>>;
}

/// Serves the exits of a vCPU.
pub trait Serve {
    /// The result of serving an exit.
    type Next;

    /// Serves `exit`. Implementations should be inlined: see [`RunAnd`].
    fn serve(&mut self, exit: VmExit) -> Self::Next;
}

/// One step of a vCPU's loop: runs the guest, and serves its exit. With KVM's vCPU, each frequent
/// kind of exit has its own inlined copy of [`Serve::serve`], so that no exit has to be written to
/// memory and read back.
pub trait RunAnd {
    /// Calls [`Vcpu::run`], lets `server` serve the exit, and returns its result.
    ///
    /// # Errors
    /// As for [`Vcpu::run`].
    fn run_and<S: Serve>(&mut self, entry: VmEntry, server: &mut S) -> Result<S::Next>;

    /// This vCPU as a [`Vcpu`].
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

/// A hart's state in the SBI's HSM extension. KVM has only these two (KVM_MP_STATE_*).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HartState {
    /// The hart is started, or about to be. KVM_RUN runs it.
    Started,
    /// The hart is stopped. KVM_RUN sleeps until another hart starts it.
    Stopped,
}

/// Lets another thread see whether a vCPU waits for an interrupt.
pub trait Waiting: Send + Sync {
    /// True while the vCPU sleeps in the kernel after a WFI. False if the host cannot say.
    fn waits(&self) -> bool;
}

/// Lets another thread make [`Vcpu::run`] return. That thread calls
/// [`Kicker::set_immediate_exit`] first, and then sends a signal to the vCPU's thread.
///
/// KVM has one byte for this, `immediate_exit`, and checks only whether it is 0. The kicker uses
/// bit 0; [`Vcpu::complete`] uses bit 1 while it runs. Each changes only its own bit, so neither
/// undoes the other.
pub trait Kicker: Send + Sync {
    /// While `on`, [`Vcpu::run`] completes the last exit and returns [`VmExit::Interrupted`]
    /// without running the guest (KVM's `immediate_exit`).
    fn set_immediate_exit(&self, on: bool);
}

/// The supervisor external interrupt of one hart, for an interrupt controller in userspace.
pub trait ExternalIrq: Send + Sync {
    /// Sets the level of the interrupt. Any thread may call this, also while the hart runs.
    fn set_external(&self, high: bool) -> Result<()>;
}
