//! Flags and features of VIRTIO, in the widths they have.

/// A flag of a ring or a descriptor, which has 16 bits.
pub(super) const fn word(bit: u32) -> u16 {
    let [low, high, ..] = bit.to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// A set of feature bits.
pub(super) const fn features(bits: &[u32]) -> u64 {
    let (mut set, mut index) = (0, 0);
    while index < bits.len() {
        set |= 1 << bits[index];
        index += 1;
    }
    set
}
