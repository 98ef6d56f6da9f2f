//! Instruction caches of the host's harts.
#![allow(unsafe_code)]

/// Makes all threads of this process, guests included, execute what has been written to memory
/// before this call. A hart on RISC-V may otherwise execute an older instruction from its cache
/// (RISC-V ISA, "Zifencei").
pub fn flush() {
    #[cfg(target_arch = "riscv64")]
    {
        /// `riscv_flush_icache` (Linux's `arch/riscv/include/uapi/asm/unistd.h`).
        const FLUSH_ICACHE: libc::c_long = 259;
        // SAFETY: the call takes a range of addresses, which Linux ignores, and flags: 0 is for all
        // threads. It does not access memory.
        unsafe { libc::syscall(FLUSH_ICACHE, 0, usize::MAX, 0) };
    }
}
