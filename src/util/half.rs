//! The two halves of a 64-bit value that a device shows as two 32-bit registers.

/// The half of a 64-bit register that a 32-bit access reads or writes.
#[derive(Clone, Copy, Debug)]
pub enum Half {
    /// Bits 31 to 0.
    Low,
    /// Bits 63 to 32.
    High,
}

impl Half {
    /// This half of `value`.
    pub fn of(self, value: u64) -> u32 {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        match self {
            Half::Low => u32::from_le_bytes([a, b, c, d]),
            Half::High => u32::from_le_bytes([e, f, g, h]),
        }
    }

    /// `value` with this half replaced.
    pub fn set(self, value: u64, half: u32) -> u64 {
        match self {
            Half::Low => (value & !0xffff_ffff) | u64::from(half),
            Half::High => (value & 0xffff_ffff) | (u64::from(half) << 32),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_read_and_replaced() {
        let value = 0x0123_4567_89ab_cdef;
        assert_eq!(Half::Low.of(value), 0x89ab_cdef);
        assert_eq!(Half::High.of(value), 0x0123_4567);
        assert_eq!(Half::Low.set(value, 1), 0x0123_4567_0000_0001);
        assert_eq!(Half::High.set(value, 1), 0x0000_0001_89ab_cdef);
    }
}
