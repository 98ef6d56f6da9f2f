//! A power key: virtio-input (VIRTIO 1.2, section 5.8) with one key, which asks the guest to power off.
//!
//! Linux passes the key to the readers of its input device; systemd-logind then powers off.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_ids::VIRTIO_ID_INPUT;
use virtio_bindings::virtio_input::{
    virtio_input_config_select_VIRTIO_INPUT_CFG_EV_BITS as EV_BITS,
    virtio_input_config_select_VIRTIO_INPUT_CFG_ID_DEVIDS as ID_DEVIDS,
    virtio_input_config_select_VIRTIO_INPUT_CFG_ID_NAME as ID_NAME,
};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Activation, VirtioDevice, read_bytes};
use super::queue::{Broken, Virtq};
use super::stop::{Stop, StopFor};
use super::worker::{Worker, Workers};
use crate::util::poll::Events;
use crate::util::sync::lock;
use crate::util::thread::Kind;

const QUEUE_SIZE: u16 = 64;
const NAME: &[u8] = b"rvmm power key";
/// `include/uapi/linux/input-event-codes.h`.
const EV_SYN: u16 = 0;
const EV_KEY: u16 = 1;
const SYN_REPORT: u16 = 0;
const KEY_POWER: u16 = 116;
/// `include/uapi/linux/input.h`.
const BUS_VIRTUAL: u16 = 6;

/// The key pressed and released, each followed by a report: type, code, value.
const PRESS: [(u16, u16, u32); 4] = [
    (EV_KEY, KEY_POWER, 1),
    (EV_SYN, SYN_REPORT, 0),
    (EV_KEY, KEY_POWER, 0),
    (EV_SYN, SYN_REPORT, 0),
];

/// Events to come: type, code, value.
type Untold = &'static [(u16, u16, u32)];

/// The host's end of the key, which outlives a reset.
#[derive(Default)]
pub struct Button {
    pressed: AtomicBool,
    /// Wakes the device's thread, while a driver is ready.
    wake: Mutex<Option<Arc<EventFd>>>,
}

impl Button {
    /// Presses the key. False where no driver is ready for it.
    pub fn press(&self) -> bool {
        let wake = lock(&self.wake);
        if let Some(wake) = &*wake {
            self.pressed.store(true, Ordering::Release);
            // It fails only when 2^64 wait.
            let _ = wake.write(1);
        }
        wake.is_some()
    }
}

/// The key of the guest.
pub struct PowerKey {
    button: Arc<Button>,
    /// What the driver wants to read of the configuration: `select` and `subsel`.
    selected: Mutex<[u8; 2]>,
    /// What of a press the driver was not told yet. The thread that serves has it.
    untold: Arc<Mutex<Untold>>,
    workers: Workers,
}

impl PowerKey {
    /// The key that `button` presses.
    pub fn new(button: Arc<Button>) -> Self {
        Self {
            button,
            selected: Mutex::default(),
            untold: Arc::default(),
            workers: Workers::default(),
        }
    }

    /// What is selected; nothing where there is no such thing.
    fn answer(&self) -> Vec<u8> {
        let [select, subsel] = *lock(&self.selected);
        match (select.into(), subsel.into()) {
            (ID_NAME, 0) => NAME.to_vec(),
            (ID_DEVIDS, 0) => [BUS_VIRTUAL, 0, 0, 1].map(u16::to_le_bytes).concat(),
            (EV_BITS, EV_KEY) => {
                let mut bits = vec![0; usize::from(KEY_POWER / 8) + 1];
                bits[usize::from(KEY_POWER / 8)] = 1 << (KEY_POWER % 8);
                bits
            }
            _ => Vec::new(),
        }
    }
}

impl VirtioDevice for PowerKey {
    fn kind(&self) -> u32 {
        VIRTIO_ID_INPUT
    }

    fn name(&self) -> &str {
        "power key"
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    /// struct virtio_input_config: select, subsel, the answer's size, five reserved bytes, the answer.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let answer = self.answer();
        let size = u8::try_from(answer.len()).unwrap_or(u8::MAX);
        let [select, subsel] = *lock(&self.selected);
        let mut space = vec![select, subsel, size, 0, 0, 0, 0, 0];
        space.extend(answer);
        read_bytes(&space, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let mut all = lock(&self.selected);
        for (at, byte) in (offset..).zip(data) {
            if let Some(selected) = usize::try_from(at).ok().and_then(|at| all.get_mut(at)) {
                *selected = *byte;
            }
        }
    }

    fn activate(&self, activation: Activation) -> io::Result<()> {
        let Ok([events, statuses]) = <[Virtq; 2]>::try_from(activation.queues) else {
            return Err(io::Error::other("a power key needs both of its queues"));
        };
        let kicks = Events::new()?;
        kicks.add_signal(0, events.kick())?;
        kicks.add_signal(1, statuses.kick())?;
        let (wake, button) = (Arc::clone(events.kick()), Arc::clone(&self.button));
        if !activation.resumes {
            *lock(&self.untold) = &[];
        }
        let untold = Arc::clone(&self.untold);
        let serve = move |queues: &mut [Virtq], stop: &Stop| {
            serve(queues, &button, &mut lock(&untold), &kicks, stop)
        };
        let worker = Worker::serve(Kind::Virtio, "power key", vec![events, statuses], serve)?;
        self.workers.add(worker);
        *lock(&self.button.wake) = Some(wake);
        Ok(())
    }

    /// Through a pause the key can be pressed: the driver hears of it later.
    fn stop(&self, why: StopFor) {
        if why == StopFor::Reset {
            *lock(&self.button.wake) = None;
        }
        self.workers.stop(why);
    }

    fn deactivate(&self, _: StopFor) -> Vec<Virtq> {
        self.workers.take_back()
    }
}

/// A machine may end while it is paused.
impl Drop for PowerKey {
    fn drop(&mut self) {
        *lock(&self.button.wake) = None;
    }
}

fn serve(
    queues: &mut [Virtq],
    button: &Button,
    untold: &mut Untold,
    kicks: &Events,
    stop: &Stop,
) -> Result<(), Broken> {
    let [events, statuses] = queues else {
        return Ok(());
    };
    while !stop.is_asked() {
        // Lights of a keyboard, which this has none of.
        let more_statuses = statuses.drain(stop, |_| Ok(0));
        more_statuses?;
        if untold.is_empty() && button.pressed.swap(false, Ordering::AcqRel) {
            *untold = &PRESS;
        }
        if !send(events, untold)? {
            kicks.wait(None);
        }
    }
    Ok(())
}

/// Tells the driver of `untold`, as far as it has buffers. True when it may have more by now.
fn send(queue: &mut Virtq, untold: &mut Untold) -> Result<bool, Broken> {
    while let Some(((kind, code, value), rest)) = untold.split_first() {
        let Some(chain) = queue.pop()? else {
            queue.tell()?;
            return queue.ask_for_kick();
        };
        let mut event = [0; 8];
        event[..2].copy_from_slice(&kind.to_le_bytes());
        event[2..4].copy_from_slice(&code.to_le_bytes());
        event[4..].copy_from_slice(&value.to_le_bytes());
        let count = chain.writable.copy_from(&event);
        queue.push(chain.head, count)?;
        *untold = rest;
    }
    queue.tell()?;
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::*;
    use vm_memory::{Bytes, GuestAddress};

    fn select(driver: &mut Driver, select: u8, subsel: u8) -> Vec<u8> {
        driver.core.write_config(0, &[select]);
        driver.core.write_config(1, &[subsel]);
        let mut size = [0];
        driver.core.read_config(2, &mut size);
        let mut answer = vec![0; size[0].into()];
        driver.core.read_config(8, &mut answer);
        answer
    }

    #[test]
    fn it_has_one_key() {
        let mut driver = Driver::of(Box::new(PowerKey::new(Arc::default())));
        assert_eq!(select(&mut driver, 1, 0), NAME);
        let keys = select(&mut driver, 0x11, 1);
        let all: u32 = keys.iter().map(|byte| byte.count_ones()).sum();
        assert_eq!((keys.len(), keys[14], all), (15, 1 << 4, 1));
        for (of, sub) in [(0, 0), (1, 1), (0x10, 0), (0x11, 2), (0x12, 0), (255, 255)] {
            assert!(select(&mut driver, of, sub).is_empty(), "{of} {sub}");
        }
    }

    /// The driver has a part of a press when the machine pauses; and the key is pressed during a pause.
    #[test]
    fn a_press_goes_on_after_a_pause() {
        let button = Arc::new(Button::default());
        let mut driver = Driver::ready(Box::new(PowerKey::new(Arc::clone(&button))));
        assert!(button.press());
        for index in 0..8u16 {
            let at = BUFFERS + 8 * u64::from(index);
            driver.describe_chain(rings(0)[0], index, &[(at, 8, WRITE)]);
            driver.offer(0, index);
            driver.wait_until("an event", |d| d.used(0) == index + 1);
            driver.core.pause();
            if index == 3 {
                assert!(button.press(), "through a pause");
            }
            assert_eq!(driver.used(0), index + 1);
            driver.core.resume();
        }
        let event = |index: u64| {
            let at = GuestAddress(BUFFERS + 8 * index);
            driver.ram.read_obj::<u64>(at).unwrap()
        };
        let key = |value: u64| (value << 32) | (116 << 16) | 1;
        let press = [key(1), 0, key(0), 0];
        let events = [0, 1, 2, 3, 4, 5, 6, 7].map(event);
        assert_eq!(events, [press, press].concat()[..]);
        driver.core.pause();
        drop(driver);
        assert!(!button.press(), "its device has gone");
    }

    /// Buffers come late, and the driver's reset takes the key's end from it.
    #[test]
    fn a_press_comes_as_soon_as_there_is_room() {
        let button = Arc::new(Button::default());
        assert!(!button.press(), "nobody is there");
        let mut driver = Driver::ready(Box::new(PowerKey::new(Arc::clone(&button))));
        assert!(button.press());
        for index in 0..4 {
            let desc = Desc {
                addr: BUFFERS + 8 * u64::from(index),
                len: 8,
                flags: WRITE,
                next: 0,
            };
            driver.describe(0, index, desc);
            driver.offer(0, index);
            driver.wait_until("an event", |d| d.used(0) == index + 1);
        }
        let read = |at: u64| {
            driver
                .ram
                .read_obj::<u64>(GuestAddress(BUFFERS + at))
                .unwrap()
        };
        let key = |value: u64| (value << 32) | (116 << 16) | 1;
        assert_eq!(
            [read(0), read(8), read(16), read(24)],
            [key(1), 0, key(0), 0]
        );
        driver.core.set_status(0);
        assert!(!button.press());
    }
}
