//! The "test finisher" of SiFive's boards and of QEMU's virt machine. A guest stores one of these
//! values to power off or reset the machine (`hw/misc/sifive_test.c` of QEMU; the devicetree
//! binding `sifive,test1`).
//!
//! ```text
//! 0x5555            power off
//! 0x7777            reset
//! (code << 16) | 0x3333   power off with exit code `code`
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use crate::bus::{Device, FdtError, FdtWriter, MmioDevice};

/// Size of the register range, as on QEMU's virt machine.
pub const SIZE: u64 = 0x1000;

const PASS: u32 = 0x5555;
const RESET: u32 = 0x7777;
const FAIL: u32 = 0x3333;

/// The phandle of the device's node. No other node of the device tree has this phandle.
const PHANDLE: u32 = 0x1010;

/// A request of the guest that concerns the whole machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Power off.
    PowerOff,
    /// Reset the machine.
    Reset,
    /// Power off, with this exit code.
    Exit(u16),
}

/// Passes a [`Request`] from a device to the vCPU threads. They check for one after each MMIO
/// store.
#[derive(Debug, Default)]
pub struct PowerSwitch(AtomicU64);

impl PowerSwitch {
    /// Makes a request. Does nothing if there is one already.
    pub fn ask(&self, request: Request) {
        let word = match request {
            Request::PowerOff => 1,
            Request::Reset => 2,
            Request::Exit(code) => 3 | (u64::from(code) << 16),
        };
        let _ = self
            .0
            .compare_exchange(0, word, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The first request that was made, if any.
    #[inline]
    pub fn asked(&self) -> Option<Request> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            word => Some(decode(word)),
        }
    }
}

#[cold]
fn decode(word: u64) -> Request {
    match word & 0xffff {
        1 => Request::PowerOff,
        2 => Request::Reset,
        _ => Request::Exit(u16::try_from(word >> 16).unwrap_or(u16::MAX)),
    }
}

/// The test finisher. It has no state to save: a request ends the machine, or makes it anew.
pub struct SifiveTest {
    switch: Arc<PowerSwitch>,
    base: u64,
}

impl SifiveTest {
    /// Creates a test finisher at guest-physical address `base`. It makes its requests with
    /// `switch`.
    pub fn new(base: u64, switch: Arc<PowerSwitch>) -> Self {
        Self { switch, base }
    }
}

impl MmioDevice for SifiveTest {
    fn read(&self, _: u64, _: &mut [u8]) {}

    /// Handles stores of 16 and 32 bits at offset 0, as QEMU does. Other stores have no effect.
    fn write(&self, offset: u64, data: &[u8]) {
        let value = match (offset, data) {
            (0, [a, b]) => u32::from(u16::from_le_bytes([*a, *b])),
            (0, [a, b, c, d]) => u32::from_le_bytes([*a, *b, *c, *d]),
            _ => return,
        };
        let [_, _, code_low, code_high] = value.to_le_bytes();
        match value & 0xffff {
            PASS => self.switch.ask(Request::PowerOff),
            RESET => self.switch.ask(Request::Reset),
            FAIL => {
                let code = u16::from_le_bytes([code_low, code_high]);
                self.switch.ask(Request::Exit(code));
            }
            _ => {}
        }
    }
}

impl Device for SifiveTest {
    fn id(&self) -> &str {
        "sifive_test"
    }

    fn describe(&self) -> Value {
        json!({ "kind": "sifive_test", "registers": self.base })
    }

    fn fdt_node(&self, fdt: &mut FdtWriter) -> Result<(), FdtError> {
        let compatible = ["sifive,test1", "sifive,test0", "syscon"].map(String::from);
        let node = fdt.begin_node(&format!("test@{:x}", self.base))?;
        fdt.property_string_list("compatible", compatible.into())?;
        fdt.property_array_u64("reg", &[self.base, SIZE])?;
        fdt.property_phandle(PHANDLE)?;
        fdt.end_node(node)?;
        for (name, value) in [("poweroff", PASS), ("reboot", RESET)] {
            let node = fdt.begin_node(name)?;
            fdt.property_string("compatible", &format!("syscon-{name}"))?;
            fdt.property_u32("regmap", PHANDLE)?;
            fdt.property_u32("offset", 0)?;
            fdt.property_u32("value", value)?;
            fdt.end_node(node)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(offset: u64, data: &[u8]) -> Option<Request> {
        let switch = Arc::new(PowerSwitch::default());
        SifiveTest::new(0x10_0000, Arc::clone(&switch)).write(offset, data);
        switch.asked()
    }

    #[test]
    fn a_store_says_how_to_end() {
        assert_eq!(store(0, &[0x55, 0x55]), Some(Request::PowerOff));
        assert_eq!(store(0, &[0x55, 0x55, 9, 9]), Some(Request::PowerOff));
        assert_eq!(store(0, &[0x77, 0x77, 0, 0]), Some(Request::Reset));
        assert_eq!(store(0, &[0x33, 0x33, 42, 0]), Some(Request::Exit(42)));
        assert_eq!(store(0, &[0x33, 0x33, 0x2c, 1]), Some(Request::Exit(300)));
        assert_eq!(store(0, &[0x33, 0x33]), Some(Request::Exit(0)));
    }

    #[test]
    fn anything_else_has_no_effect() {
        for (offset, data) in [
            (0, &[0x55][..]),
            (0, &[0x55, 0x55, 0, 0, 0, 0, 0, 0]),
            (4, &[0x55, 0x55, 0, 0]),
            (0, &[0, 0, 0, 0]),
            (0, &[]),
        ] {
            assert_eq!(store(offset, data), None, "{offset} {data:x?}");
        }
    }

    #[test]
    fn the_first_request_counts() {
        let switch = PowerSwitch::default();
        switch.ask(Request::Exit(u16::MAX));
        switch.ask(Request::Reset);
        assert_eq!(switch.asked(), Some(Request::Exit(u16::MAX)));
    }
}
