//! Taps of the host, and TCP between the host and a guest.

use std::ffi::{c_int, c_ulong};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::Shell;

const TUNSETIFF: c_ulong = 0x4004_54ca;
const TUNSETPERSIST: c_ulong = 0x4004_54cb;

/// A tap with an address. Dropped, it is deleted.
pub(crate) struct Tap {
    pub(crate) name: String,
    number: u32,
}

impl Tap {
    /// Creates a tap with one queue, or with several.
    pub(crate) fn new(multi_queue: bool) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let tap = Tap {
            name: format!("rvmm{number}"),
            number,
        };
        create(&tap.name, multi_queue);
        ip(&format!("addr add {} dev {}", tap.net(1), tap.name));
        ip(&format!("link set {} up", tap.name));
        tap
    }

    /// The address of the host (1) or of the guest (2), with the prefix length.
    fn net(&self, station: u32) -> String {
        format!("10.77.{}.{station}/24", self.number)
    }

    /// The address without the prefix length.
    pub(crate) fn address(&self, station: u32) -> String {
        format!("10.77.{}.{station}", self.number)
    }

    /// Gives the guest its address, and waits until the host answers.
    pub(crate) fn configure(&self, guest: &mut Shell) {
        guest.ok(&format!("ip addr add {} dev eth0", self.net(2)));
        guest.ok("ip link set eth0 up");
        guest.ok(&format!("ping -c 1 -W 30 {} >/dev/null", self.address(1)));
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // A case may have deleted it already.
        let _ = Command::new("ip")
            .args(["link", "del", &self.name])
            .output();
    }
}

fn create(name: &str, multi_queue: bool) {
    // SAFETY: all of a struct ifreq may be zero.
    #[allow(unsafe_code, reason = "libc's struct has no other constructor")]
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    request.ifr_ifru.ifru_flags = flags.try_into().expect("16 bits");
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .expect("/dev/net/tun");
    let request = std::ptr::from_ref(&request);
    ioctl(&tun, TUNSETIFF, request.addr() as c_ulong);
    ioctl(&tun, TUNSETPERSIST, 1);
}

fn ioctl(file: &File, request: c_ulong, argument: c_ulong) {
    #[allow(unsafe_code, reason = "no crate here wraps these two")]
    // SAFETY: TUNSETIFF reads a struct ifreq that lives through the call, TUNSETPERSIST a number.
    let done: c_int = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// Runs `ip` with these words.
pub(crate) fn ip(words: &str) {
    let done = Command::new("ip")
        .args(words.split(' '))
        .status()
        .expect("ip");
    assert!(done.success(), "ip {words}");
}

/// An MD5 sum of the bytes that are written to it.
struct Md5(Child);

impl Md5 {
    fn new() -> Self {
        let sum = Command::new("md5sum")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        Md5(sum.expect("md5sum"))
    }

    fn add(&mut self, bytes: &[u8]) {
        let stdin = self.0.stdin.as_mut().expect("a pipe");
        stdin.write_all(bytes).expect("write to md5sum");
    }

    fn end(mut self) -> String {
        self.0.stdin = None;
        let output = self.0.wait_with_output().expect("md5sum");
        String::from_utf8_lossy(&output.stdout)[..32].to_owned()
    }
}

const CHUNK: usize = 1 << 20;

/// How long a guest may take no byte.
const PATIENCE: Duration = Duration::from_secs(600);

/// Sends `chunks` MiB to the guest, and as many back. Checks that no byte is lost, added or
/// changed.
pub(crate) fn transfer(tap: &Tap, guest: &mut Shell, chunks: usize) {
    let listener = TcpListener::bind((tap.address(1), 0)).expect("listen");
    let port = listener.local_addr().expect("its address").port();
    // The program's standard input and output are the connection itself. With pipes between, a GiB
    // would take half an hour.
    let connect = format!("nc {} {port} -e /tmp/program", tap.address(1));
    let program = |guest: &mut Shell, script: &str| {
        guest.ok(&format!(
            "printf '#!/bin/sh\\n%s\\n' '{script}' >/tmp/program; chmod +x /tmp/program"
        ));
    };
    program(guest, "md5sum >/tmp/sum");
    std::thread::scope(|scope| {
        let sent = scope.spawn(|| send(&listener, |number| number < chunks));
        let received = guest.ok(&format!("{connect}; cut -c1-32 /tmp/sum"));
        assert_eq!(received, sent.join().expect("the sender"), "host to guest");
    });
    guest.ok("head -c 1048568 /dev/urandom >/tmp/chunk");
    program(
        guest,
        &format!("for i in $(seq {chunks}); do printf %08d $i; cat /tmp/chunk; done"),
    );
    std::thread::scope(|scope| {
        let received = scope.spawn(|| receive(&listener, chunks));
        let sum = guest.ok(&format!("{connect}; md5sum </tmp/chunk | cut -c1-32"));
        assert_eq!(sum, received.join().expect("the receiver"), "guest to host");
    });
}

/// Sends chunks of the same random bytes, each with its number at the start, as long as `goes_on`
/// says for the next number. Returns their sum.
pub(crate) fn send(listener: &TcpListener, goes_on: impl Fn(usize) -> bool) -> String {
    let (mut stream, _) = listener.accept().expect("the guest's connection");
    stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
    let mut chunk = vec![0; CHUNK];
    let mut random = File::open("/dev/urandom").expect("/dev/urandom");
    random.read_exact(&mut chunk).expect("random bytes");
    let mut sum = Md5::new();
    for number in (0..).take_while(|number| goes_on(*number)) {
        chunk[..8].copy_from_slice(&number.to_le_bytes());
        sum.add(&chunk);
        stream.write_all(&chunk).expect("send");
    }
    stream.shutdown(Shutdown::Write).expect("end the stream");
    sum.end()
}

/// Receives chunks that start with their number, counted from one, in eight digits, followed by the
/// same bytes. Returns the sum.
fn receive(listener: &TcpListener, chunks: usize) -> String {
    const NUMBER: usize = 8;
    let (mut stream, _) = listener.accept().expect("the guest's connection");
    let (mut first, mut chunk) = (vec![0; CHUNK], vec![0; CHUNK]);
    for number in 1..=chunks {
        stream.read_exact(&mut chunk).expect("receive a chunk");
        assert_eq!(chunk[..NUMBER], *format!("{number:08}").as_bytes());
        if number == 1 {
            first.copy_from_slice(&chunk);
        }
        assert!(chunk[NUMBER..] == first[NUMBER..], "chunk {number} differs");
    }
    assert_eq!(stream.read(&mut chunk).expect("the stream's end"), 0);
    let mut sum = Md5::new();
    sum.add(&first[NUMBER..]);
    sum.end()
}

/// MiB each way.
const SOME: usize = 8;

/// Boots a guest with this interface, and runs TCP both ways.
pub(crate) fn tcp(transport: &str, more: &str, cpus: &str, multi_queue: bool) {
    let tap = Tap::new(multi_queue);
    let net = format!("tap={}{more}", tap.name);
    let mut guest = Shell::start(["--net", &net, "--transport", transport, "--cpus", cpus]);
    tap.configure(&mut guest);
    let queues = guest.ok("ls -d /sys/class/net/eth0/queues/rx-* | wc -l");
    assert_eq!(queues, if multi_queue { cpus } else { "1" });
    transfer(&tap, &mut guest, SOME);
    guest.power_off();
}
