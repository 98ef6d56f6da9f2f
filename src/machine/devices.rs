//! The machine's devices, by name.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::bus::Device;

/// All devices. Each comes after the devices that it needs; the interrupt controller is the first.
#[derive(Default)]
pub(super) struct Devices(Vec<(String, Arc<dyn Device>)>);

impl Devices {
    /// Adds `device` at the end. Its name is its id. If another device has that name already (users
    /// choose the ids of disks), a number is appended.
    pub(super) fn add(&mut self, device: Arc<dyn Device>) {
        let id = device.id();
        let numbered = (2..).map(|number| format!("{id}-{number}"));
        let mut names = std::iter::once(id.to_owned()).chain(numbered);
        let is_free = |name: &String| self.0.iter().all(|(known, _)| known != name);
        let name = names.find(is_free).unwrap_or_default();
        self.0.push((name, device));
    }

    /// All devices, in the order in which they were added.
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = &dyn Device> {
        self.0.iter().map(|(_, device)| device.as_ref())
    }

    /// Pauses all devices, the last one first. No vCPU may run.
    pub(super) fn pause(&self) {
        self.iter().rev().for_each(Device::pause);
    }

    /// Resumes all devices, the first one first.
    pub(super) fn resume(&self) {
        self.iter().for_each(Device::resume);
    }

    /// The state of each device, by name.
    pub(super) fn describe(&self) -> Map<String, Value> {
        let state = |(name, device): &(String, Arc<dyn Device>)| (name.clone(), device.describe());
        self.0.iter().map(state).collect()
    }

    /// A readable name for the registers that are at `gpa` now.
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
            devices.add(Arc::new(Probe(name, Arc::clone(&steps))));
        }
        devices.pause();
        devices.resume();
        let steps = lock(&steps).join(", ");
        assert_eq!(
            steps,
            "pause disk0, pause uart, pause irqchip, resume irqchip, resume uart, resume disk0"
        );
        assert_eq!(devices.describe()["disk0"], "disk0");
    }

    #[test]
    fn a_name_that_is_taken_gets_a_number() {
        let mut devices = Devices::default();
        for _ in 0..3 {
            devices.add(Arc::new(Probe("uart", Arc::default())));
        }
        let names: Vec<_> = devices.describe().keys().cloned().collect();
        assert_eq!(names, ["uart", "uart-2", "uart-3"]);
    }
}
