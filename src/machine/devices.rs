//! The machine's devices, by name.

use std::sync::Arc;

use anyhow::{Result, bail};
use serde_json::{Map, Value};

use crate::bus::Device;

/// All devices: each comes behind those it needs, the interrupt controller first.
#[derive(Default)]
pub(super) struct Devices(Vec<Arc<dyn Device>>);

impl Devices {
    /// Adds `device` behind all others.
    ///
    /// # Errors
    /// There is one of that name.
    pub(super) fn add(&mut self, device: Arc<dyn Device>) -> Result<()> {
        let name = device.id();
        if self.0.iter().any(|known| known.id() == name) {
            bail!("two devices have the name {name:?}");
        }
        self.0.push(device);
        Ok(())
    }

    /// All of them, in the order in which they were added.
    pub(super) fn iter(&self) -> impl Iterator<Item = &dyn Device> {
        self.0.iter().map(Arc::as_ref)
    }

    /// Stops all of them, the last one first. No vCPU runs.
    pub(super) fn pause(&self) {
        self.iter()
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .for_each(Device::pause);
    }

    /// Lets all of them go on, the first one first.
    pub(super) fn resume(&self) {
        self.iter().for_each(Device::resume);
    }

    /// The state of each, by name.
    pub(super) fn describe(&self) -> Map<String, Value> {
        let state = |device: &dyn Device| (device.id().to_owned(), device.describe());
        self.iter().map(state).collect()
    }

    /// What people call the registers at `gpa` just now.
    pub(super) fn registers_at(&self, gpa: u64) -> Option<String> {
        self.iter().find_map(|device| device.registers_at(gpa))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{FdtError, FdtWriter};
    use crate::util::sync::lock;
    use std::sync::Mutex;

    struct Probe(&'static str, Arc<Mutex<Vec<String>>>);

    impl Device for Probe {
        fn id(&self) -> &str {
            self.0
        }
        fn fdt_node(&self, _: &mut FdtWriter) -> Result<(), FdtError> {
            Ok(())
        }
        fn pause(&self) {
            lock(&self.1).push(format!("pause {}", self.0));
        }
        fn resume(&self) {
            lock(&self.1).push(format!("resume {}", self.0));
        }
        fn describe(&self) -> Value {
            self.0.into()
        }
    }

    #[test]
    fn what_others_need_stops_last_and_goes_on_first() {
        let (mut devices, steps) = (Devices::default(), Arc::default());
        for name in ["irqchip", "uart", "disk0"] {
            devices
                .add(Arc::new(Probe(name, Arc::clone(&steps))))
                .unwrap();
        }
        let twice = devices.add(Arc::new(Probe("uart", Arc::default())));
        assert!(twice.unwrap_err().to_string().contains("\"uart\""));
        devices.pause();
        devices.resume();
        let steps = lock(&steps).join(", ");
        assert_eq!(
            steps,
            "pause disk0, pause uart, pause irqchip, resume irqchip, resume uart, resume disk0"
        );
        assert_eq!(devices.describe()["disk0"], "disk0");
    }
}
