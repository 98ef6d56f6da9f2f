//! KVM on riscv64, mostly through kvm-ioctls. The kernel's side is in `arch/riscv/kvm/vm.c` and
//! `aia_device.c`.
#![allow(unsafe_code)]

mod vcpu;

pub use vcpu::KvmVcpu;

use std::fs;
use std::io;
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_BINARY_STATS_FD, KVM_CAP_COALESCED_MMIO,
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_HALT_POLL, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IOEVENTFD,
    KVM_CAP_IRQ_ROUTING, KVM_CAP_IRQCHIP, KVM_CAP_IRQFD, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_MAX_VCPUS, KVM_CAP_MP_STATE, KVM_CAP_NR_MEMSLOTS, KVM_CAP_NR_VCPUS, KVM_CAP_ONE_REG,
    KVM_CAP_READONLY_MEM, KVM_CAP_SET_GUEST_DEBUG, KVM_CAP_SIGNAL_MSI, KVM_CAP_VM_GPA_BITS,
    KVM_DEV_RISCV_AIA_ADDR_APLIC, KVM_DEV_RISCV_AIA_CTRL_INIT, KVM_DEV_RISCV_AIA_GRP_ADDR,
    KVM_DEV_RISCV_AIA_GRP_APLIC, KVM_DEV_RISCV_AIA_GRP_CONFIG, KVM_DEV_RISCV_AIA_GRP_CTRL,
    KVM_DEV_RISCV_AIA_GRP_IMSIC, KVM_DEV_RISCV_AIA_IMSIC_ISEL_BITS,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_IRQ_ROUTING_MSI, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY, KVMIO, KvmIrqRouting, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_RISCV_AIA, kvm_enable_cap,
    kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, DeviceFd, IoEventAddress, NoDatamatch, VmFd};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::host::{Unfit, explain_open};
use super::memslot::{Memslots, Placed};
use super::{Aia, AiaConfig, Doorbell, Error, Hypervisor, Memslot, MsiMessage, Result, Vcpu, Vm};
use crate::memory::PAGE_SIZE;
use crate::util::sync::lock;
use crate::util::{ByteSize, Half};

/// The largest memslot (KVM_MEM_MAX_NR_PAGES in `include/linux/kvm_host.h`, in pages).
const MEMSLOT_MAX: ByteSize = ByteSize(((1 << 31) - 1) * PAGE_SIZE);

/// The guest-physical address width of the narrowest G-stage mode, Sv39x4. Used if the kernel does
/// not report the width.
const GPA_BITS_MIN: u32 = 41;

/// An open /dev/kvm.
#[derive(Debug)]
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens /dev/kvm.
    ///
    /// # Errors
    /// [`Error::Host`], whose message says what this host lacks.
    pub fn open() -> Result<Self> {
        let fd = kvm_ioctls::Kvm::new().map_err(|errno| {
            let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            explain_open(&errno.into(), &cpuinfo)
        })?;
        match fd.get_api_version() {
            version if u32::try_from(version) == Ok(KVM_API_VERSION) => Ok(Self { fd }),
            version => Err(Unfit::ApiVersion(version).into()),
        }
    }
}

/// The capabilities that `rvmm info` shows. In the kernel's header their names begin with KVM_CAP_.
const CAPABILITIES: [(&str, u32); 18] = [
    ("BINARY_STATS_FD", KVM_CAP_BINARY_STATS_FD),
    ("COALESCED_MMIO", KVM_CAP_COALESCED_MMIO),
    ("DIRTY_LOG_RING_ACQ_REL", KVM_CAP_DIRTY_LOG_RING_ACQ_REL),
    ("HALT_POLL", KVM_CAP_HALT_POLL),
    ("IMMEDIATE_EXIT", KVM_CAP_IMMEDIATE_EXIT),
    ("IOEVENTFD", KVM_CAP_IOEVENTFD),
    ("IRQCHIP", KVM_CAP_IRQCHIP),
    ("IRQFD", KVM_CAP_IRQFD),
    ("IRQ_ROUTING", KVM_CAP_IRQ_ROUTING),
    (
        "MANUAL_DIRTY_LOG_PROTECT2",
        KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    ),
    ("MAX_VCPUS", KVM_CAP_MAX_VCPUS),
    ("MP_STATE", KVM_CAP_MP_STATE),
    ("NR_MEMSLOTS", KVM_CAP_NR_MEMSLOTS),
    ("NR_VCPUS", KVM_CAP_NR_VCPUS),
    ("ONE_REG", KVM_CAP_ONE_REG),
    ("READONLY_MEM", KVM_CAP_READONLY_MEM),
    ("SET_GUEST_DEBUG", KVM_CAP_SET_GUEST_DEBUG),
    ("SIGNAL_MSI", KVM_CAP_SIGNAL_MSI),
];

impl Hypervisor for Kvm {
    fn capabilities(&self) -> Vec<(&'static str, i32)> {
        let ask = |(name, number): (_, u32)| (name, self.fd.check_extension_raw(number.into()));
        CAPABILITIES.into_iter().map(ask).collect()
    }

    fn create_vm(&self) -> Result<Arc<dyn Vm>> {
        let fd = self
            .fd
            .create_vm()
            .map_err(|e| Error::refused("create a virtual machine (KVM_CREATE_VM)", e))?;
        let inner = VmInner {
            fd,
            memslots: Mutex::default(),
        };
        Ok(Arc::new(KvmVm(Arc::new(inner))))
    }
}

/// The VM's descriptor, and the memory that the VM uses.
struct VmInner {
    fd: VmFd,
    /// Each vCPU holds a reference to this, so the memory stays mapped until the last one is
    /// dropped.
    memslots: Mutex<Memslots>,
}

impl VmInner {
    /// Adds or changes the memslot `placed` in the kernel, or removes it if `is_there` is false.
    fn set_memslot(&self, placed: &Placed, is_there: bool) -> io::Result<()> {
        let Memslot { gpa, mapping, .. } = &placed.memslot;
        let flag = |flag, is_set| if is_set { flag } else { 0 };
        let region = kvm_userspace_memory_region {
            slot: placed.number,
            flags: flag(KVM_MEM_LOG_DIRTY_PAGES, placed.logged)
                | flag(KVM_MEM_READONLY, placed.memslot.readonly),
            guest_phys_addr: gpa.0,
            memory_size: if is_there { mapping.size() as u64 } else { 0 },
            userspace_addr: mapping.as_ptr() as u64,
        };
        // SAFETY: the mapping has this size. `self.memslots` keeps it mapped until the memslot is
        // removed, or until the VM and all its vCPUs, which hold `self`, are dropped.
        unsafe { self.fd.set_user_memory_region(region) }?;
        Ok(())
    }
}

/// The memslot `name`. `act` is what the caller wants to do with it, for the error message.
fn find(memslots: &Memslots, name: &str, act: &str) -> Result<Placed> {
    let found = memslots.find(name).cloned();
    found.map_err(|e| Error::refused(format!("{act} memslot {name}"), e))
}

/// Ioctls that kvm-ioctls does not have.
mod ioctls {
    use super::{KVMIO, kvm_clear_dirty_log};

    vmm_sys_util::ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}

struct KvmVm(Arc<VmInner>);

impl Vm for KvmVm {
    fn check_ram(&self, base: GuestAddress, size: ByteSize) -> Result<()> {
        let bits = self.gpa_bits();
        // KVM requires that RAM ends below the limit, not at it (kvm_arch_prepare_memory_region).
        let max = ByteSize((1u64 << bits.min(63)) - base.0 - PAGE_SIZE);
        if size > max {
            return Err(Error::GpaWidth { size, bits, max });
        }
        if size > MEMSLOT_MAX {
            let max = MEMSLOT_MAX;
            return Err(Error::MemslotSize { size, max });
        }
        Ok(())
    }

    fn gpa_bits(&self) -> u32 {
        let bits = self.0.fd.check_extension_raw(KVM_CAP_VM_GPA_BITS.into());
        u32::try_from(bits).unwrap_or(0).max(GPA_BITS_MIN)
    }

    fn max_vcpus(&self) -> u32 {
        let max = self.0.fd.check_extension_int(Cap::MaxVcpus);
        u32::try_from(max).unwrap_or(0).max(1)
    }

    fn add_memslot(&self, memslot: Memslot) -> Result<()> {
        let name = memslot.name;
        let mut memslots = lock(&self.0.memslots);
        let placed = memslots.place(memslot);
        let placed = placed.map_err(|e| Error::refused(format!("give the guest its {name}"), e))?;
        self.0.set_memslot(&placed, true).map_err(|e| {
            let act = format!("give the guest its {name} (memslot {})", placed.number);
            Error::refused(act, e)
        })?;
        memslots.insert(placed);
        Ok(())
    }

    fn remove_memslot(&self, name: &str) -> Result<()> {
        let act = "remove";
        let mut memslots = lock(&self.0.memslots);
        let placed = find(&memslots, name, act)?;
        let removed = self.0.set_memslot(&placed, false);
        removed.map_err(|e| Error::refused(format!("{act} memslot {name}"), e))?;
        memslots.remove(placed.number);
        Ok(())
    }

    fn set_dirty_log(&self, name: &str, on: bool) -> Result<()> {
        let act = "log the guest's writes to";
        let mut memslots = lock(&self.0.memslots);
        let mut placed = find(&memslots, name, act)?;
        placed.logged = on;
        let set = self.0.set_memslot(&placed, true);
        set.map_err(|e| Error::refused(format!("{act} memslot {name}"), e))?;
        memslots.insert(placed);
        Ok(())
    }

    fn dirty_log(&self, name: &str) -> Result<Vec<u64>> {
        let act = "read the dirty log of";
        let placed = find(&lock(&self.0.memslots), name, act)?;
        // kvm-ioctls allocates the bitmap for the given size, and the kernel writes the bitmap of
        // the whole memslot. So this has to be the memslot's size.
        let size = placed.memslot.mapping.size();
        let read = self.0.fd.get_dirty_log(placed.number, size);
        read.map_err(|e| Error::refused(format!("{act} memslot {name} (KVM_GET_DIRTY_LOG)"), e))
    }

    fn clear_dirty_log_by_hand(&self) -> Result<bool> {
        let cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
        let offered = self.0.fd.check_extension_raw(cap.into());
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
        if u32::try_from(offered).unwrap_or(0) & wanted == 0 {
            return Ok(false);
        }
        let enable = kvm_enable_cap {
            cap,
            args: [wanted.into(), 0, 0, 0],
            ..Default::default()
        };
        let act = "clear dirty logs by hand (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)";
        let enabled = self.0.fd.enable_cap(&enable);
        enabled.map_err(|e| Error::refused(act, e))?;
        Ok(true)
    }

    fn clear_dirty_log(&self, name: &str, first: usize, pages: &[u64]) -> Result<()> {
        let act = "clear the dirty log of";
        let refused = |e| Error::refused(format!("{act} memslot {name} (KVM_CLEAR_DIRTY_LOG)"), e);
        let placed = find(&lock(&self.0.memslots), name, act)?;
        let (first_page, num_pages) = placed.pages(first, pages.len()).map_err(refused)?;
        let request = kvm_clear_dirty_log {
            slot: placed.number,
            num_pages,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: pages.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: the descriptor is a VM's. KVM only reads the bitmap, and no more words than
        // `num_pages` needs, which `pages` has.
        match unsafe { ioctl_with_ref(&self.0.fd, ioctls::KVM_CLEAR_DIRTY_LOG(), &request) } {
            0 => Ok(()),
            _ => Err(refused(io::Error::last_os_error())),
        }
    }

    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>> {
        let fd = self
            .0
            .fd
            .create_vcpu(id.into())
            .map_err(|e| Error::refused(format!("create vCPU {id}"), e))?;
        Ok(Box::new(vcpu::KvmVcpu::new(fd, Arc::clone(&self.0), id)))
    }

    fn create_aia(&self) -> Result<Option<Box<dyn Aia>>> {
        if !self.0.fd.check_extension(Cap::Irqchip) {
            return Ok(None);
        }
        let mut device = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_RISCV_AIA,
            fd: 0,
            flags: 0,
        };
        let fd = self
            .0
            .fd
            .create_device(&mut device)
            .map_err(|e| Error::refused("create the in-kernel AIA", e))?;
        Ok(Some(Box::new(KvmAia { fd })))
    }

    fn set_irq_line(&self, source: u32, high: bool) -> Result<()> {
        self.0
            .fd
            .set_irq_line(source, high)
            .map_err(|e| Error::refused(format!("set interrupt line {source}"), e))
    }

    fn connect_doorbell(&self, Doorbell { gpa, value }: Doorbell, fd: &EventFd) -> Result<()> {
        let (vm, at) = (&self.0.fd, IoEventAddress::Mmio(gpa));
        match value {
            Some(value) => vm.register_ioevent(fd, &at, value),
            None => vm.register_ioevent(fd, &at, NoDatamatch),
        }
        .map_err(|e| {
            Error::refused(
                format!("connect the doorbell at {gpa:#x} (KVM_IOEVENTFD)"),
                e,
            )
        })
    }

    fn disconnect_doorbell(&self, Doorbell { gpa, value }: Doorbell, fd: &EventFd) -> Result<()> {
        let (vm, at) = (&self.0.fd, IoEventAddress::Mmio(gpa));
        match value {
            Some(value) => vm.unregister_ioevent(fd, &at, value),
            None => vm.unregister_ioevent(fd, &at, NoDatamatch),
        }
        .map_err(|e| {
            Error::refused(
                format!("disconnect the doorbell at {gpa:#x} (KVM_IOEVENTFD)"),
                e,
            )
        })
    }

    fn connect_irqfd(&self, gsi: u32, fd: &EventFd) -> Result<()> {
        let connected = self.0.fd.register_irqfd(fd, gsi);
        connected.map_err(|e| Error::refused(format!("connect interrupt {gsi} (KVM_IRQFD)"), e))
    }

    fn disconnect_irqfd(&self, gsi: u32, fd: &EventFd) -> Result<()> {
        let disconnected = self.0.fd.unregister_irqfd(fd, gsi);
        disconnected
            .map_err(|e| Error::refused(format!("disconnect interrupt {gsi} (KVM_IRQFD)"), e))
    }

    fn set_msi_routes(&self, routes: &[(u32, MsiMessage)]) -> Result<()> {
        let entry = |&(gsi, message): &(u32, MsiMessage)| kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                msi: kvm_irq_routing_msi {
                    address_lo: Half::Low.of(message.address),
                    address_hi: Half::High.of(message.address),
                    data: message.data,
                    ..Default::default()
                },
            },
            ..Default::default()
        };
        let act = "route message-signalled interrupts (KVM_SET_GSI_ROUTING)";
        let entries: Vec<_> = routes.iter().map(entry).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|e| Error::refused(act, io::Error::other(format!("{e:?}"))))?;
        self.0
            .fd
            .set_gsi_routing(&table)
            .map_err(|e| Error::refused(act, e))
    }

    fn signal_msi(&self, MsiMessage { address, data }: MsiMessage) -> Result<()> {
        let message = kvm_msi {
            address_lo: Half::Low.of(address),
            address_hi: Half::High.of(address),
            data,
            ..Default::default()
        };
        let sent = self.0.fd.signal_msi(message);
        let act = || format!("send message {data} to {address:#x} (KVM_SIGNAL_MSI)");
        sent.map_err(|e| Error::refused(act(), e))?;
        Ok(())
    }
}

struct KvmAia {
    fd: DeviceFd,
}

impl KvmAia {
    /// Sets an attribute. KVM reads its value from memory as a `T`, which has to be u32 for the
    /// groups CONFIG and APLIC, and u64 for ADDR and IMSIC.
    fn set<T>(&self, group: u32, attr: u64, value: &T, act: impl Fn() -> String) -> Result<()> {
        let attr = kvm_device_attr {
            flags: 0,
            group,
            attr,
            addr: std::ptr::from_ref(value) as u64,
        };
        self.fd
            .set_device_attr(&attr)
            .map_err(|e| Error::refused(act(), e))
    }

    /// Reads an attribute.
    ///
    /// # Safety
    /// `T` has to be the type that KVM writes for this attribute.
    unsafe fn get<T: Default>(&self, group: u32, attr: u64, act: impl Fn() -> String) -> Result<T> {
        let mut value = T::default();
        let mut request = kvm_device_attr {
            flags: 0,
            group,
            attr,
            addr: std::ptr::from_mut(&mut value) as u64,
        };
        // SAFETY: the caller guarantees that KVM writes a `T`, and `value` is one.
        unsafe { self.fd.get_device_attr(&mut request) }.map_err(|e| Error::refused(act(), e))?;
        Ok(value)
    }
}

/// KVM_DEV_RISCV_AIA_IMSIC_MKATTR, a macro that the bindings do not have.
fn imsic_attr(hart: u32, select: u64) -> u64 {
    (u64::from(hart) << KVM_DEV_RISCV_AIA_IMSIC_ISEL_BITS) | select
}

impl Aia for KvmAia {
    fn set_config(&self, attr: AiaConfig, value: u32) -> Result<()> {
        let act = || format!("set the AIA's {attr:?} to {value}");
        self.set(KVM_DEV_RISCV_AIA_GRP_CONFIG, attr as u64, &value, act)
    }

    fn config(&self, attr: AiaConfig) -> Result<u32> {
        let act = || format!("read the AIA's {attr:?}");
        // SAFETY: attributes of group CONFIG are a u32 (aia_get_attr).
        unsafe { self.get(KVM_DEV_RISCV_AIA_GRP_CONFIG, attr as u64, act) }
    }

    fn place_aplic(&self, base: GuestAddress) -> Result<()> {
        let (group, attr) = (KVM_DEV_RISCV_AIA_GRP_ADDR, KVM_DEV_RISCV_AIA_ADDR_APLIC);
        let act = || format!("place the APLIC at {:#x}", base.0);
        self.set(group, attr.into(), &base.0, act)
    }

    fn place_imsic(&self, index: u32, base: GuestAddress) -> Result<()> {
        // KVM_DEV_RISCV_AIA_ADDR_IMSIC(i), a macro that the bindings do not have.
        let attr = 1 + u64::from(index);
        let act = || format!("place the IMSIC of vCPU {index} at {:#x}", base.0);
        self.set(KVM_DEV_RISCV_AIA_GRP_ADDR, attr, &base.0, act)
    }

    fn init(&self) -> Result<()> {
        let (group, attr) = (KVM_DEV_RISCV_AIA_GRP_CTRL, KVM_DEV_RISCV_AIA_CTRL_INIT);
        self.set(group, attr.into(), &0u64, || {
            "initialise the in-kernel AIA".into()
        })
    }

    fn imsic(&self, hart: u32, select: u64) -> Result<u64> {
        let act = || format!("read register {select:#x} of the IMSIC of hart {hart}");
        let (group, attr) = (KVM_DEV_RISCV_AIA_GRP_IMSIC, imsic_attr(hart, select));
        // SAFETY: attributes of group IMSIC are an unsigned long (aia_imsic.c).
        unsafe { self.get(group, attr, act) }
    }

    fn set_imsic(&self, hart: u32, select: u64, value: u64) -> Result<()> {
        let act = || format!("write register {select:#x} of the IMSIC of hart {hart}");
        let attr = imsic_attr(hart, select);
        self.set(KVM_DEV_RISCV_AIA_GRP_IMSIC, attr, &value, act)
    }

    fn aplic(&self, offset: u32) -> Result<u32> {
        let act = || format!("read register {offset:#x} of the APLIC");
        // SAFETY: attributes of group APLIC are a u32 (aia_get_attr).
        unsafe { self.get(KVM_DEV_RISCV_AIA_GRP_APLIC, offset.into(), act) }
    }

    fn set_aplic(&self, offset: u32, value: u32) -> Result<()> {
        let act = || format!("write register {offset:#x} of the APLIC");
        self.set(KVM_DEV_RISCV_AIA_GRP_APLIC, offset.into(), &value, act)
    }
}
