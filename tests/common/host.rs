//! The kind of this host, asked from KVM itself, because the cases check what rvmm thinks of it.

use std::sync::OnceLock;

use kvm_bindings::{
    KVM_DEV_RISCV_AIA_CONFIG_MODE, KVM_DEV_RISCV_AIA_CONFIG_SRCS, KVM_DEV_RISCV_AIA_CTRL_INIT,
    KVM_DEV_RISCV_AIA_GRP_ADDR, KVM_DEV_RISCV_AIA_GRP_CONFIG, KVM_DEV_RISCV_AIA_GRP_CTRL,
    KVM_DEV_RISCV_AIA_GRP_IMSIC, KVM_DEV_RISCV_AIA_MODE_AUTO, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_RISCV_AIA,
};
use kvm_ioctls::Kvm;

const EINVAL: i32 = 22;
const ENODEV: i32 = 19;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An AIA with guest interrupt files: KVM's mode AUTO.
    Aia,
    /// An AIA without them: KVM emulates the IMSIC.
    AiaEmul,
    /// No AIA.
    NoAia,
}

impl Kind {
    /// Its name in `RVMM_TEST_HOST`.
    fn name(self) -> &'static str {
        match self {
            Kind::Aia => "aia",
            Kind::AiaEmul => "aia-emul",
            Kind::NoAia => "none",
        }
    }
}

/// The kind of this host. Panics, and so fails the case, if `RVMM_TEST_HOST` names another.
pub(crate) fn kind() -> Kind {
    static KIND: OnceLock<Kind> = OnceLock::new();
    let kind = *KIND.get_or_init(probe);
    if let Ok(want) = std::env::var("RVMM_TEST_HOST") {
        assert_eq!(
            kind.name(),
            want,
            "this host's kind differs from RVMM_TEST_HOST"
        );
    }
    kind
}

fn probe() -> Kind {
    let kvm =
        Kvm::new().unwrap_or_else(|e| panic!("these cases need /dev/kvm (modprobe kvm): {e}"));
    let vm = kvm.create_vm().expect("KVM_CREATE_VM");
    let mut device = kvm_create_device {
        type_: kvm_device_type_KVM_DEV_TYPE_RISCV_AIA,
        fd: 0,
        flags: 0,
    };
    let aia = match vm.create_device(&mut device) {
        Ok(aia) => aia,
        Err(e) if e.errno() == ENODEV => return Kind::NoAia,
        Err(e) => panic!("KVM_CREATE_DEVICE: {e}"),
    };
    let mode = KVM_DEV_RISCV_AIA_MODE_AUTO;
    let attr = kvm_device_attr {
        flags: 0,
        group: KVM_DEV_RISCV_AIA_GRP_CONFIG,
        attr: u64::from(KVM_DEV_RISCV_AIA_CONFIG_MODE),
        addr: std::ptr::from_ref(&mode).addr() as u64,
    };
    match aia.set_device_attr(&attr) {
        Ok(()) => Kind::Aia,
        Err(e) if e.errno() == EINVAL => Kind::AiaEmul,
        Err(e) => panic!("KVM_SET_DEVICE_ATTR of the AIA's mode: {e}"),
    }
}

/// Whether KVM has the SBI's system suspend (Linux 7.x).
pub(crate) fn has_suspend() -> bool {
    // KVM_REG_RISCV, 64 bits, group SBI_EXT, KVM_RISCV_SBI_EXT_SUSP.
    const SUSP: u64 = 0x8030_0000_0800_000b;
    let vm = Kvm::new().expect("/dev/kvm").create_vm().expect("a VM");
    let vcpu = vm.create_vcpu(0).expect("a vCPU");
    vcpu.get_one_reg(SUSP, &mut [0; 8]).is_ok()
}

/// Which of the bits in `enables` an emulated IMSIC keeps: writes and reads `eie0` of a VM with one
/// vCPU.
pub(crate) fn imsic_enables_kept(enables: u64) -> u64 {
    const APLIC: u64 = 0x0d00_0000;
    const IMSIC: u64 = 0x2800_0000;
    const EIE0: u64 = 0xc0;
    let vm = Kvm::new().expect("/dev/kvm").create_vm().expect("a VM");
    let mut device = kvm_create_device {
        type_: kvm_device_type_KVM_DEV_TYPE_RISCV_AIA,
        fd: 0,
        flags: 0,
    };
    let aia = vm.create_device(&mut device).expect("the AIA");
    let _vcpu = vm.create_vcpu(0).expect("a vCPU");
    let attr = |group: u32, attr: u64, addr: u64| kvm_device_attr {
        flags: 0,
        group,
        attr,
        addr,
    };
    let set = |group, number, value: u64| {
        let address = std::ptr::from_ref(&value).addr() as u64;
        aia.set_device_attr(&attr(group, number, address))
            .unwrap_or_else(|e| panic!("AIA group {group} attribute {number:#x}: {e}"));
    };
    set(
        KVM_DEV_RISCV_AIA_GRP_CONFIG,
        KVM_DEV_RISCV_AIA_CONFIG_SRCS.into(),
        31,
    );
    set(KVM_DEV_RISCV_AIA_GRP_ADDR, 0, APLIC);
    set(KVM_DEV_RISCV_AIA_GRP_ADDR, 1, IMSIC);
    set(
        KVM_DEV_RISCV_AIA_GRP_CTRL,
        KVM_DEV_RISCV_AIA_CTRL_INIT.into(),
        0,
    );
    set(KVM_DEV_RISCV_AIA_GRP_IMSIC, EIE0, enables);
    let mut kept = 0u64;
    let address = std::ptr::from_mut(&mut kept).addr() as u64;
    let mut request = attr(KVM_DEV_RISCV_AIA_GRP_IMSIC, EIE0, address);
    #[allow(
        unsafe_code,
        reason = "kvm-ioctls leaves the value's type to the caller"
    )]
    // SAFETY: KVM writes an unsigned long, which `kept` is.
    unsafe { aia.get_device_attr(&mut request) }.expect("read eie0");
    kept
}

/// Whether KVM gives a fetch from outside RAM to the guest as a fault. Linux 7.2 does so, and 6.12
/// leaves it to rvmm (`vcpu_exit.c`).
pub(crate) fn kvm_gives_fetch_faults() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("the release");
    let major = release.split('.').next().expect("a number");
    major.parse::<u32>().expect("a number") >= 7
}
