//! VIRTIO flags and feature bits, as constants of the right width.

/// Converts a flag of a ring or a descriptor to 16 bits, its width in RAM.
pub(super) const fn word(bit: u32) -> u16 {
    let [low, high, ..] = bit.to_le_bytes();
    u16::from_le_bytes([low, high])
}

/// Returns a set of features from their bit numbers.
pub(super) const fn features(bits: &[u32]) -> u64 {
    let (mut set, mut index) = (0, 0);
    while index < bits.len() {
        set |= 1 << bits[index];
        index += 1;
    }
    set
}
