//! The host's tap interfaces (`Documentation/networking/tuntap.rst`).
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
/// Has a folder for each interface in this network namespace.
const INTERFACES: &str = "/sys/class/net";

/// From `include/uapi/linux/if_tun.h`.
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

/// Why a tap could not be opened.
#[derive(Debug, Error)]
pub enum TapError {
    /// There is no such interface.
    #[error(
        "Failed to open tap {0:?}: there is no such interface: ip tuntap add dev {0} mode tap && \
         ip link set {0} up (with iproute2's ip) makes it"
    )]
    Missing(String),
    /// /dev/net/tun cannot be opened.
    #[error(
        "Failed to open tap {name:?}: {TUN}: {error}: load the module (modprobe tun), or run as a \
         user who may open it"
    )]
    NoTun {
        /// The interface's name.
        name: String,
        /// The error of the host.
        error: io::Error,
    },
    /// The host refused access to the interface.
    #[error("Failed to open tap {name:?}: {error}{}", hint(.error))]
    Refused {
        /// The interface's name.
        name: String,
        /// The error of the host.
        error: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EBUSY) => ": another process uses it",
        Some(libc::EPERM) => {
            ": only root, or its owner (ip tuntap add ... user NAME), may attach to it"
        }
        Some(libc::EINVAL) => ": it is not a tap",
        _ => "",
    }
}

/// One queue of a tap. Each packet has a virtio header before it, of [`HEADER`] bytes unless
/// [`TapQueue::set_header`] changes that. Reads and writes do not block.
pub struct TapQueue {
    file: File,
    name: String,
    multi: bool,
}

/// Work that the reader of a tap takes over from the host: flags of TUNSETOFFLOAD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// The reader accepts packets whose checksum is not filled in.
    pub checksum: bool,
    /// The reader accepts TCP packets over IPv4 that are yet to be split into segments. Needs
    /// `checksum`.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// The same with ECN.
    pub ecn: bool,
}

/// Size of `struct virtio_net_hdr_v1` in bytes.
pub const HEADER: usize = 12;
/// Size of `struct virtio_net_hdr` in bytes. It has no `num_buffers`.
pub const HEADER_SHORT: usize = 10;

impl TapQueue {
    /// Opens `count` queues of the interface `name`, or one queue if the interface was not made for
    /// several.
    ///
    /// # Errors
    /// Fails if there is no such interface, or if the host refuses it. The message is one line and
    /// names the remedy.
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

    /// Sets the size in bytes of the header before each packet: [`HEADER`] or [`HEADER_SHORT`].
    ///
    /// # Errors
    /// Fails if the host refuses the size.
    pub fn set_header(&self, bytes: usize) -> io::Result<()> {
        let size = c_int::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        check(unsafe { ioctl_with_ref(&self.file, TUNSETVNETHDRSZ(), &size) })
    }

    /// Sets which offloads packets from the tap may use.
    ///
    /// # Errors
    /// Fails if the host refuses the flags.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        // The host accepts segmentation only with checksums, and ECN only with segmentation.
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

    /// Sets whether the interface passes packets to this queue. An interface's only queue always
    /// gets them.
    ///
    /// # Errors
    /// Fails if the host refuses the change.
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
            // The queue was in this state already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            done => done,
        }
    }

    /// For tests: uses `file` in place of a tap.
    #[cfg(test)]
    pub(crate) fn of(file: File) -> Self {
        Self {
            file,
            name: String::new(),
            multi: false,
        }
    }

    /// The interface's MTU, which does not count the Ethernet header. `None` if it is unknown or
    /// needs more than 16 bits.
    pub fn mtu(&self) -> Option<u16> {
        self.attribute("mtu")
    }

    /// Drops the packets that wait to be read. Reads no more of them than the interface can queue,
    /// so that a flood of new packets does not delay this. Returns how many packets it has read.
    pub fn drain(&self) -> usize {
        /// Linux's default for taps.
        const KEPT: usize = 1_000;
        let kept = self.attribute("tx_queue_len").unwrap_or(KEPT);
        let mut header = [0; HEADER];
        let read = |_: &usize| match (&self.file).read(&mut header) {
            // An error may concern only this packet, so try the next one.
            Ok(_) => true,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        };
        (0..kept).take_while(read).count()
    }

    /// Reads an attribute of the interface (`Documentation/ABI/testing/sysfs-class-net`).
    fn attribute<T: FromStr>(&self, attribute: &str) -> Option<T> {
        let path = Path::new(INTERFACES).join(&self.name).join(attribute);
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }

    /// Whether the interface was deleted. Nothing signals that; all later accesses fail.
    pub fn is_gone(&self) -> bool {
        poll_now(&self.file, PollFlags::IN).contains(PollFlags::ERR)
    }

    /// The file, for the kernel (vhost) to use.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Returns a struct ifreq with this name and these flags.
fn interface(name: &str, flags: c_int) -> io::Result<libc::ifreq> {
    // SAFETY: a struct ifreq of zeros is valid.
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

    /// Reads from /dev/zero never fail, as with a tap under a flood.
    #[test]
    fn a_flood_does_not_hold_up_who_drains() {
        let flood = TapQueue::of(File::open("/dev/zero").unwrap());
        assert_eq!(flood.drain(), 1_000);
    }

    #[test]
    fn an_interface_tells_its_mtu() {
        let mut queue = TapQueue::of(File::open("/dev/zero").unwrap());
        assert_eq!(queue.mtu(), None);
        // Every host has "lo". Its MTU of 65536 does not fit in 16 bits.
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
