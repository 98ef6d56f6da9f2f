//! The guest's program of the groups "blk" and "net". It measures by the guest's own clock, and
//! prints a line `io: NAME UNIT VALUE` for each figure.
//!
//! ```text
//! guest-io PART blk DEVICE          reads and writes, past the guest's page cache
//! guest-io PART net ADDRESS PORT    TCP to the driver in L1 (benches/suite/wire.rs)
//! ```
//!
//! It does one PART-th of the work below.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use anyhow::{Context, Result, bail, ensure};
use io_uring::{IoUring, opcode, types};

const BLOCK: usize = 4096;
const LARGE: usize = 1 << 20;
/// The number of requests at depth 1, and at depth 32.
const ALONE: u64 = 2000;
const TOGETHER: u64 = 8000;
const DEPTH: usize = 32;
/// How often the disk is read and written from one end to the other.
const PASSES: u64 = 3;
/// Bytes each way, and the number of round trips.
const STREAM: usize = 64 << 20;
const TRIPS: u32 = 2000;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [part, "blk", device] => blk(device, part.parse()?),
        [part, "net", address, port] => net(address, port.parse()?, part.parse()?),
        _ => bail!("guest-io PART blk DEVICE | net ADDRESS PORT"),
    }
}

fn report(name: &str, unit: &str, value: f64) {
    println!("io: {name} {unit} {value:.3}");
}

/// A time of the monotonic clock, from a system call. Under QEMU a process that reads `time`
/// itself, as std does, is killed.
struct Instant(libc::timespec);

impl Instant {
    #[allow(unsafe_code)]
    fn now() -> Self {
        let mut now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the kernel writes a struct timespec, which `now` is.
        unsafe { libc::syscall(libc::SYS_clock_gettime, libc::CLOCK_MONOTONIC, &raw mut now) };
        Self(now)
    }

    fn seconds(&self) -> f64 {
        let Self(now) = Self::now();
        (now.tv_sec - self.0.tv_sec) as f64 + (now.tv_nsec - self.0.tv_nsec) as f64 / 1e9
    }
}

fn micros_each(since: Instant, count: u64) -> f64 {
    since.seconds() * 1e6 / count as f64
}

fn megabytes_per_second(since: Instant, bytes: u64) -> f64 {
    bytes as f64 / 1e6 / since.seconds()
}

/// Memory that is aligned for O_DIRECT.
#[repr(align(4096))]
#[derive(Clone, Copy)]
struct Aligned([u8; BLOCK]);

/// A huge page, if the guest offers one: then a large request has few pieces.
#[repr(align(0x20_0000))]
struct Huge([u8; 2 << 20]);

fn aligned(bytes: usize) -> Vec<Aligned> {
    vec![Aligned([0x5a; BLOCK]); bytes / BLOCK]
}

#[allow(unsafe_code)]
fn bytes(buffer: &mut [Aligned]) -> &mut [u8] {
    // SAFETY: an array of bytes has no padding, whatever its alignment.
    unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast(), buffer.len() * BLOCK) }
}

/// Blocks in an order that no read-ahead can guess.
struct Places {
    state: u64,
    blocks: u64,
}

impl Iterator for Places {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        Some(self.state % self.blocks * BLOCK as u64)
    }
}

fn blk(device: &str, part: u64) -> Result<()> {
    let (alone, all) = (ALONE / part, TOGETHER / part);
    let passes = (PASSES / part).max(1);
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_DIRECT);
    let disk = options.open(device).context("open the disk")?;
    let size = std::fs::read_to_string("/sys/block/vda/size")?
        .trim()
        .parse::<u64>()?
        * 512;
    let places = || Places {
        state: 0x9e37_79b9_7f4a_7c15,
        blocks: size / BLOCK as u64,
    };
    let mut block = aligned(BLOCK);
    let began = Instant::now();
    for at in places().take(usize::try_from(alone)?) {
        disk.read_exact_at(bytes(&mut block), at)?;
    }
    report("4K read, depth 1", "us", micros_each(began, alone));
    let began = Instant::now();
    for at in places().take(usize::try_from(alone)?) {
        disk.write_all_at(bytes(&mut block), at)?;
    }
    report("4K write, depth 1", "us", micros_each(began, alone));
    for (name, write) in [("4K read, depth 32", false), ("4K write, depth 32", true)] {
        let began = Instant::now();
        together(&disk, places(), write, all)?;
        report(name, "us", micros_each(began, all));
    }
    let mut large = Box::new(Huge([0x5a; 2 << 20]));
    let large = &mut large.0[..LARGE];
    for (name, write) in [("1M sequential read", false), ("1M sequential write", true)] {
        let began = Instant::now();
        for at in (0..passes).flat_map(|_| (0..size).step_by(LARGE)) {
            match write {
                true => disk.write_all_at(large, at)?,
                false => disk.read_exact_at(large, at)?,
            }
        }
        report(name, "MB/s", megabytes_per_second(began, passes * size));
    }
    Ok(())
}

/// Makes `all` requests, of which [`DEPTH`] are in flight.
#[allow(unsafe_code)]
fn together(disk: &File, mut places: Places, write: bool, all: u64) -> Result<()> {
    let mut ring = IoUring::new(u32::try_from(DEPTH)?)?;
    let mut buffers = aligned(DEPTH * BLOCK);
    let fd = types::Fd(disk.as_raw_fd());
    let length = u32::try_from(BLOCK)?;
    let (mut begun, mut ended) = (0, 0);
    let mut free: Vec<usize> = (0..DEPTH).collect();
    while ended < all {
        while begun < all {
            let Some(slot) = free.pop() else { break };
            let at = places.next().context("places do not end")?;
            let buffer = buffers[slot].0.as_mut_ptr();
            let entry = match write {
                true => opcode::Write::new(fd, buffer, length).offset(at).build(),
                false => opcode::Read::new(fd, buffer, length).offset(at).build(),
            };
            // SAFETY: the buffers outlive the ring's requests, all of which end below.
            unsafe { ring.submission().push(&entry.user_data(slot as u64)) }?;
            begun += 1;
        }
        ring.submit_and_wait(1)?;
        for entry in ring.completion() {
            ensure!(
                entry.result() == i32::try_from(BLOCK)?,
                "a request failed: {}",
                entry.result()
            );
            free.push(usize::try_from(entry.user_data())?);
            ended += 1;
        }
    }
    Ok(())
}

fn net(address: &str, port: u16, part: u32) -> Result<()> {
    let bytes = STREAM / usize::try_from(part)?;
    let trips = TRIPS / part;
    let mut stream = TcpStream::connect((address, port)).context("connect")?;
    stream.set_nodelay(true)?;
    let mut chunk = vec![0x5a; LARGE];
    let mut byte = [0];
    let began = Instant::now();
    for _ in 0..bytes / LARGE {
        stream.write_all(&chunk)?;
    }
    stream.read_exact(&mut byte)?;
    report(
        "TCP guest to host",
        "MB/s",
        megabytes_per_second(began, bytes as u64),
    );
    let began = Instant::now();
    stream.write_all(&byte)?;
    let mut left = bytes;
    while left > 0 {
        let count = stream.read(&mut chunk[..left.min(LARGE)])?;
        ensure!(count > 0, "the stream ended");
        left -= count;
    }
    report(
        "TCP host to guest",
        "MB/s",
        megabytes_per_second(began, bytes as u64),
    );
    let began = Instant::now();
    for _ in 0..trips {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
    }
    report(
        "TCP round trip of a byte",
        "us",
        micros_each(began, trips.into()),
    );
    Ok(())
}
