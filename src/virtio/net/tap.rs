//! Tap interfaces of the host (`Documentation/networking/tuntap.rst`).
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::str::FromStr;

use libc::{c_char, c_int, c_uint};
use rustix::event::PollFlags;
use thiserror::Error;
use vmm_sys_util::ioctl::{ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_iow_nr;

use crate::util::poll::poll_now;

const TUN: &str = "/dev/net/tun";
/// A folder for each interface of this network namespace.
const INTERFACES: &str = "/sys/class/net";

/// `include/uapi/linux/if_tun.h`.
#[allow(missing_docs)]
mod requests {
    use super::{c_int, c_uint, ioctl_iow_nr};

    const TUN: c_uint = b'T' as c_uint;
    ioctl_iow_nr!(TUNSETIFF, TUN, 202, c_int);
    ioctl_iow_nr!(TUNSETOFFLOAD, TUN, 208, c_uint);
    ioctl_iow_nr!(TUNSETVNETHDRSZ, TUN, 216, c_int);
    ioctl_iow_nr!(TUNSETQUEUE, TUN, 217, c_int);
}
use requests::{TUNSETIFF, TUNSETOFFLOAD, TUNSETQUEUE, TUNSETVNETHDRSZ};

/// Why a tap cannot be had. `name` is the interface's.
#[derive(Debug, Error)]
pub enum TapError {
    /// There is no such interface.
    #[error(
        "Failed to open tap {0:?}: there is no such interface: ip tuntap add dev {0} mode tap && \
         ip link set {0} up (with iproute2's ip) makes it"
    )]
    Missing(String),
    /// The host has no taps.
    #[error("Failed to open tap {name:?}: {TUN}: {error}: modprobe tun, or run as one who may")]
    NoTun {
        /// The interface.
        name: String,
        /// Why.
        error: io::Error,
    },
    /// The host said no.
    #[error("Failed to open tap {name:?}: {error}{}", hint(.error))]
    Refused {
        /// The interface.
        name: String,
        /// Why.
        error: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EBUSY) => ": another process has it",
        Some(libc::EPERM) => {
            ": only root, or its owner (ip tuntap add ... user NAME), may attach to it"
        }
        Some(libc::EINVAL) => ": it is no tap",
        _ => "",
    }
}

/// One queue of a tap: packets with a virtio header before them, of [`HEADER`] bytes until
/// [`TapQueue::set_header`] says otherwise. Reads and writes do not wait.
pub struct TapQueue {
    file: File,
    name: String,
    multi: bool,
}

/// What the reader of a tap takes over from the host: flags of TUNSETOFFLOAD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums that are not filled in yet.
    pub checksum: bool,
    /// TCP segments over IPv4, IPv6 that are larger than a packet; they need `checksum`.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// Such segments with ECN.
    pub ecn: bool,
}

/// Bytes of `struct virtio_net_hdr_v1`.
pub const HEADER: usize = 12;
/// Bytes of `struct virtio_net_hdr`, which has no `num_buffers`.
pub const HEADER_SHORT: usize = 10;

impl TapQueue {
    /// Opens `count` queues of the interface `name`, or one where it was not made for several.
    ///
    /// # Errors
    /// One line that names the way out.
    pub fn open(name: &str, count: usize) -> Result<Vec<Self>, TapError> {
        if !Path::new(INTERFACES).join(name).exists() {
            return Err(TapError::Missing(name.to_owned()));
        }
        if count > 1 {
            match (0..count).map(|_| Self::attach(name, true)).collect() {
                Err(TapError::Refused { error, .. })
                    if error.raw_os_error() == Some(libc::EINVAL) => {}
                queues => return queues,
            }
        }
        Ok(vec![Self::attach(name, false)?])
    }

    fn attach(name: &str, multi: bool) -> Result<Self, TapError> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK);
        let file = options.open(TUN).map_err(|error| TapError::NoTun {
            name: name.to_owned(),
            error,
        })?;
        let queue = Self {
            file,
            name: name.to_owned(),
            multi,
        };
        queue.configure(name).map_err(|error| TapError::Refused {
            name: name.to_owned(),
            error,
        })?;
        Ok(queue)
    }

    fn configure(&self, name: &str) -> io::Result<()> {
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if self.multi {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let request = interface(name, flags)?;
        // SAFETY: TUNSETIFF reads a struct ifreq, which `request` is.
        check(unsafe { ioctl_with_ref(&self.file, TUNSETIFF(), &request) })?;
        self.set_header(HEADER)
    }

    /// How many bytes of header are before each packet from now on: [`HEADER`] or [`HEADER_SHORT`].
    ///
    /// # Errors
    /// The host's.
    pub fn set_header(&self, bytes: usize) -> io::Result<()> {
        let size = c_int::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        check(unsafe { ioctl_with_ref(&self.file, TUNSETVNETHDRSZ(), &size) })
    }

    /// What packets read from here may be like from now on.
    ///
    /// # Errors
    /// The host's.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        // The host takes segments only with checksums, and ECN only with segments.
        let tso4 = offloads.tso4 && offloads.checksum;
        let tso6 = offloads.tso6 && offloads.checksum;
        let flags = [
            (offloads.checksum, libc::TUN_F_CSUM),
            (tso4, libc::TUN_F_TSO4),
            (tso6, libc::TUN_F_TSO6),
            (offloads.ecn && (tso4 || tso6), libc::TUN_F_TSO_ECN),
        ];
        let flags = flags.into_iter().filter(|(on, _)| *on);
        let flags = flags.fold(0, |all, (_, flag)| all | flag);
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { ioctl_with_val(&self.file, TUNSETOFFLOAD(), flags.into()) })
    }

    /// Whether the interface hands packets to this queue. One that is its only queue always gets them.
    ///
    /// # Errors
    /// The host's.
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        if !self.multi {
            return Ok(());
        }
        let flag = if attached {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        let request = interface("", flag)?;
        // SAFETY: TUNSETQUEUE reads a struct ifreq.
        let done = unsafe { ioctl_with_ref(&self.file, TUNSETQUEUE(), &request) };
        match check(done) {
            // It was so already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            done => done,
        }
    }

    /// For tests: packets come from and go to `file`.
    #[cfg(test)]
    pub(crate) fn of(file: File) -> Self {
        Self {
            file,
            name: String::new(),
            multi: false,
        }
    }

    /// The largest packet that the interface carries, without its Ethernet header; None where the host
    /// does not say.
    pub fn mtu(&self) -> Option<u16> {
        self.attribute("mtu")
    }

    /// Throws away the packets that wait to be read. They are at most as many as the interface keeps: a
    /// flood of others that come meanwhile does not hold this up. Returns how many it read.
    pub fn drain(&self) -> usize {
        /// As Linux makes taps.
        const KEPT: usize = 1_000;
        let kept = self.attribute("tx_queue_len").unwrap_or(KEPT);
        let mut header = [0; HEADER];
        let read = |_: &usize| match (&self.file).read(&mut header) {
            // What is wrong with one packet is not with the next.
            Ok(_) => true,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        };
        (0..kept).take_while(read).count()
    }

    /// What the host says of the interface (`Documentation/ABI/testing/sysfs-class-net`).
    fn attribute<T: FromStr>(&self, attribute: &str) -> Option<T> {
        let path = Path::new(INTERFACES).join(&self.name).join(attribute);
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    /// Whether the interface is gone: then every access fails, and nothing else tells of it.
    pub fn is_gone(&self) -> bool {
        poll_now(&self.file, PollFlags::IN).contains(PollFlags::ERR)
    }

    /// For who serves it in the kernel.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A struct ifreq of this name and these flags.
fn interface(name: &str, flags: c_int) -> io::Result<libc::ifreq> {
    // SAFETY: all of a struct ifreq may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays NUL.
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = flags.try_into().map_err(io::Error::other)?;
    Ok(request)
}

fn check(returned: c_int) -> io::Result<()> {
    if returned < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tap_names_the_way_out() {
        let line = TapQueue::open("rvmm-nope", 1).err().unwrap().to_string();
        assert!(
            line.contains("ip tuntap add dev rvmm-nope mode tap"),
            "{line}"
        );
    }

    /// /dev/zero is a tap that is never empty.
    #[test]
    fn a_flood_does_not_hold_up_who_drains() {
        let flood = TapQueue::of(File::open("/dev/zero").unwrap());
        assert_eq!(flood.drain(), 1_000);
    }

    #[test]
    fn an_interface_tells_its_mtu() {
        let mut queue = TapQueue::of(File::open("/dev/zero").unwrap());
        assert_eq!(queue.mtu(), None);
        // Every host has this one; its 65536 are more than a packet can have.
        queue.name = "lo".into();
        assert_eq!(queue.attribute::<u32>("mtu"), Some(65_536));
        assert_eq!(queue.mtu(), None);
    }

    #[test]
    fn names_are_bounded() {
        assert!(interface("fifteen-letters", 0).is_ok());
        assert!(interface("sixteen-letters!", 0).is_err());
    }
}
