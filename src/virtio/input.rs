//! A power key: virtio-input (VIRTIO 1.2, section 5.8) with one key, which asks the guest to power
//! off.
//!
//! Linux passes the key to the readers of its input device; systemd-logind then powers off.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
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
use crate::snapshot::{LoadError, Parts, SaveError, Saved, State};
use crate::util::poll::Events;
use crate::util::sync::lock;
use crate::util::thread::Kind;

const QUEUE_SIZE: u16 = 64;
const NAME: &[u8] = b"rvmm power key";
/// From `include/uapi/linux/input-event-codes.h`.
const EV_SYN: u16 = 0;
const EV_KEY: u16 = 1;
const SYN_REPORT: u16 = 0;
const KEY_POWER: u16 = 116;
/// From `include/uapi/linux/input.h`.
const BUS_VIRTUAL: u16 = 6;

/// Events of one press: key down and key up, each followed by a report. Type, code, value.
const PRESS: [(u16, u16, u32); 4] = [
    (EV_KEY, KEY_POWER, 1),
    (EV_SYN, SYN_REPORT, 0),
    (EV_KEY, KEY_POWER, 0),
    (EV_SYN, SYN_REPORT, 0),
];

/// Events that the driver has yet to get: type, code, value.
type Unsent = &'static [(u16, u16, u32)];

/// The host's side of the key. It outlives a reset.
#[derive(Default)]
pub struct Button {
    pressed: AtomicBool,
    /// Wakes the device's thread. `None` while no driver is ready.
    wake: Mutex<Option<Arc<EventFd>>>,
}

impl Button {
    /// Presses the key. False if no driver is ready.
    pub fn press(&self) -> bool {
        let wake = lock(&self.wake);
        if let Some(wake) = &*wake {
            self.pressed.store(true, Ordering::Release);
            // Fails only with 2^64 signals pending.
            let _ = wake.write(1);
        }
        wake.is_some()
    }
}

/// The guest's side of the key.
pub struct PowerKey {
    button: Arc<Button>,
    /// What the driver has selected in the configuration space: `select` and `subsel`.
    selected: Mutex<[u8; 2]>,
    /// The part of a press that the driver has yet to get. The serving thread works on it.
    unsent: Arc<Mutex<Unsent>>,
    workers: Workers,
}

impl PowerKey {
    /// Returns the key that `button` presses.
    pub fn new(button: Arc<Button>) -> Self {
        Self {
            button,
            selected: Mutex::default(),
            unsent: Arc::default(),
            workers: Workers::default(),
        }
    }

    /// Returns the data that the driver has selected; empty for an unknown selection.
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

    /// struct virtio_input_config: select, subsel, size of the data, five reserved bytes, the data.
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
            *lock(&self.unsent) = &[];
        }
        let unsent = Arc::clone(&self.unsent);
        let serve = move |queues: &mut [Virtq], stop: &Stop| {
            serve(queues, &button, &mut lock(&unsent), &kicks, stop)
        };
        let worker = Worker::serve(Kind::Virtio, "power key", vec![events, statuses], serve)?;
        self.workers.add(worker);
        *lock(&self.button.wake) = Some(wake);
        Ok(())
    }

    /// The key can be pressed during a pause. The driver gets the events after it.
    fn stop(&self, why: StopFor) {
        if why == StopFor::Reset {
            *lock(&self.button.wake) = None;
        }
        self.workers.stop(why);
    }

    fn deactivate(&self, _: StopFor) -> Vec<Virtq> {
        self.workers.take_back()
    }

    fn save(&self) -> Result<Vec<Saved>, SaveError> {
        let saved = SavedKey {
            selected: *lock(&self.selected),
            unsent: lock(&self.unsent).len(),
            pressed: self.button.pressed.load(Ordering::Acquire),
        };
        Ok(vec![Saved::of(&saved)?])
    }

    fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
        let saved: SavedKey = parts.take()?;
        let sent = PRESS.len().checked_sub(saved.unsent);
        let Some(unsent) = sent.and_then(|sent| PRESS.get(sent..)) else {
            let (unsent, all) = (saved.unsent, PRESS.len());
            let why = format!("it has {unsent} events to send, and a press has {all}");
            return Err(LoadError::Unfit(why));
        };
        *lock(&self.unsent) = unsent;
        *lock(&self.selected) = saved.selected;
        self.button.pressed.store(saved.pressed, Ordering::Release);
        Ok(())
    }
}

/// The saved state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedKey {
    selected: [u8; 2],
    /// The number of events at the end of a press that the driver has yet to get.
    unsent: usize,
    /// The key was pressed once more.
    pressed: bool,
}

impl State for SavedKey {
    const KIND: &'static str = "virtio-input";
    const VERSION: u32 = 1;
}

/// A machine may end while it is paused; then `stop` was not called for a reset.
impl Drop for PowerKey {
    fn drop(&mut self) {
        *lock(&self.button.wake) = None;
    }
}

fn serve(
    queues: &mut [Virtq],
    button: &Button,
    unsent: &mut Unsent,
    kicks: &Events,
    stop: &Stop,
) -> Result<(), Broken> {
    let [events, statuses] = queues else {
        return Ok(());
    };
    while !stop.is_asked() {
        // Status events set a keyboard's lights. This keyboard has none, so they are ignored.
        let more_statuses = statuses.drain(stop, |_| Ok(0));
        more_statuses?;
        if unsent.is_empty() && button.pressed.swap(false, Ordering::AcqRel) {
            *unsent = &PRESS;
        }
        if !send(events, unsent)? {
            kicks.wait(None);
        }
    }
    Ok(())
}

/// Sends events from `unsent` as far as the driver has buffers. True if the driver may have added
/// buffers meanwhile.
fn send(queue: &mut Virtq, unsent: &mut Unsent) -> Result<bool, Broken> {
    while let Some(((kind, code, value), rest)) = unsent.split_first() {
        let Some(chain) = queue.pop()? else {
            queue.notify()?;
            return queue.enable_notifications();
        };
        let mut event = [0; 8];
        event[..2].copy_from_slice(&kind.to_le_bytes());
        event[2..4].copy_from_slice(&code.to_le_bytes());
        event[4..].copy_from_slice(&value.to_le_bytes());
        let count = chain.writable.copy_from(&event);
        queue.push(chain.head, count)?;
        *unsent = rest;
    }
    queue.notify()?;
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

    /// The machine pauses after each event of a press, and the key is pressed again during a pause.
    /// The machine may also be restored after each pause.
    #[test]
    fn a_press_goes_on_after_a_pause() {
        for is_restored in [false, true] {
            pauses_in_a_press(is_restored);
        }
    }

    fn pauses_in_a_press(is_restored: bool) {
        let mut button = Arc::new(Button::default());
        let mut driver = Driver::ready(Box::new(PowerKey::new(Arc::clone(&button))));
        assert!(button.press());
        for index in 0..8u16 {
            let at = BUFFERS + 8 * u64::from(index);
            driver.describe_chain(rings(0)[0], index, &[(at, 8, WRITE)]);
            driver.offer(0, index);
            driver.wait_until("an event", |d| d.used(0) == index + 1);
            driver.core.pause();
            if index == 3 {
                assert!(button.press(), "pressed during a pause");
            }
            if is_restored {
                button = Arc::default();
                driver.replace(Box::new(PowerKey::new(Arc::clone(&button))));
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
        assert!(!button.press(), "device is gone");
    }

    #[test]
    fn what_the_driver_has_selected_is_kept() {
        let key = || Box::new(PowerKey::new(Arc::default()));
        let mut driver = Driver::of(key());
        assert_eq!(select(&mut driver, 1, 0), NAME);
        driver.replace(key());
        let mut answer = [0; NAME.len()];
        driver.core.read_config(8, &mut answer);
        assert_eq!(answer, NAME);
    }

    #[test]
    fn hostile_a_press_has_no_more_events() {
        let key = PowerKey::new(Arc::default());
        for (unsent, is_taken) in [(0, true), (4, true), (5, false), (usize::MAX, false)] {
            let selected = [0, 0];
            let pressed = false;
            let saved = SavedKey {
                selected,
                unsent,
                pressed,
            };
            let mut parts = Parts::new(vec![Saved::of(&saved).unwrap()]);
            assert_eq!(key.load(&mut parts).is_ok(), is_taken, "{unsent}");
        }
    }

    /// The driver offers buffers late. After its reset the key cannot be pressed.
    #[test]
    fn a_press_comes_as_soon_as_there_is_room() {
        let button = Arc::new(Button::default());
        assert!(!button.press(), "no driver yet");
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
