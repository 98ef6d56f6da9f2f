//! Tests what a snapshot needs of the host's side of the devices.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::*;

/// An empty image, deleted at the test's end.
struct TempImage(PathBuf);

impl TempImage {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("rvmm-{name}-{}", std::process::id()));
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        Self(path)
    }
}

impl Drop for TempImage {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn disk(path: &Path, flags: &str) -> DiskConfig {
    format!("{}{flags}", path.display()).parse().unwrap()
}

#[test]
fn disks_are_synced_and_their_overlays_found() {
    let images = ["plain", "overlaid"].map(TempImage::new);
    let config = VmConfig {
        disk: vec![
            disk(&images[0].0, ""),
            disk(&images[1].0, ",snapshot=on,id=scratch"),
        ],
        ..VmConfig::default()
    };
    let backends = Backends::open(&config, None).unwrap();
    backends.disks.sync().unwrap();
    let names: Vec<_> = backends.disks.overlays().map(|(name, _)| name).collect();
    assert_eq!(names, ["scratch"]);
}

/// A snapshot's configuration has the address that the guest has seen, also on another host.
#[test]
fn the_interfaces_addresses_are_pinned() {
    let net = |text: &str| text.parse::<NetConfig>().unwrap();
    let mut config = VmConfig {
        net: vec![net("tap=tap0"), net("tap=tap1,mac=52:54:00:00:00:01")],
        ..VmConfig::default()
    };
    // The taps need not exist.
    let backends = Backends {
        make: Vec::new(),
        disks: Disks(Vec::new()),
        macs: config.net.iter().map(mac).collect(),
        console: None,
        button: None,
        tracer: Slot::default(),
    };
    backends.pin(&mut config);
    let macs: Vec<_> = config.net.iter().map(|net| net.mac).collect();
    let given = Mac([0x52, 0x54, 0, 0, 0, 1]);
    assert_eq!(macs, [Some(default_mac("tap0")), Some(given)]);
}

#[test]
fn messages_are_as_many_as_in_the_snapshot() {
    let devices = || -> Vec<Box<dyn VirtioDevice>> {
        let button = Arc::default();
        vec![Box::<Rng>::default(), Box::new(PowerKey::new(button))]
    };
    assert_eq!(share_vectors(&devices(), 8), [2, 3]);
    let same = |saved: &[usize], limit| {
        let counts = same_vectors(&devices(), saved, limit);
        counts.map_err(|error| error.to_string())
    };
    assert_eq!(same(&[2, 2], 8), Ok(vec![2, 2]));
    assert_eq!(same(&[2, 3], 5), Ok(vec![2, 3]));
    assert_eq!(same(&[0, 0], 0), Ok(vec![0, 0]), "by pin");
    let none = same(&[2, 3], 0).unwrap_err();
    assert!(none.contains("5 interrupt messages"), "{none}");
    let other = same(&[2], 8).unwrap_err();
    assert!(other.contains("1 devices on PCI"), "{other}");
    for hostile in [[1 << 16, 0], [usize::MAX, 1], [usize::MAX; 2]] {
        same(&hostile, 64).unwrap_err();
        same(&hostile, u32::MAX).unwrap_err();
    }
}
