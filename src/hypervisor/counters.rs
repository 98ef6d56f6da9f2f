//! Parser for KVM's binary statistics: `Documentation/virt/kvm/api.rst`, section 4.133
//! KVM_GET_STATS_FD. The file begins with a header; each value has a descriptor. Their fields are:
//!
//! ```text
//!  0 flags       8 num_desc   16 desc_offset    a descriptor:  0 flags      8 offset in the data
//!  4 name_size  12 id_offset  20 data_offset                   4 exponent  12 bucket_size
//!                                                              6 size      16 name
//! ```

/// One of KVM's counters for a vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counter {
    /// KVM's name, such as `mmio_exit_user`.
    pub name: String,
    /// Its value.
    pub value: u64,
}

const HEADER_SIZE: usize = 24;
const DESCRIPTOR_SIZE: usize = 16;
/// The bits of a descriptor's flags that hold the type of the value.
const TYPE_MASK: u32 = 0x0f;
/// The type of a counter that only grows. Other types are instant values, peaks and histograms.
const TYPE_CUMULATIVE: u32 = 0;

/// The counters of a statistics file. `None` if `file` is not a statistics file.
pub fn parse(file: &[u8]) -> Option<Vec<Counter>> {
    let mut counters = Vec::new();
    for value in values(file)? {
        if value.kind != TYPE_CUMULATIVE || value.count != 1 {
            continue;
        }
        let bytes = file.get(value.at..value.at.checked_add(8)?)?;
        counters.push(Counter {
            name: value.name,
            value: u64::from_le_bytes(bytes.try_into().ok()?),
        });
    }
    Some(counters)
}

/// The offset of the value `name` in a statistics file. The value has eight bytes.
pub fn offset(file: &[u8], name: &str) -> Option<usize> {
    let value = values(file)?.into_iter().find(|value| value.name == name)?;
    Some(value.at)
}

/// The content of a descriptor.
struct Described {
    kind: u32,
    /// The number of values, of eight bytes each.
    count: u16,
    /// The offset of the first value in the file.
    at: usize,
    name: String,
}

fn values(file: &[u8]) -> Option<Vec<Described>> {
    let header = file.get(..HEADER_SIZE)?;
    let field = |at| usize::try_from(u32_at(header, at)?).ok();
    let (name_size, count) = (field(4)?, field(8)?);
    let (descriptors, data) = (file.get(field(16)?..)?, field(20)?);
    let descriptors = descriptors.chunks_exact(DESCRIPTOR_SIZE.checked_add(name_size)?);
    let described = descriptors.take(count).map(|descriptor| {
        let offset = usize::try_from(u32_at(descriptor, 8)?).ok()?;
        let name = descriptor[DESCRIPTOR_SIZE..].split(|byte| *byte == 0);
        Some(Described {
            kind: u32_at(descriptor, 0)? & TYPE_MASK,
            count: u16::from_le_bytes(descriptor[6..8].try_into().ok()?),
            at: data.checked_add(offset)?,
            name: String::from_utf8_lossy(name.into_iter().next()?).into_owned(),
        })
    });
    described.collect()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME_SIZE: usize = 48;

    fn descriptor(flags: u32, size: u16, offset: u32, name: &str) -> Vec<u8> {
        let mut bytes = flags.to_le_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(size.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(name.as_bytes());
        bytes.resize(DESCRIPTOR_SIZE + NAME_SIZE, 0);
        bytes
    }

    fn file() -> Vec<u8> {
        let descriptors = [
            descriptor(0, 1, 0, "exits"),
            descriptor(0x13, 2, 8, "halt_wait_hist"),
            descriptor(0x21, 1, 24, "blocking"),
            descriptor(0x20, 1, 24, "halt_ns"),
        ]
        .concat();
        let id = 24u32;
        let at = id + 48;
        let data = at + u32::try_from(descriptors.len()).unwrap();
        let mut file: Vec<u8> = [0, 48, 4, id, at, data]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        file.resize(at as usize, 0);
        file.extend(descriptors);
        file.extend([7u64, 1, 2, 9].iter().flat_map(|word| word.to_le_bytes()));
        file
    }

    #[test]
    fn plain_counters_have_name_and_value() {
        let counters = parse(&file()).unwrap();
        let read: Vec<_> = counters
            .iter()
            .map(|c| (c.name.as_str(), c.value))
            .collect();
        assert_eq!(read, [("exits", 7), ("halt_ns", 9)]);
    }

    #[test]
    fn a_value_of_any_kind_is_found() {
        let file = file();
        let at = offset(&file, "blocking").unwrap();
        assert_eq!(file[at..at + 8], 9u64.to_le_bytes());
        assert_eq!(offset(&file, "block"), None);
    }

    #[test]
    fn any_other_file_is_none() {
        let file = file();
        for end in 0..file.len() {
            // A name that is cut short may go unnoticed, but the parser must not panic or invent
            // values.
            if let Some(counters) = parse(&file[..end]) {
                assert!(counters.len() < 2, "{end}");
            }
        }
        assert_eq!(parse(&[0xff; 100]), None);
    }
}
