//! Random bytes from the host.

use std::io;

use rustix::io::retry_on_intr;
use rustix::rand::{GetRandomFlags, getrandom};

/// Returns `N` random bytes, at most 256. Waits until the host's entropy pool is ready, which it is
/// long before a VM starts.
///
/// # Errors
/// Fails if the host has no getrandom(2).
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // Once the pool is ready, a read of up to 256 bytes returns all of them.
    match retry_on_intr(|| getrandom(&mut bytes, GetRandomFlags::empty()))? {
        all if all == N => Ok(bytes),
        short => Err(io::Error::other(format!("got only {short} bytes"))),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn each_call_returns_others() {
        assert_ne!(super::bytes::<16>().unwrap(), super::bytes().unwrap());
    }
}
