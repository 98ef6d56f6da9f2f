//! A console: virtio-console with one port (VIRTIO 1.2, section 5.3).

use std::io;
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::EventFd;

use super::bits::features;
use super::device::{Activation, VirtioDevice, read_bytes};
use super::notify::Fault;
use super::queue::{Broken, Chain, Virtq};
use super::stop::{Stop, StopFor};
use super::worker::{Worker, Workers};
use crate::devices::console::{Console, Listener, OUTPUT_CAPACITY};
use crate::snapshot::{LoadError, Parts, SaveError, Saved, State};
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
    window: Arc<Window>,
    /// The state that the serving thread works on.
    progress: Arc<Mutex<Progress>>,
    workers: Workers,
    listener: Mutex<Option<Arc<Wake>>>,
}

/// The window that shows the console.
struct Window {
    now: Size,
    /// The size that the driver knew before a load. It stands in for a size that is unknown here.
    before: Mutex<Option<[u16; 2]>>,
}

impl Window {
    fn size(&self) -> Option<[u16; 2]> {
        (self.now)().or_else(|| *lock(&self.before))
    }
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
            window: Arc::new(Window {
                now: size,
                before: Mutex::default(),
            }),
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
        match self.window.size() {
            Some(_) => features(&[F_SIZE]),
            None => 0,
        }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    /// struct virtio_console_config: columns, rows, and the number of ports (1).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let [columns, rows] = self.window.size().unwrap_or_default().map(u16::to_le_bytes);
        let space = [columns[0], columns[1], rows[0], rows[1], 1, 0, 0, 0];
        read_bytes(&space, offset, data);
    }

    fn activate(&self, activation: Activation) -> io::Result<()> {
        let Ok([input, output]) = <[Virtq; 2]>::try_from(activation.queues) else {
            return Err(io::Error::other("a console needs both of its queues"));
        };
        if !activation.resumes {
            *lock(&self.progress) = Progress {
                known_size: self.window.size(),
                skip: 0,
            };
        }
        let port = Port {
            console: Arc::clone(&self.console),
            window: Arc::clone(&self.window),
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

    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        let Progress { known_size, skip } = *lock(&self.progress);
        Ok(vec![Saved::of(&SavedConsole { known_size, skip })?])
    }

    fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        let SavedConsole { known_size, skip } = parts.take()?;
        *lock(&self.window.before) = known_size;
        *lock(&self.progress) = Progress { known_size, skip };
        Ok(())
    }
}

/// The thread's progress, which is kept through a pause.
#[derive(Default)]
struct Progress {
    /// The size that the driver was last notified of.
    known_size: Option<[u16; 2]>,
    /// The number of bytes that the console has already taken from the next chain of output. It had
    /// no room for more.
    skip: usize,
}

/// The saved state: [`Progress`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedConsole {
    // Without this, the field could be left out.
    #[serde(deserialize_with = "Option::deserialize")]
    known_size: Option<[u16; 2]>,
    skip: usize,
}

impl State for SavedConsole {
    const KIND: &'static str = "virtio-console";
    const VERSION: u32 = 1;
}

/// What the serving thread uses.
struct Port {
    console: Arc<Console>,
    window: Arc<Window>,
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
            let Some(mut chain) = queue.pop()? else {
                queue.notify()?;
                return queue.enable_notifications();
            };
            let whole = chain.readable.len();
            chain.readable.advance(progress.skip);
            self.write(&mut chain, &mut left);
            if !chain.readable.is_empty() {
                progress.skip = whole - chain.readable.len();
                queue.unpop();
                queue.notify()?;
                // The console's listener wakes this thread when there is room.
                return Ok(left == 0);
            }
            progress.skip = 0;
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
        let size = self.window.size();
        if size != progress.known_size {
            progress.known_size = size;
            self.fault.config_changed();
        }
    }
}

#[cfg(test)]
mod tests;
