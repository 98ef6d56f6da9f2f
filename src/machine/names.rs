//! The names of the parts of a machine in a snapshot that are no devices. A device has its id.

use crate::snapshot::MACHINE;

/// The names under which the consoles' queues are saved.
pub(super) const CONSOLES: [&str; 2] = ["console-uart", "console-virtio"];

const VCPU: &str = "vcpu";
const OVERLAY: &str = "overlay-";
/// The beginning of a device's name whose id is that of a part that is no device.
const DEVICE: &str = "device-";

/// The name under which the vCPU of hart `hart` is saved.
pub(super) fn vcpu_id(hart: usize) -> String {
    format!("{VCPU}{hart}")
}

/// The name under which the overlay of a disk is saved, and of its file in the snapshot.
pub(super) fn overlay_file(disk: &str) -> String {
    format!("{OVERLAY}{disk}")
}

/// The disk whose overlay has this name.
pub(super) fn overlay_of(name: &str) -> Option<&str> {
    name.strip_prefix(OVERLAY)
}

/// The name under which a device with this id is saved, if no other device has that name.
pub(super) fn device_id(id: &str) -> String {
    match is_no_device(id) {
        true => format!("{DEVICE}{id}"),
        false => id.to_owned(),
    }
}

/// The name of a device if `before` others have its name.
pub(super) fn numbered(name: &str, before: usize) -> String {
    match before {
        0 => name.to_owned(),
        _ => format!("{name}-{}", before + 1),
    }
}

/// Whether the state of something that is no device has this name, or may have it.
pub(super) fn is_no_device(name: &str) -> bool {
    let is_number = |text: &str| text.parse::<u32>().is_ok();
    let is_vcpu = name.strip_prefix(VCPU).is_some_and(is_number);
    name == MACHINE || CONSOLES.contains(&name) || overlay_of(name).is_some() || is_vcpu
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_that_of_one_part() {
        let others = [vcpu_id(0), vcpu_id(511), overlay_file("disk0")];
        assert!(others.iter().all(|name| is_no_device(name)));
        assert!(is_no_device(MACHINE) && is_no_device("console-uart"));
        for device in [
            "disk0",
            "vcpu",
            "vcpux",
            "uart",
            "machine-2",
            "device-vcpu1",
        ] {
            assert!(!is_no_device(device), "{device}");
        }
    }
}
