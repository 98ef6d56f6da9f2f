//! Disks.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::ConfigError;
use super::keyvalue::{self, KeyValue};

/// The longest name of a disk in bytes: the guest's driver reads no more (VIRTIO_BLK_ID_BYTES).
pub(super) const ID_MAX: usize = 20;

/// A disk of the guest, on a raw image or a block device of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The path of the image or the block device.
    pub path: PathBuf,
    /// The guest cannot write to the disk.
    #[serde(
        default,
        deserialize_with = "keyvalue::switch",
        skip_serializing_if = "keyvalue::is_off"
    )]
    pub readonly: bool,
    /// The disk's name, which the guest shows in /dev/disk/by-id; 1 to 20 bytes. The default is
    /// `disk0` for the first disk, and so on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Access the image with O_DIRECT, so without the host's page cache. For the guest the disk is
    /// the same.
    #[serde(
        default,
        deserialize_with = "keyvalue::switch",
        skip_serializing_if = "keyvalue::is_off"
    )]
    pub direct: bool,
    /// The format of the image. Without it, rvmm looks at the content, and refuses an image that
    /// seems to have another format than raw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// When the guest's writes are durable.
    #[serde(default, skip_serializing_if = "Cache::is_default")]
    pub cache: Cache,
    /// Keep the guest's writes in a temporary file, which is lost when rvmm ends. rvmm only reads
    /// the image then, so many guests can share it.
    #[serde(
        default,
        deserialize_with = "keyvalue::switch",
        skip_serializing_if = "keyvalue::is_off"
    )]
    pub snapshot: bool,
    /// The directory of that file. Without it: `$TMPDIR` if that is set, else /var/tmp if that
    /// exists, else /tmp. rvmm warns if the directory is in the host's RAM and the user did not
    /// choose it.
    #[serde(
        default,
        rename = "snapshot-dir",
        skip_serializing_if = "Option::is_none"
    )]
    pub snapshot_dir: Option<PathBuf>,
}

/// The format of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The image holds the bytes of the disk, and nothing else. They may look like another format:
    /// a guest can write any bytes.
    Raw,
}

/// When the guest's writes are durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// After a later flush has ended, as on a disk with a write cache.
    #[default]
    Writeback,
    /// As soon as the write has ended.
    Writethrough,
    /// At some later time: flushes do nothing. For data that may be lost.
    Unsafe,
}

impl Cache {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl KeyValue for DiskConfig {
    const EXAMPLE: &'static str = "disk.img,readonly";
    const MAIN_KEY: Option<&'static str> = Some("path");
    const SWITCHES: &'static [&'static str] = &["readonly", "direct", "snapshot"];
}

impl FromStr for DiskConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        keyvalue::parse(text)
    }
}

/// The text that the flag accepts.
impl fmt::Display for DiskConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&keyvalue::print(self))
    }
}

impl DiskConfig {
    /// The name of the disk if it is number `index` of the machine's disks, beginning with 0: its
    /// id, or diskN.
    pub fn name(&self, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("disk{index}"))
    }

    /// Whether the guest's writes go to the image itself.
    pub fn is_written(&self) -> bool {
        !self.readonly && !self.snapshot
    }
}

/// Checks everything that does not depend on the host.
pub(super) fn validate(disks: &[DiskConfig]) -> Result<(), ConfigError> {
    let ids = || disks.iter().filter_map(|disk| disk.id.as_ref());
    let names = || {
        disks
            .iter()
            .enumerate()
            .map(|(index, disk)| disk.name(index))
    };
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    for id in ids() {
        if !(1..=ID_MAX).contains(&id.len()) || !id.chars().all(is_plain) {
            return Err(ConfigError::DiskId(id.clone()));
        }
        if names().filter(|other| other == id).count() > 1 {
            return Err(ConfigError::DiskIdTwice(id.clone()));
        }
    }
    for disk in disks {
        let places = [Some(&disk.path), disk.snapshot_dir.as_ref()];
        if places
            .into_iter()
            .flatten()
            .any(|place| place.as_os_str().is_empty())
        {
            return Err(ConfigError::DiskPath(disk.to_string()));
        }
        if disk.direct && disk.snapshot {
            return Err(ConfigError::DiskDirectSnapshot(disk.path.clone()));
        }
        if disk.snapshot_dir.is_some() && !disk.snapshot {
            return Err(ConfigError::DiskSnapshotDir(disk.path.clone()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn disk(text: &str) -> DiskConfig {
        text.parse().unwrap()
    }

    #[test]
    fn two_disks_have_two_names() {
        let of = |texts: [&str; 2]| validate(&texts.map(disk)).is_ok();
        assert!(of(["a", "b"]) && of(["a,id=disk1", "b,id=disk0"]));
        assert!(!of(["a", "b,id=disk0"]) && !of(["a,id=x", "b,id=x"]));
    }

    #[test]
    fn flag_and_json_say_the_same() {
        let all = disk("x.img,readonly,id=root,direct=on,cache=writethrough,snapshot=off");
        assert!(all.readonly && all.direct && !all.snapshot);
        assert_eq!(all.id.as_deref(), Some("root"));
        assert_eq!(all.cache, Cache::Writethrough);
        let json = serde_json::to_string(&all).unwrap();
        assert_eq!(
            json,
            r#"{"path":"x.img","readonly":true,"id":"root","direct":true,"cache":"writethrough"}"#
        );
        assert_eq!(serde_json::from_str::<DiskConfig>(&json).unwrap(), all);
        assert_eq!(disk(&all.to_string()), all);
        assert_eq!(disk("path=a,snapshot=on"), disk("a,snapshot"));
        let placed = disk("a,snapshot,snapshot-dir=/var");
        assert_eq!(placed.snapshot_dir.as_deref(), Some(Path::new("/var")));
        let json = serde_json::to_string(&placed).unwrap();
        assert!(
            json.contains(r#""snapshot":true,"snapshot-dir":"/var""#),
            "{json}"
        );
        assert_eq!(disk(&placed.to_string()), placed);
    }

    #[test]
    fn a_place_for_a_snapshot_needs_one() {
        let line = |text| validate(&[disk(text)]).unwrap_err().to_string();
        assert!(line("a,snapshot-dir=/var").contains("snapshot=on"));
        assert!(validate(&[disk("a,snapshot,snapshot-dir=/var")]).is_ok());
    }

    #[test]
    fn errors_name_the_key() {
        for (text, part) in [
            ("a,readonly=maybe", "on or off"),
            ("a,cache=none", "`writeback`"),
            ("a,format=qcow2", "`raw`"),
            ("a,size=3", "`size`"),
            ("a,ro", "unknown key `ro`"),
            ("a,id", "id=VALUE"),
        ] {
            let error = text.parse::<DiskConfig>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
