//! A console: virtio-console with one port (VIRTIO 1.2, section 5.3).

use std::io;
use std::sync::{Arc, Mutex, Weak};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::EventFd;

use super::bits::features;
use super::device::{Activation, VirtioDevice, read_bytes};
use super::notify::Fault;
use super::queue::{Broken, Chain, Virtq};
use super::stop::{Stop, StopFor};
use super::worker::{Worker, Workers};
use crate::devices::console::{Console, Listener, OUTPUT_CAPACITY};
use crate::util::poll::Events;
use crate::util::sync::lock;
use crate::util::thread::Kind;

const QUEUE_SIZE: u16 = 64;
/// VIRTIO_CONSOLE_F_SIZE: the configuration space has columns and rows.
const F_SIZE: u32 = 0;
/// Bytes copied at a time.
const CHUNK: usize = 4096;
/// Bytes of output after which the thread checks whether it must stop. Also the most output that is
/// written after a request to stop.
const ROUND: usize = OUTPUT_CAPACITY;

/// Returns columns and rows of the window that shows the console; `None` if they are unknown.
pub type Size = Arc<dyn Fn() -> Option<[u16; 2]> + Send + Sync>;

/// A console of the guest.
pub struct ConsolePort {
    console: Arc<Console>,
    size: Size,
    /// The state that the serving thread works on.
    progress: Arc<Mutex<Progress>>,
    workers: Workers,
    listener: Mutex<Option<Arc<Wake>>>,
}

/// Wakes the port's thread when the host's side of the console has changed.
struct Wake(Arc<EventFd>);

impl Listener for Wake {
    fn console_changed(&self) {
        // Fails only with 2^64 signals pending.
        let _ = self.0.write(1);
    }
}

impl ConsolePort {
    /// Returns a port between the guest and `console`.
    pub fn new(console: Arc<Console>, size: Size) -> Self {
        Self {
            console,
            size,
            progress: Arc::default(),
            workers: Workers::default(),
            listener: Mutex::default(),
        }
    }
}

impl VirtioDevice for ConsolePort {
    fn kind(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn name(&self) -> &str {
        "console"
    }

    fn features(&self) -> u64 {
        match (self.size)() {
            Some(_) => features(&[F_SIZE]),
            None => 0,
        }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    /// struct virtio_console_config: columns, rows, and the number of ports (1).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let [columns, rows] = (self.size)().unwrap_or_default().map(u16::to_le_bytes);
        let space = [columns[0], columns[1], rows[0], rows[1], 1, 0, 0, 0];
        read_bytes(&space, offset, data);
    }

    fn activate(&self, activation: Activation) -> io::Result<()> {
        let Ok([input, output]) = <[Virtq; 2]>::try_from(activation.queues) else {
            return Err(io::Error::other("a console needs both of its queues"));
        };
        if !activation.resumes {
            *lock(&self.progress) = Progress {
                known_size: (self.size)(),
                sending: None,
            };
        }
        let port = Port {
            console: Arc::clone(&self.console),
            size: Arc::clone(&self.size),
            fault: activation.fault,
        };
        let kicks = Events::new()?;
        kicks.add_signal(0, input.kick())?;
        kicks.add_signal(1, output.kick())?;
        let wake = Arc::new(Wake(Arc::clone(input.kick())));
        let progress = Arc::clone(&self.progress);
        let serve = move |queues: &mut [Virtq], stop: &Stop| {
            port.serve(&mut lock(&progress), queues, &kicks, stop)
        };
        let queues = vec![input, output];
        self.workers
            .add(Worker::serve(Kind::Virtio, "console", queues, serve)?);
        let listener: Arc<dyn Listener> = Arc::clone(&wake) as _;
        self.console
            .set_listener(Arc::downgrade(&listener) as Weak<dyn Listener>);
        // Covers changes from before the listener was set.
        wake.console_changed();
        *lock(&self.listener) = Some(wake);
        Ok(())
    }

    fn stop(&self, why: StopFor) {
        self.workers.stop(why);
    }

    fn deactivate(&self, _: StopFor) -> Vec<Virtq> {
        *lock(&self.listener) = None;
        self.workers.take_back()
    }
}

/// The thread's progress, which is kept through a pause.
#[derive(Default)]
struct Progress {
    /// The size that the driver was last notified of.
    known_size: Option<[u16; 2]>,
    /// A chain of output that the console had no room for, or not for all of it.
    sending: Option<Chain>,
}

/// What the serving thread uses.
struct Port {
    console: Arc<Console>,
    size: Size,
    fault: Fault,
}

impl Port {
    fn serve(
        &self,
        progress: &mut Progress,
        queues: &mut [Virtq],
        kicks: &Events,
        stop: &Stop,
    ) -> Result<(), Broken> {
        let [input, output] = queues else {
            return Ok(());
        };
        while !stop.is_asked() {
            let more_input = self.receive(input)?;
            let more_output = self.send(output, progress)?;
            self.report_size(progress);
            if !more_input && !more_output {
                kicks.wait(None);
            }
        }
        // Passes on what the guest has written, as far as the console has room for it now.
        self.send(output, progress)?;
        Ok(())
    }

    /// Moves input to the guest's buffers. True if there may be more work at once.
    fn receive(&self, queue: &mut Virtq) -> Result<bool, Broken> {
        let mut bytes = [0; CHUNK];
        for _ in 0..queue.size() {
            if self.console.input_len() == 0 {
                queue.notify()?;
                return Ok(false);
            }
            let Some(chain) = queue.pop()? else {
                queue.notify()?;
                return queue.enable_notifications();
            };
            let count = self
                .console
                .read(&mut bytes[..chain.writable.len().min(CHUNK)]);
            chain.writable.copy_from(&bytes[..count]);
            queue.push(chain.head, count)?;
        }
        queue.notify()?;
        Ok(true)
    }

    /// Moves output from the guest to the console, as far as the console has room. Moves at most
    /// [`ROUND`] bytes, so that the thread checks whether it must stop even if a reader takes
    /// everything at once. True if there may be more work at once.
    fn send(&self, queue: &mut Virtq, progress: &mut Progress) -> Result<bool, Broken> {
        let mut left = ROUND;
        for _ in 0..queue.size() {
            let mut chain = match progress.sending.take() {
                Some(chain) => chain,
                None => match queue.pop()? {
                    Some(chain) => chain,
                    None => {
                        queue.notify()?;
                        return queue.enable_notifications();
                    }
                },
            };
            self.write(&mut chain, &mut left);
            if !chain.readable.is_empty() {
                progress.sending = Some(chain);
                queue.notify()?;
                // The console's listener wakes this thread when there is room.
                return Ok(left == 0);
            }
            queue.push(chain.head, 0)?;
        }
        queue.notify()?;
        Ok(true)
    }

    /// Writes the rest of `chain`: as much as the console has room for, and at most `left` bytes.
    /// Subtracts the bytes written from `left`.
    fn write(&self, chain: &mut Chain, left: &mut usize) {
        let mut bytes = [0; CHUNK];
        while !chain.readable.is_empty() && *left > 0 {
            let most = CHUNK.min(*left);
            let count = chain.readable.copy_to(&mut bytes[..most]);
            let taken = self.console.write(&bytes[..count]);
            chain.readable.advance(taken);
            *left -= taken;
            if taken < count {
                return;
            }
        }
    }

    fn report_size(&self, progress: &mut Progress) {
        let size = (self.size)();
        if size != progress.known_size {
            progress.known_size = size;
            self.fault.config_changed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::*;
    use std::sync::atomic::Ordering;
    use vm_memory::{Bytes, GuestAddress};

    fn port() -> (Driver, Arc<Console>, Arc<Mutex<[u16; 2]>>) {
        let console = Arc::new(Console::default());
        let window = Arc::new(Mutex::new([80, 24]));
        let seen = Arc::clone(&window);
        let size: Size = Arc::new(move || Some(*lock(&seen)));
        let port = ConsolePort::new(Arc::clone(&console), size);
        (Driver::ready(Box::new(port)), console, window)
    }

    #[test]
    fn bytes_go_both_ways() {
        let (mut driver, console, _) = port();
        driver
            .ram
            .write_slice(b"hello", GuestAddress(BUFFERS))
            .unwrap();
        assert_eq!(
            driver.request(1, &[(BUFFERS, 2, 0), (BUFFERS + 2, 3, 0)]),
            0
        );
        let mut output = Vec::new();
        console.take_output(&mut output);
        assert_eq!(output, b"hello");
        console.type_input(b"typed");
        assert_eq!(driver.request(0, &[(BUFFERS, 64, WRITE)]), 5);
        let mut typed = [0; 5];
        driver
            .ram
            .read_slice(&mut typed, GuestAddress(BUFFERS))
            .unwrap();
        assert_eq!(&typed, b"typed");
    }

    #[test]
    fn a_slow_reader_holds_the_guest_back() {
        let (mut driver, console, _) = port();
        let len = u32::try_from(OUTPUT_CAPACITY).unwrap() + 100;
        let (addr, flags, next) = (BUFFERS, 0, 0);
        driver.describe(
            1,
            0,
            Desc {
                addr,
                len,
                flags,
                next,
            },
        );
        driver.offer(1, 0);
        driver.wait_until("a full console", |_| console.output_room() == 0);
        assert_eq!(driver.used(1), 0);
        let (mut output, mut all) = (Vec::new(), 0);
        while all < OUTPUT_CAPACITY + 100 {
            console.take_output(&mut output);
            all += output.len();
        }
        driver.wait_until("the rest", |d| d.used(1) == 1);
    }

    /// The machine pauses while the console has a part of a chain. The rest follows once, after the
    /// pause.
    #[test]
    fn a_chain_half_sent_goes_on_after_a_pause() {
        let (mut driver, console, window) = port();
        let count = OUTPUT_CAPACITY + 100;
        let sent: Vec<u8> = (0..count).map(|at| (at % 251).to_le_bytes()[0]).collect();
        driver
            .ram
            .write_slice(&sent, GuestAddress(BUFFERS))
            .unwrap();
        let len = u32::try_from(count).unwrap();
        driver.describe_chain(rings(1)[0], 0, &[(BUFFERS, len, 0)]);
        driver.offer(1, 0);
        driver.wait_until("a full console", |_| console.output_room() == 0);
        let (mut output, mut all) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            driver.core.pause();
            console.type_input(b"typed");
            assert_eq!((driver.used(0), driver.used(1)), (0, 0));
            driver.core.resume();
        }
        driver.core.pause();
        console.take_output(&mut output);
        all.extend_from_slice(&output);
        *lock(&window) = [100, 40];
        console.resized();
        let interrupts = Arc::clone(&driver.interrupts);
        let configs = || interrupts.configs.load(Ordering::Acquire);
        assert_eq!((console.output_room(), configs()), (0, 0));
        driver.core.resume();
        driver.wait_until("the window's size", |_| configs() == 1);
        while all.len() < count {
            console.take_output(&mut output);
            all.extend_from_slice(&output);
        }
        assert!(all == sent);
        driver.wait_until("its end", |d| d.used(1) == 1);
        let typed = driver.request(0, &[(BUFFERS, 64, WRITE)]);
        assert_eq!(typed, 15, "the input from during the pauses");
        driver.core.pause();
        driver.core.resume();
        driver.core.pause();
        assert_eq!(configs(), 1, "one interrupt per change");
    }

    #[test]
    fn a_window_that_changes_is_told() {
        let (driver, console, window) = port();
        let mut space = [0; 4];
        driver.core.read_config(0, &mut space);
        assert_eq!(space, [80, 0, 24, 0]);
        *lock(&window) = [132, 50];
        console.resized();
        driver.wait_until("an interrupt", |d| {
            d.interrupts.configs.load(Ordering::Acquire) == 1
        });
        driver.core.read_config(0, &mut space);
        assert_eq!(space, [132, 0, 50, 0]);
    }
}
