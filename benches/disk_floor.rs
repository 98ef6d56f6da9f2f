//! The floor of disks: the least that a disk can do. It is rvmm's machine with a disk whose thread
//! waits for the doorbell, calls pread or pwrite, and signals the interrupt. It checks nothing,
//! reports no errors, and interrupts for each request.
//!
//! ```text
//! disk-floor FLAGS OF RVMM, with one --disk
//! ```
#![allow(unsafe_code)]

#[cfg(not(target_arch = "riscv64"))]
fn main() {
    eprintln!("disk-floor: runs on riscv64 only");
}

#[cfg(target_arch = "riscv64")]
fn main() -> anyhow::Result<()> {
    floor::run()
}

#[cfg(target_arch = "riscv64")]
mod floor {
    use std::fs::File;
    use std::io;
    use std::os::fd::AsRawFd;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU16, Ordering, fence};

    use anyhow::{Context, Result, bail};
    use rvmm::cli::{Request, parse};
    use rvmm::hypervisor::kvm::Kvm;
    use rvmm::machine::{Machine, Run};
    use rvmm::memory::GuestMemory;
    use rvmm::util::thread::Kind;
    use rvmm::virtio::blk::Disk;
    use rvmm::virtio::blk::image::Image;
    use rvmm::virtio::device::{Activation, VirtioDevice};
    use rvmm::virtio::queue::Virtq;
    use rvmm::virtio::stop::{Stop, StopFor};
    use rvmm::virtio::worker::{Worker, Workers};
    use virtio_queue::QueueT;
    use vm_memory::{GuestAddress, GuestMemoryBackend};

    pub(super) fn run() -> Result<()> {
        let Request::Run(mut cli) = parse(std::env::args_os()) else {
            bail!("disk-floor takes the flags of rvmm");
        };
        let config = cli.vm.disk.pop().context("disk-floor needs a --disk")?;
        let make = move || {
            let file = File::options().read(true).write(true).open(&config.path)?;
            let image = Image::open(&config).map_err(io::Error::other)?;
            Ok(Box::new(FloorDisk {
                config: Disk::new("floor", Arc::new(image), 1),
                file: Arc::new(file),
                workers: Workers::default(),
            }) as _)
        };
        let machine = Machine::build_with(&cli.vm, Arc::new(Kvm::open()?), Box::new(make))?;
        let (outcome, _) = machine.run(&Run {
            console: &cli.vm.console,
            timeout: None,
            tracer: None,
            gdb: None,
            reboot: false,
            stats_from: None,
            control: None,
            paused: false,
            clock: rvmm::machine::Clock::Stop,
        })?;
        std::process::exit(outcome.exit_status().into());
    }

    /// Reports the same configuration as rvmm's disk.
    struct FloorDisk {
        config: Disk,
        file: Arc<File>,
        workers: Workers,
    }

    impl VirtioDevice for FloorDisk {
        fn kind(&self) -> u32 {
            self.config.kind()
        }
        fn name(&self) -> &str {
            self.config.name()
        }
        fn features(&self) -> u64 {
            self.config.features()
        }
        fn queue_sizes(&self) -> Vec<u16> {
            self.config.queue_sizes()
        }
        fn read_config(&self, offset: u64, data: &mut [u8]) {
            self.config.read_config(offset, data);
        }
        fn activate(&self, activation: Activation) -> io::Result<()> {
            let (ram, file) = (activation.ram, Arc::clone(&self.file));
            let serve = move |queues: &mut [Virtq], stop: &Stop| {
                serve(&ram, &file, &queues[0], stop);
                Ok(())
            };
            let worker = Worker::serve(Kind::Disk, "floor", activation.queues, serve)?;
            self.workers.add(worker);
            Ok(())
        }
        fn stop(&self, why: StopFor) {
            self.workers.stop(why);
        }
        fn deactivate(&self, _: StopFor) -> Vec<Virtq> {
            self.workers.take_back()
        }
    }

    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Descriptor {
        addr: u64,
        len: u32,
        flags: u16,
        next: u16,
    }

    const NEXT: u16 = 1;
    const INDIRECT: u16 = 4;
    const READ: u32 = 0;
    const WRITE: u32 = 1;

    fn at<T>(ram: &GuestMemory, gpa: u64) -> *mut T {
        let address = ram.get_host_address(GuestAddress(gpa));
        address.expect("the guest is not hostile").cast()
    }

    fn serve(ram: &GuestMemory, file: &File, queue: &Virtq, stop: &Stop) {
        let ring = queue.ring();
        let size = ring.size();
        let table: *const Descriptor = at(ram, ring.desc_table());
        let available: *const u16 = at(ram, ring.avail_ring());
        let used: *mut u16 = at(ram, ring.used_ring());
        let event: *mut u16 = at(ram, ring.used_ring() + 4 + 8 * u64::from(size));
        let interrupt = queue.interrupt_fd();
        let mut next = 0u16;
        while !stop.is_asked() {
            // SAFETY: the driver's rings are in RAM that stays mapped.
            unsafe {
                while next != (*available.add(1).cast::<AtomicU16>()).load(Ordering::Acquire) {
                    let slot = usize::from(next % size);
                    let head = available.add(2 + slot).read_volatile();
                    let written = request(ram, file, table, head);
                    let element = used.add(2 + 4 * slot).cast::<u32>();
                    element.write_volatile(head.into());
                    element.add(1).write_volatile(written);
                    next = next.wrapping_add(1);
                    (*used.add(1).cast::<AtomicU16>()).store(next, Ordering::Release);
                    match &interrupt {
                        Some(fd) => _ = fd.write(1),
                        None => queue.interrupter()(),
                    }
                }
                // Asks for a notification of the next request.
                event.write_volatile(next);
                fence(Ordering::SeqCst);
                if next != (*available.add(1).cast::<AtomicU16>()).load(Ordering::Acquire) {
                    continue;
                }
            }
            let _ = queue.kick().read();
        }
    }

    /// Serves a chain of header, data and status. Returns the number of bytes written.
    unsafe fn request(ram: &GuestMemory, file: &File, table: *const Descriptor, head: u16) -> u32 {
        // SAFETY: the descriptors and the buffers that they name are in RAM.
        unsafe {
            let (mut table, mut index) = (table, usize::from(head));
            let first = table.add(index).read_volatile();
            if first.flags & INDIRECT != 0 {
                (table, index) = (at(ram, first.addr), 0);
            }
            let header = table.add(index).read_volatile();
            let mut descriptor = table.add(usize::from(header.next)).read_volatile();
            let mut data: Vec<libc::iovec> = Vec::with_capacity(4);
            let mut length = 0;
            while descriptor.flags & NEXT != 0 {
                data.push(libc::iovec {
                    iov_base: at(ram, descriptor.addr),
                    iov_len: descriptor.len as usize,
                });
                length += descriptor.len;
                descriptor = table.add(usize::from(descriptor.next)).read_volatile();
            }
            let kind = at::<u32>(ram, header.addr).read_volatile();
            let offset = at::<i64>(ram, header.addr + 8).read_volatile() * 512;
            let count = i32::try_from(data.len()).expect("few pieces");
            let (fd, start) = (file.as_raw_fd(), data.as_ptr());
            match kind {
                READ => _ = libc::preadv(fd, start, count, offset),
                WRITE => _ = libc::pwritev(fd, start, count, offset),
                _ => {}
            }
            at::<u8>(ram, descriptor.addr).write_volatile(0);
            if kind == READ { length + 1 } else { 1 }
        }
    }
}
