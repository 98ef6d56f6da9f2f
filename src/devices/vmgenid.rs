//! The virtual machine generation ID: a random number that tells a guest that it was restored from
//! a snapshot, so that it does not use its random numbers a second time.
//!
//! It follows Linux' `drivers/virt/vmgenid.c` and the binding `microsoft,vmgenid`. The ID is at the
//! start of the register range. When it has changed, the device sends an edge on its interrupt
//! line. Linux binds its driver since 6.10, and mixes a new ID into its random number generator.

use std::io;
use std::sync::Mutex;

use rustix::io::retry_on_intr;
use rustix::rand::{GetRandomFlags, getrandom};
use serde_json::{Value, json};

use crate::bus::{Device, FdtError, FdtWriter, IrqLine, MmioDevice};
use crate::snapshot::{LoadError, Parts};
use crate::util::sync::lock;

/// Size of the register range. The binding's example has this size too.
pub const SIZE: u64 = 0x1000;

/// Size of the ID in bytes.
const ID_SIZE: usize = 16;

type Id = [u8; ID_SIZE];

/// The generation ID device. It saves no state, because a restored machine gets a new ID.
pub struct VmGenId {
    state: Mutex<State>,
    line: IrqLine,
    base: u64,
}

struct State {
    id: Id,
    /// The guest has not been told of this ID.
    is_news: bool,
}

impl VmGenId {
    /// Creates the device at guest-physical address `base` with a random ID. `line` must be an
    /// interrupt line of its own.
    ///
    /// # Errors
    /// Fails if the host gives no random bytes.
    pub fn new(base: u64, line: IrqLine) -> io::Result<Self> {
        let state = State {
            id: random_id()?,
            is_news: false,
        };
        Ok(Self {
            state: Mutex::new(state),
            line,
            base,
        })
    }

    /// Changes the ID. The guest is told when the machine is resumed.
    ///
    /// # Errors
    /// Fails if the host gives no random bytes. The ID has not changed then.
    pub fn renew(&self) -> io::Result<()> {
        let mut state = lock(&self.state);
        let old = state.id;
        while state.id == old {
            state.id = random_id()?;
        }
        state.is_news = true;
        Ok(())
    }

    /// Tells the guest that the ID has changed.
    fn notify(&self) {
        self.line.pulse();
    }
}

/// Random bytes. Does not block: the host's entropy pool was initialized long before a VM starts.
fn random_id() -> io::Result<Id> {
    let mut id = Id::default();
    let count = retry_on_intr(|| getrandom(&mut id, GetRandomFlags::empty()))?;
    if count < ID_SIZE {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(id)
}

/// Linux copies the ID as if it was memory: by accesses of any width and alignment. Behind the ID
/// are zeros. Stores have no effect.
impl MmioDevice for VmGenId {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let id = lock(&self.state).id;
        let start = usize::try_from(offset).unwrap_or(ID_SIZE);
        let rest = id.get(start..).unwrap_or_default();
        for (byte, from) in data.iter_mut().zip(rest) {
            *byte = *from;
        }
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

impl Device for VmGenId {
    fn id(&self) -> &str {
        "vmgenid"
    }

    fn describe(&self) -> Value {
        json!({ "kind": "vmgenid", "registers": self.base })
    }

    fn fdt_node(&self, fdt: &mut FdtWriter) -> Result<(), FdtError> {
        let node = fdt.begin_node(&format!("rng@{:x}", self.base))?;
        fdt.property_string("compatible", "microsoft,vmgenid")?;
        fdt.property_array_u64("reg", &[self.base, SIZE])?;
        fdt.property_array_u32("interrupts-extended", &self.line.fdt_edge_interrupt())?;
        fdt.end_node(node)
    }

    /// Takes nothing from the snapshot, but changes the ID. The guest is not told before the
    /// resume, because the interrupt controller's state is loaded later than this.
    fn load(&self, _: &mut Parts) -> Result<(), LoadError> {
        let renewed = self.renew();
        renewed.map_err(|error| {
            LoadError::Other(format!("Failed to choose a new generation ID: {error}"))
        })
    }

    fn resume(&self) {
        let is_news = std::mem::take(&mut lock(&self.state).is_news);
        if is_news {
            self.notify();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::bus::IrqSink;
    use crate::snapshot::Saved;

    #[derive(Default)]
    struct Wire(Mutex<Vec<bool>>);

    impl IrqSink for Wire {
        fn set_level(&self, source: u32, high: bool) {
            assert_eq!(source, 12);
            lock(&self.0).push(high);
        }
        fn fdt_interrupt(&self, source: u32) -> Vec<u32> {
            vec![7, source]
        }
    }

    fn device() -> (VmGenId, Arc<Wire>) {
        let wire = Arc::<Wire>::default();
        let line = IrqLine::new(wire.clone(), 12);
        (VmGenId::new(0x10_2000, line).unwrap(), wire)
    }

    fn read(device: &VmGenId, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        device.read(offset, &mut data);
        data
    }

    /// The ID, read as eight bytes at a time.
    fn id(device: &VmGenId) -> Vec<u8> {
        [read(device, 0, 8), read(device, 8, 8)].concat()
    }

    #[test]
    fn it_is_random_and_reads_as_memory() {
        let (device, wire) = device();
        let id = id(&device);
        assert_ne!(id, self::id(&self::device().0));
        let behind = [&id[..], &[0; 16]].concat();
        for offset in 0..17 {
            for len in [1, 2, 4, 8] {
                let read = read(&device, offset as u64, len);
                assert_eq!(read, behind[offset..offset + len], "{len} at {offset}");
            }
        }
        for offset in [SIZE - 8, SIZE, u64::MAX - 7, u64::MAX] {
            assert_eq!(read(&device, offset, 8), [0; 8]);
        }
        assert!(lock(&wire.0).is_empty());
    }

    #[test]
    fn stores_have_no_effect() {
        let (device, _) = device();
        let before = id(&device);
        for offset in [0, 1, 8, 16, u64::MAX] {
            device.write(offset, &[0xff; 8]);
        }
        assert_eq!(id(&device), before);
    }

    #[test]
    fn only_a_restored_guest_gets_a_new_id_and_one_edge() {
        let (device, wire) = device();
        let before = id(&device);
        device.pause();
        assert_eq!(device.save().unwrap(), []);
        device.resume();
        assert_eq!(id(&device), before);
        assert!(lock(&wire.0).is_empty());
        device.pause();
        device.load(&mut Parts::default()).unwrap();
        assert_ne!(id(&device), before);
        assert!(lock(&wire.0).is_empty(), "not before the resume");
        device.resume();
        device.pause();
        device.resume();
        assert_eq!(*lock(&wire.0), [true, false]);
    }

    #[test]
    fn it_leaves_state_that_is_not_its_own() {
        let saved = Saved {
            kind: "other".into(),
            version: 1,
            json: Vec::new(),
        };
        let mut parts = Parts::new(vec![saved]);
        device().0.load(&mut parts).unwrap();
        assert!(parts.finish().is_err());
    }
}
