//! Handles the SBI calls that KVM passes to userspace: the debug console, and the legacy console of
//! old kernels.
//!
//! RISC-V Supervisor Binary Interface 3.0, chapters "Debug Console Extension" and "Legacy
//! Extensions". KVM handles all other extensions itself. Any other call that reaches rvmm gets
//! SBI_ERR_NOT_SUPPORTED, and the guest goes on.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::devices::console::{Console, INPUT_CAPACITY, OUTPUT_CAPACITY};
use crate::hypervisor::{SbiCall, SbiRet};
use crate::memory::GuestMemory;

const LEGACY_PUTCHAR: u64 = 1;
const LEGACY_GETCHAR: u64 = 2;
const BASE_EXTENSION: u64 = 0x10;
const BASE_PROBE_EXTENSION: u64 = 3;
const DBCN: u64 = 0x4442_434e;
const DBCN_WRITE: u64 = 0;
const DBCN_READ: u64 = 1;
const DBCN_WRITE_BYTE: u64 = 2;

/// SBI_ERR_FAILED.
const FAILED: i64 = -1;
/// SBI_ERR_NOT_SUPPORTED.
const NOT_SUPPORTED: i64 = -2;
/// SBI_ERR_INVALID_PARAM.
const INVALID_PARAM: i64 = -3;

/// Bytes that are copied between guest RAM and console at a time.
const CHUNK: usize = 256;

/// Handles SBI calls. Never blocks, whatever the guest requests.
#[derive(Clone)]
pub struct Sbi {
    ram: Arc<GuestMemory>,
    console: Arc<Console>,
}

impl Sbi {
    /// Handles the calls of a guest with this RAM and this console.
    pub fn new(ram: Arc<GuestMemory>, console: Arc<Console>) -> Self {
        Self { ram, console }
    }

    /// The guest's RAM.
    pub(super) fn ram(&self) -> &Arc<GuestMemory> {
        &self.ram
    }

    /// Handles `call` and returns its result.
    #[inline(always)]
    pub fn call(&self, call: SbiCall) -> SbiRet {
        let [a0, a1, a2, ..] = call.args;
        match call.extension {
            DBCN => self.debug_console(call.function, a0, a1, a2),
            extension => self.other(extension, call.function, a0, a1),
        }
    }

    #[inline(never)]
    fn other(&self, extension: u64, function: u64, a0: u64, a1: u64) -> SbiRet {
        match (extension, function) {
            (LEGACY_PUTCHAR, _) => legacy(self.putchar(a0), a1),
            (LEGACY_GETCHAR, _) => legacy(self.getchar(), a1),
            // KVM forwards probes of the experimental and vendor extensions. rvmm has none of them.
            (BASE_EXTENSION, BASE_PROBE_EXTENSION) => answer(Ok(0)),
            _ => answer(Err(NOT_SUPPORTED)),
        }
    }

    /// Handles a debug console call. The arguments are numbers, not references, so that they stay
    /// in registers.
    #[inline(never)]
    fn debug_console(&self, function: u64, a0: u64, a1: u64, a2: u64) -> SbiRet {
        answer(match function {
            DBCN_WRITE | DBCN_READ if a0 == 0 && a2 == 0 => Ok(0),
            DBCN_WRITE => self.write(a0, a1, a2),
            DBCN_READ => self.read(a0, a1, a2),
            DBCN_WRITE_BYTE => self.write_byte(a0),
            _ => Err(NOT_SUPPORTED),
        })
    }

    /// Checks the byte range of a DBCN call: all of it must be RAM. `low` has the lowest XLEN bits
    /// of the address, and `high` the bits above. On rv64 no RAM is that high.
    fn range(&self, len: u64, low: u64, high: u64) -> Result<(GuestAddress, usize), i64> {
        let len = usize::try_from(len).map_err(|_| INVALID_PARAM)?;
        let base = GuestAddress(low);
        if high != 0 || !self.ram.check_range(base, len) {
            return Err(INVALID_PARAM);
        }
        Ok((base, len))
    }

    /// Queues as many bytes as the console has room for. The guest calls again with the rest.
    #[inline(never)]
    fn write(&self, len: u64, low: u64, high: u64) -> Result<u64, i64> {
        let (base, len) = self.range(len, low, high)?;
        let mut done = 0;
        while done < len.min(OUTPUT_CAPACITY) {
            let mut chunk = [0; CHUNK];
            let want = CHUNK.min(len - done);
            let bytes = &mut chunk[..want];
            if self.ram.read_slice(bytes, at(base, done)).is_err() {
                break;
            }
            let taken = self.console.write(bytes);
            done += taken;
            if taken < want {
                break;
            }
        }
        Ok(done as u64)
    }

    /// Copies waiting input to guest RAM.
    #[inline(never)]
    fn read(&self, len: u64, low: u64, high: u64) -> Result<u64, i64> {
        let (base, len) = self.range(len, low, high)?;
        let mut chunk = [0; CHUNK];
        let mut done = 0;
        while done < len.min(INPUT_CAPACITY) {
            let want = CHUNK.min(len - done);
            let count = self.console.read(&mut chunk[..want]);
            if self
                .ram
                .write_slice(&chunk[..count], at(base, done))
                .is_err()
            {
                break;
            }
            done += count;
            if count < want {
                break;
            }
        }
        Ok(done as u64)
    }

    /// The specification allows this call to block, but vCPU threads of rvmm never block: without
    /// room the call fails.
    #[inline(never)]
    fn write_byte(&self, byte: u64) -> Result<u64, i64> {
        match self.console.write(&[low_byte(byte)]) {
            1 => Ok(0),
            _ => Err(FAILED),
        }
    }

    #[inline(never)]
    fn putchar(&self, byte: u64) -> i64 {
        match self.console.write(&[low_byte(byte)]) {
            1 => 0,
            _ => FAILED,
        }
    }

    #[inline(never)]
    fn getchar(&self) -> i64 {
        let mut byte = [0];
        match self.console.read(&mut byte) {
            1 => byte[0].into(),
            _ => FAILED,
        }
    }
}

fn answer(outcome: Result<u64, i64>) -> SbiRet {
    match outcome {
        Ok(value) => SbiRet { error: 0, value },
        Err(error) => SbiRet { error, value: 0 },
    }
}

/// A legacy call returns its result in a0 and preserves a1.
fn legacy(a0: i64, a1: u64) -> SbiRet {
    SbiRet {
        error: a0,
        value: a1,
    }
}

/// The address `offset` bytes after `base`. The caller has checked the range.
fn at(base: GuestAddress, offset: usize) -> GuestAddress {
    GuestAddress(base.0.wrapping_add(offset as u64))
}

fn low_byte(register: u64) -> u8 {
    register.to_le_bytes()[0]
}

#[cfg(test)]
mod tests;
