//! A disk's requests as their driver writes them: parsed here, without a disk.
//!
//! VIRTIO 1.2, section 5.2.6.

use virtio_bindings::virtio_blk::*;

use crate::memory::{Byte, Pieces};
use crate::virtio::queue::Chain;

/// Bytes of a sector, whatever the disk's block size.
pub(super) const SECTOR: u64 = SECTOR_BYTES as u64;
/// The same, as block sizes are told.
pub(super) const SECTOR_BYTES: u32 = 512;
/// Sectors of one such range: what a slow host zeroes in a moment.
pub(super) const RANGE_MAX: u32 = 1 << 15;
/// Ranges that one discard or write-zeroes request may name.
pub(super) const RANGES_MAX: u32 = 16;
/// Bytes of a disk's name.
pub(super) const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Type, reserved, sector.
const HEADER: usize = 16;
/// Sector, count, flags.
const SEGMENT: usize = 16;

/// A request, ready to be served.
#[derive(Debug)]
pub(super) struct Request {
    /// What to do.
    pub operation: Operation,
    /// Where its data is in RAM: to write to the disk, or room for what is read.
    pub data: Pieces,
    /// Room for the status byte.
    status: Byte,
    /// Bytes the device may write before the status.
    pub room: usize,
}

/// What a driver asks of a disk. Offsets and lengths are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Read to the request's data.
    Read(u64),
    /// Write the request's data.
    Write(u64),
    /// Make durable what was written and acknowledged.
    Flush,
    /// Tell the disk's name.
    Id,
    /// Forget these ranges.
    Discard(Vec<Range>),
    /// Fill these ranges with zeros.
    WriteZeroes(Vec<Range>),
    /// Something else, or a range list that cannot be.
    Unsupported,
}

/// A part of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    /// From here.
    pub offset: u64,
    /// So many bytes.
    pub length: u64,
    /// They may become a hole.
    pub unmap: bool,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// As asked.
    Ok = VIRTIO_BLK_S_OK as isize,
    /// Not, or not wholly.
    IoError = VIRTIO_BLK_S_IOERR as isize,
    /// Not something this disk does.
    Unsupported = VIRTIO_BLK_S_UNSUPP as isize,
}

impl Request {
    /// Parses `chain`; `None` where there is no header, or no room for a status.
    pub(super) fn parse(mut chain: Chain) -> Option<Self> {
        let mut header = [0; HEADER];
        if chain.readable.copy_to(&mut header) != HEADER {
            return None;
        }
        chain.readable.advance(HEADER);
        let status = chain.writable.split_last()?;
        let room = chain.writable.len();
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        // A sector beyond 2^55 is beyond every disk, and stays so as an offset.
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
            data,
            status,
            room,
        })
    }

    /// Writes the status. `data` bytes were written from the start of the room before it. Returns for
    /// how many bytes from the start of the whole room that is so: the status counts only where nothing
    /// is left out before it (VIRTIO 1.2, section 2.7.8.2).
    pub(super) fn finish(&self, status: Status, data: usize) -> usize {
        self.status.set(status as u8);
        if data >= self.room {
            self.room + 1
        } else {
            data
        }
    }
}

/// The ranges of a discard or write-zeroes request.
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
