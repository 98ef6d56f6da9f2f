//! Exits and entries of a vCPU, as plain values.

use std::fmt;

/// Why the guest stopped running. These are plain values, which borrow nothing from the vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmExit {
    /// The guest loaded `len` bytes (1, 2, 4 or 8) from an address without RAM.
    MmioRead {
        /// Guest-physical address.
        gpa: u64,
        /// The number of bytes to read.
        len: usize,
    },
    /// The guest stored `len` bytes (1, 2, 4 or 8) to an address without RAM.
    MmioWrite {
        /// Guest-physical address.
        gpa: u64,
        /// The number of bytes written.
        len: usize,
        /// The bytes, in the guest's order. Only the first `len` are valid.
        data: [u8; 8],
    },
    /// The guest made an SBI call (ecall) that KVM does not serve itself.
    Sbi(SbiCall),
    /// The guest accessed a CSR that KVM does not serve itself.
    Csr {
        /// The CSR's number.
        number: u64,
    },
    /// The guest asked for a shutdown or reset, by SRST or the legacy shutdown call.
    System(SystemEvent),
    /// The guest executed an `ebreak`. The program counter is its address. See
    /// [`Vcpu::set_guest_debug`](super::Vcpu::set_guest_debug).
    Breakpoint,
    /// A signal or `immediate_exit` interrupted KVM_RUN.
    Interrupted,
    /// The guest did something that KVM cannot emulate, and KVM_RUN failed.
    Unrunnable {
        /// The error of KVM_RUN: EOPNOTSUPP, EIO or EFAULT.
        errno: i32,
        /// The program counter. 0 if the vCPU has no such register.
        pc: u64,
    },
    /// The host could not enter the guest.
    FailEntry {
        /// `hardware_entry_failure_reason` of `kvm_run`.
        reason: u64,
        /// The number of the host's CPU.
        cpu: u32,
    },
    /// An exit that rvmm does not know.
    Unknown {
        /// `kvm_run.exit_reason`.
        reason: u32,
    },
}

/// The result of the last exit, which completes it when the vCPU runs again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmEntry {
    /// The last exit needs no result, or is complete already.
    Run,
    /// The loaded value, little-endian, after a [`VmExit::MmioRead`].
    MmioRead(u64),
    /// The call's result, after a [`VmExit::Sbi`].
    Sbi(SbiRet),
    /// The CSR's old value, after a [`VmExit::Csr`].
    Csr(u64),
}

/// An SBI call: the guest's register values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SbiCall {
    /// The extension id (a7).
    pub extension: u64,
    /// The function id (a6).
    pub function: u64,
    /// The arguments (a0 to a5).
    pub args: [u64; 6],
}

/// An SBI extension id. Except for the oldest extensions, it is the extension's name in ASCII.
#[derive(Clone, Copy, Debug)]
pub struct SbiName(pub u64);

impl fmt::Display for SbiName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0.to_be_bytes();
        let name: Vec<u8> = bytes.into_iter().skip_while(|byte| *byte == 0).collect();
        match std::str::from_utf8(&name) {
            Ok(name) if name.len() > 1 && name.bytes().all(|b| b.is_ascii_graphic()) => {
                f.write_str(name)
            }
            _ => write!(f, "{:#x}", self.0),
        }
    }
}

/// The result of an SBI call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SbiRet {
    /// The error code (a0): 0, or a negative SBI_ERR_*.
    pub error: i64,
    /// The value (a1).
    pub value: u64,
}

/// The guest's request for the whole system (SBI specification, chapter "System Reset Extension").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SystemEvent {
    /// Power off.
    Shutdown {
        /// The SRST reset reason: 0 for none, 1 for a system failure.
        reason: u64,
    },
    /// Reboot. KVM does not say whether it is a cold or a warm one.
    Reset {
        /// The SRST reset reason: 0 for none, 1 for a system failure.
        reason: u64,
    },
    /// A type of event that riscv64's KVM does not report today.
    Other {
        /// `kvm_run.system_event.type`.
        kind: u32,
    },
}
