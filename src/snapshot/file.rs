//! The file `state` of a snapshot: its header and its sections, as bytes.
//!
//! docs/snapshot-format.md describes the format. [`write()`] and [`read()`] do not access any file.

use std::collections::BTreeSet;

use flate2::Crc;
use thiserror::Error;

use super::Saved;

/// The first bytes of the file.
pub const MAGIC: [u8; 8] = *b"RVMMSNAP";
/// The version of the format: how the file is divided into sections.
pub const VERSION: u32 = 1;

/// The most sections that a file may have. A machine with 512 harts has fewer than 1000.
const SECTIONS_MAX: usize = 4096;

/// Size of the file's head: magic, version, number of sections, size of the file, CRC.
const HEAD: usize = 28;
/// Bytes of the head that its CRC is of.
const HEAD_CHECKED: usize = 24;
/// Room for the id, and for the kind, of a section in bytes. The last byte is 0.
const NAME: usize = 32;
/// Size of a section's head: id, kind, version, length of the payload, CRC.
const SECTION: usize = 2 * NAME + 4 + 8 + 4;
/// Bytes of a section's head that its CRC is of, with the payload behind the head.
const SECTION_CHECKED: usize = SECTION - 4;

/// One part of a machine, and its saved state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// The name of the part, such as `uart` or `disk0`.
    pub id: String,
    /// The state.
    pub saved: Saved,
}

/// Why a file is not a snapshot that rvmm can read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FileError {
    /// The magic is missing.
    #[error("it is not a snapshot of rvmm")]
    NoSnapshot,
    /// The head's CRC is wrong.
    #[error("its head is damaged: the checksum is wrong")]
    Head,
    /// A newer rvmm wrote it.
    #[error("it has format version {0}, and this rvmm knows only version {VERSION}")]
    Version(u32),
    /// Bytes are missing at the end.
    #[error("it is cut short: it has {found} of {size} bytes")]
    Short {
        /// Bytes that are there.
        found: u64,
        /// Bytes that the head promises.
        size: u64,
    },
    /// The head promises fewer bytes than there are.
    #[error("it has {0} bytes too many at its end")]
    Long(u64),
    /// There are more sections than any machine has.
    #[error("it has {0} sections, and a snapshot has {SECTIONS_MAX} at most")]
    Many(usize),
    /// A section's CRC is wrong.
    #[error("section {number} ({name}) is damaged: the checksum is wrong")]
    Damaged {
        /// The number of the section, counted from 1.
        number: u32,
        /// The id and kind that stand there, as far as they can be read.
        name: String,
    },
    /// Two sections have the same id and kind.
    #[error("two sections are {0}")]
    Twice(String),
    /// A section's id or kind is longer than the format allows.
    #[error("the name {0:?} is too long for a section")]
    Name(String),
}

/// The bytes of a file with these sections.
///
/// # Errors
/// Fails if an id or a kind is longer than 31 bytes, or empty, or if there are too many sections.
pub fn write(sections: &[Section]) -> Result<Vec<u8>, FileError> {
    if sections.len() > SECTIONS_MAX {
        return Err(FileError::Many(sections.len()));
    }
    let mut bytes = vec![0; HEAD];
    for Section { id, saved } in sections {
        let start = bytes.len();
        bytes.extend(name(id)?);
        bytes.extend(name(&saved.kind)?);
        bytes.extend(saved.version.to_le_bytes());
        bytes.extend((saved.json.len() as u64).to_le_bytes());
        let crc = crc(&[&bytes[start..], &saved.json]);
        bytes.extend(crc.to_le_bytes());
        bytes.extend(&saved.json);
    }
    let count = u32::try_from(sections.len()).unwrap_or(u32::MAX);
    let size = bytes.len() as u64;
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&count.to_le_bytes());
    bytes[16..HEAD_CHECKED].copy_from_slice(&size.to_le_bytes());
    let crc = crc(&[&bytes[..HEAD_CHECKED]]);
    bytes[HEAD_CHECKED..HEAD].copy_from_slice(&crc.to_le_bytes());
    Ok(bytes)
}

/// The sections of a file with these bytes.
///
/// # Errors
/// Fails if the bytes are not exactly what [`write()`] returns for some sections.
pub fn read(bytes: &[u8]) -> Result<Vec<Section>, FileError> {
    let count = read_head(bytes)?;
    let mut sections: Vec<Section> = Vec::new();
    let mut names = BTreeSet::new();
    let mut rest = &bytes[HEAD..];
    for number in 1..=count {
        let (section, behind) = read_section(rest, number)?;
        if !names.insert((section.id.clone(), section.saved.kind.clone())) {
            return Err(FileError::Twice(label(&section.id, &section.saved.kind)));
        }
        sections.push(section);
        rest = behind;
    }
    match rest.len() {
        0 => Ok(sections),
        more => Err(FileError::Long(more as u64)),
    }
}

/// Checks the file's head, and returns the number of sections.
fn read_head(bytes: &[u8]) -> Result<u32, FileError> {
    if bytes.get(..MAGIC.len()) != Some(&MAGIC) {
        return Err(FileError::NoSnapshot);
    }
    let found = bytes.len() as u64;
    let Some(head) = bytes.first_chunk::<HEAD>() else {
        let size = HEAD as u64;
        return Err(FileError::Short { found, size });
    };
    let version = u32_at(head, 8);
    // Every version of the format has its version here. Say that first: the rest may be different.
    if version > VERSION {
        return Err(FileError::Version(version));
    }
    if version != VERSION || crc(&[&head[..HEAD_CHECKED]]) != u32_at(head, HEAD_CHECKED) {
        return Err(FileError::Head);
    }
    let size = u64_at(head, 16);
    match found.cmp(&size) {
        std::cmp::Ordering::Less => Err(FileError::Short { found, size }),
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(FileError::Long(found - size)),
    }?;
    let count = u32_at(head, 12);
    match usize::try_from(count) {
        Ok(few) if few <= SECTIONS_MAX => Ok(count),
        many => Err(FileError::Many(many.unwrap_or(usize::MAX))),
    }
}

/// The section at the start of `bytes`, and the bytes behind it.
fn read_section(bytes: &[u8], number: u32) -> Result<(Section, &[u8]), FileError> {
    let names = [bytes.get(..NAME), bytes.get(NAME..2 * NAME)].map(Option::unwrap_or_default);
    let [id, kind] = names.map(text);
    let damaged = || FileError::Damaged {
        number,
        name: label(&id, &kind),
    };
    let head = bytes.get(..SECTION).ok_or_else(damaged)?;
    let length = usize::try_from(u64_at(head, 2 * NAME + 4)).map_err(|_| damaged())?;
    let behind = &bytes[SECTION..];
    let json = behind.get(..length).ok_or_else(damaged)?;
    if crc(&[&head[..SECTION_CHECKED], json]) != u32_at(head, SECTION_CHECKED) {
        return Err(damaged());
    }
    // The checksum is right, so whoever wrote this meant it.
    let canonical = names
        .iter()
        .zip([&id, &kind])
        .all(|(found, text)| name(text).is_ok_and(|written| written[..] == **found));
    if !canonical {
        return Err(damaged());
    }
    let saved = Saved {
        version: u32_at(head, 2 * NAME),
        json: json.to_vec(),
        kind,
    };
    Ok((Section { id, saved }, &behind[length..]))
}

/// How messages call a section.
fn label(id: &str, kind: &str) -> String {
    format!("{id}, {kind}")
}

/// A name, padded with zeros.
fn name(text: &str) -> Result<[u8; NAME], FileError> {
    let mut bytes = [0; NAME];
    if text.is_empty() || text.len() >= NAME || text.contains(char::is_control) {
        return Err(FileError::Name(text.into()));
    }
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    Ok(bytes)
}

/// The text of a padded name, as far as it is text.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    let text = String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]);
    text.chars().filter(|c| !c.is_control()).collect()
}

/// The CRC-32 (as in gzip) of `pieces`, one after the other.
fn crc(pieces: &[&[u8]]) -> u32 {
    let mut crc = Crc::new();
    pieces.iter().for_each(|piece| crc.update(piece));
    crc.sum()
}

/// The little-endian number at `at`, which has to be inside.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let number = bytes.get(at..).and_then(<[u8]>::first_chunk);
    number.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let number = bytes.get(at..).and_then(<[u8]>::first_chunk);
    number.map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(id: &str, kind: &str, json: &str) -> Section {
        let (kind, version, json) = (kind.into(), 3, json.into());
        let saved = Saved {
            kind,
            version,
            json,
        };
        Section {
            id: id.into(),
            saved,
        }
    }

    fn sections() -> Vec<Section> {
        vec![
            section("machine", "machine", "{}"),
            section("disk0", "virtio-pci", r#"{"status":15}"#),
            section("disk0", "virtio-blk", ""),
        ]
    }

    #[test]
    fn what_is_written_is_read() {
        for count in 0..=3 {
            let some = &sections()[..count];
            assert_eq!(read(&write(some).unwrap()).unwrap(), some);
        }
        let bytes = write(&sections()).unwrap();
        assert_eq!(bytes.len(), HEAD + 3 * SECTION + 2 + 13);
        assert_eq!(
            &bytes[HEAD + SECTION..][..2],
            b"{}",
            "the first JSON is readable"
        );
    }

    #[test]
    fn each_flipped_bit_is_found() {
        let bytes = write(&sections()).unwrap();
        for bit in 0..8 * bytes.len() {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn each_length_but_one_is_refused() {
        let bytes = write(&sections()).unwrap();
        for length in 0..bytes.len() {
            let error = read(&bytes[..length]).unwrap_err().to_string();
            let expected = match length {
                0..8 => "it is not a snapshot of rvmm".into(),
                8..28 => format!("it is cut short: it has {length} of 28 bytes"),
                _ => format!("it is cut short: it has {length} of {} bytes", bytes.len()),
            };
            assert_eq!(error, expected);
        }
        let longer = [&bytes[..], b"!"].concat();
        let error = read(&longer).unwrap_err().to_string();
        assert_eq!(error, "it has 1 bytes too many at its end");
    }

    #[test]
    fn a_newer_format_is_named() {
        let mut bytes = write(&sections()).unwrap();
        bytes[8] = 2;
        let error = read(&bytes).unwrap_err().to_string();
        assert_eq!(
            error,
            "it has format version 2, and this rvmm knows only version 1"
        );
        bytes[8] = 0;
        assert_eq!(read(&bytes), Err(FileError::Head));
    }

    #[test]
    fn a_damaged_section_is_named() {
        let mut bytes = write(&sections()).unwrap();
        let at = bytes.len() - 1 - SECTION;
        bytes[at] ^= 1;
        let error = read(&bytes).unwrap_err().to_string();
        assert_eq!(
            error,
            "section 2 (disk0, virtio-pci) is damaged: the checksum is wrong"
        );
    }

    #[test]
    fn the_sections_of_a_stranger_are_counted_first() {
        let many = |count| (0..count).map(|n: usize| section(&n.to_string(), "x", ""));
        let most: Vec<Section> = many(4096).collect();
        let mut bytes = write(&most).unwrap();
        assert_eq!(read(&bytes).unwrap(), most);
        let line = "it has 4097 sections, and a snapshot has 4096 at most";
        let more: Vec<Section> = many(4097).collect();
        assert_eq!(write(&more).unwrap_err().to_string(), line);
        bytes[12..16].copy_from_slice(&4097u32.to_le_bytes());
        let crc = crc(&[&bytes[..HEAD_CHECKED]]);
        bytes[HEAD_CHECKED..HEAD].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(read(&bytes).unwrap_err().to_string(), line);
    }

    #[test]
    fn names_fit_and_are_one_parts() {
        let twice = [section("a", "b", ""), section("a", "b", "")];
        let error = read(&write(&twice).unwrap()).unwrap_err().to_string();
        assert_eq!(error, "two sections are a, b");
        let long = "x".repeat(32);
        for name in ["", "a\0b", "a\nb", &long] {
            assert!(write(&[section(name, "b", "")]).is_err());
            assert!(write(&[section("a", name, "")]).is_err());
        }
    }
}
