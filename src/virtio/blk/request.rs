//! Parses a driver's requests to a disk. Does not access the disk.
//!
//! VIRTIO 1.2, section 5.2.6.

use virtio_bindings::virtio_blk::*;

use crate::memory::{Byte, Pieces};
use crate::virtio::queue::Chain;

/// Bytes per sector. The same for every disk, whatever its block size.
pub(super) const SECTOR: u64 = SECTOR_BYTES as u64;
/// [`SECTOR`] in the type of block sizes.
pub(super) const SECTOR_BYTES: u32 = 512;
/// Most sectors in one range of a discard or write-zeroes request. Even a slow host zeroes so many
/// quickly.
pub(super) const RANGE_MAX: u32 = 1 << 15;
/// Most ranges in one discard or write-zeroes request.
pub(super) const RANGES_MAX: u32 = 16;
/// Length of a disk's name in bytes.
pub(super) const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Size of a request's header: type, reserved, sector.
const HEADER: usize = 16;
/// Size of a range: sector, count, flags.
const SEGMENT: usize = 16;

/// A parsed request.
#[derive(Debug)]
pub(super) struct Request {
    /// What to do.
    pub operation: Operation,
    /// The request's data in RAM: bytes to write to the disk, or room for the bytes that are read.
    pub data: Pieces,
    /// Where the status byte goes.
    status: Byte,
    /// Bytes that the device may write before the status byte.
    pub room: usize,
    /// Bytes of data, whatever becomes of `data`.
    pub length: usize,
}

/// The operation that a request asks for. Offsets and lengths are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Read from this offset to the request's data.
    Read(u64),
    /// Write the request's data at this offset.
    Write(u64),
    /// Make all completed writes durable.
    Flush,
    /// Return the disk's name.
    Id,
    /// Discard the contents of these ranges.
    Discard(Vec<Range>),
    /// Fill these ranges with zeros.
    WriteZeroes(Vec<Range>),
    /// An unknown type, or an invalid list of ranges.
    Unsupported,
}

impl Operation {
    /// Its name, and the offset of its first byte.
    pub(super) fn describe(&self) -> (&'static str, u64) {
        let start = |ranges: &[Range]| ranges.first().map_or(0, |range| range.offset);
        match self {
            Operation::Read(at) => ("read", *at),
            Operation::Write(at) => ("write", *at),
            Operation::Flush => ("flush", 0),
            Operation::Id => ("id", 0),
            Operation::Discard(ranges) => ("discard", start(ranges)),
            Operation::WriteZeroes(ranges) => ("write zeroes", start(ranges)),
            Operation::Unsupported => ("unsupported", 0),
        }
    }
}

/// A part of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    /// Offset of the first byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// Whether the range may become a hole in the file.
    pub unmap: bool,
}

/// The result of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// Success.
    Ok = VIRTIO_BLK_S_OK as isize,
    /// The operation failed, wholly or in part.
    IoError = VIRTIO_BLK_S_IOERR as isize,
    /// The disk does not support the operation.
    Unsupported = VIRTIO_BLK_S_UNSUPP as isize,
}

impl Status {
    /// Its name in a trace.
    pub(super) fn name(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::IoError => "error",
            Status::Unsupported => "unsupported",
        }
    }
}

impl Request {
    /// Parses `chain`. `None` if it has no complete header, or no room for the status.
    pub(super) fn parse(mut chain: Chain) -> Option<Self> {
        let mut header = [0; HEADER];
        if chain.readable.copy_to(&mut header) != HEADER {
            return None;
        }
        chain.readable.advance(HEADER);
        let status = chain.writable.split_last()?;
        let room = chain.writable.len();
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        // A sector number beyond 2^55 is beyond any disk, and so is the saturated offset.
        let offset = u64::from_le_bytes(sector).saturating_mul(SECTOR);
        let operation =
            match u32::from_le_bytes([a, b, c, d]) {
                VIRTIO_BLK_T_IN => Operation::Read(offset),
                VIRTIO_BLK_T_OUT => Operation::Write(offset),
                VIRTIO_BLK_T_FLUSH => Operation::Flush,
                VIRTIO_BLK_T_GET_ID => Operation::Id,
                VIRTIO_BLK_T_DISCARD => ranges(&chain.readable, false)
                    .map_or(Operation::Unsupported, Operation::Discard),
                VIRTIO_BLK_T_WRITE_ZEROES => ranges(&chain.readable, true)
                    .map_or(Operation::Unsupported, Operation::WriteZeroes),
                _ => Operation::Unsupported,
            };
        let data = match operation {
            Operation::Write(_) => chain.readable,
            _ => chain.writable,
        };
        Some(Self {
            operation,
            length: data.len(),
            data,
            status,
            room,
        })
    }

    /// Writes the status. `data` is the number of bytes written from the start of the room before
    /// it. Returns the used length for the driver. That includes the status only if the room before
    /// it was filled (VIRTIO 1.2, section 2.7.8.2).
    pub(super) fn finish(&self, status: Status, data: usize) -> usize {
        self.status.set(status as u8);
        if data >= self.room {
            self.room + 1
        } else {
            data
        }
    }
}

/// Parses the ranges of a discard or write-zeroes request. `None` if they are invalid.
fn ranges(list: &Pieces, may_unmap: bool) -> Option<Vec<Range>> {
    const MOST: usize = SEGMENT * RANGES_MAX as usize;
    let count = list.len() / SEGMENT;
    if list.len() % SEGMENT != 0 || !(SEGMENT..=MOST).contains(&list.len()) {
        return None;
    }
    let mut bytes = [0; MOST];
    list.copy_to(&mut bytes);
    let known = if may_unmap {
        VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
    } else {
        0
    };
    let range = |segment: &[u8]| {
        let (sector, rest) = segment.split_first_chunk::<8>()?;
        let (sectors, rest) = rest.split_first_chunk::<4>()?;
        let flags = u32::from_le_bytes(*rest.first_chunk::<4>()?);
        let sectors = u32::from_le_bytes(*sectors);
        (flags & !known == 0 && sectors <= RANGE_MAX).then_some(Range {
            offset: u64::from_le_bytes(*sector).saturating_mul(SECTOR),
            length: u64::from(sectors) * SECTOR,
            unmap: flags != 0,
        })
    };
    bytes.chunks(SEGMENT).take(count).map(range).collect()
}
