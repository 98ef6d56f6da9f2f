//! The machine's devices, by name.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

use super::names::{device_id, numbered};
use crate::bus::Device;
use crate::snapshot::Parts;
use crate::snapshot::file::Section;

/// All devices. Each comes after the devices that it needs; the interrupt controller is the first.
#[derive(Default)]
pub(super) struct Devices(Vec<(String, Arc<dyn Device>)>);

impl Devices {
    /// Adds `device` at the end. Its name is its id. If another device has that name already (users
    /// choose the ids of disks), a number is appended. If a part that is no device has it in a
    /// snapshot, it gets another beginning.
    pub(super) fn add(&mut self, device: Arc<dyn Device>) {
        let id = device_id(device.id());
        let mut names = (0..).map(|before| numbered(&id, before));
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

    /// Waits until the devices have done what [`Devices::resume`] began.
    pub(super) fn settle(&self) {
        self.iter().for_each(Device::settle);
    }

    /// The sections of a snapshot with the state of all devices, which are paused.
    ///
    /// # Errors
    /// Fails if the state of a device cannot be read.
    pub(super) fn save(&self) -> Result<Vec<Section>> {
        let mut sections = Vec::new();
        for (id, device) in &self.0 {
            let saved = device.save();
            let saved = saved.with_context(|| format!("Failed to save the state of {id}"))?;
            sections.extend(saved.into_iter().map(|saved| Section {
                id: id.clone(),
                saved,
            }));
        }
        Ok(sections)
    }

    /// Loads the state of all devices, which are new and paused. Takes their state out of `states`,
    /// by name. The interrupt controller comes last: the others set the levels of its wires.
    ///
    /// # Errors
    /// Fails if the state of a device is missing or not complete, or if the device cannot have it.
    pub(super) fn load(&self, states: &mut BTreeMap<String, Parts>) -> Result<()> {
        let irqchip = self.0.len().min(1);
        let (first, rest) = self.0.split_at(irqchip);
        for (id, device) in rest.iter().chain(first) {
            let mut parts = states.remove(id).unwrap_or_default();
            let loaded = device.load(&mut parts).and_then(|()| parts.finish());
            loaded.with_context(|| format!("Failed to restore {id}"))?;
        }
        Ok(())
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
    use crate::snapshot::{LoadError, SaveError, Saved, State};
    use crate::util::sync::lock;
    use serde::{Deserialize, Serialize};
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
        fn save(&self) -> Result<Vec<Saved>, SaveError> {
            Ok(vec![Saved::of(&Name(self.0.into()))?])
        }
        fn load(&self, parts: &mut Parts) -> Result<(), LoadError> {
            let Name(name) = parts.take()?;
            lock(&self.1).push(format!("load {name} into {}", self.0));
            Ok(())
        }
    }

    /// The state of a [`Probe`].
    #[derive(Serialize, Deserialize)]
    struct Name(String);

    impl State for Name {
        const KIND: &'static str = "probe";
        const VERSION: u32 = 1;
    }

    #[test]
    fn the_interrupt_controller_is_loaded_last() {
        let (mut devices, steps) = (Devices::default(), Arc::default());
        for name in ["irqchip", "uart", "disk0"] {
            devices.add(Arc::new(Probe(name, Arc::clone(&steps))));
        }
        let mut states = BTreeMap::<String, Parts>::new();
        for Section { id, saved } in devices.save().unwrap() {
            states.entry(id).or_default().add(saved);
        }
        states.insert("other".into(), Parts::default());
        devices.load(&mut states).unwrap();
        let steps = lock(&steps).join(", ");
        assert_eq!(
            steps,
            "load uart into uart, load disk0 into disk0, load irqchip into irqchip"
        );
        assert_eq!(states.len(), 1, "what no device took is left");
        let error = devices.load(&mut states).unwrap_err();
        assert_eq!(
            format!("{error:#}"),
            "Failed to restore uart: there is no probe state"
        );
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

    #[test]
    fn a_disk_does_not_get_the_name_of_a_vcpu() {
        let mut devices = Devices::default();
        for name in ["vcpu0", "overlay-disk0"] {
            devices.add(Arc::new(Probe(name, Arc::default())));
        }
        let names: Vec<_> = devices.describe().keys().cloned().collect();
        assert_eq!(names, ["device-overlay-disk0", "device-vcpu0"]);
    }
}
