//! What a record consists of.
//!
//! Owns the layout of what follows a record's header (`DecodeXLogRecord`), as far as its prefix shows it. The blocks'
//! data and the main data mean nothing here.

use crate::wal::record::{RECORD_HEADER_BYTES, Record};

/// The parts of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents<'a> {
    /// Number of full-page images.
    pub images: u32,
    /// Bytes of full-page images, as stored (without their hole, compressed).
    pub image_bytes: u64,
    /// The first bytes of the main data; all of it, unless the record is longer than its prefix.
    pub main_data: &'a [u8],
}

impl<'a> Contents<'a> {
    /// Reads the headers of a record's parts. `None` if they are malformed, or if the format is not known and they have
    /// images.
    pub fn of(record: &Record<'a>) -> Option<Self> {
        let mut headers = Fields(record.prefix);
        let body_bytes = (record.header.total_bytes as usize).checked_sub(RECORD_HEADER_BYTES)?;
        let mut contents = Self { images: 0, image_bytes: 0, main_data: &[] };
        let mut data_bytes = 0;
        // The headers end where as many bytes are left as they have announced.
        while body_bytes.checked_sub(record.prefix.len() - headers.0.len())? > data_bytes {
            match headers.u8()? {
                MAIN_DATA_SHORT => {
                    let bytes = usize::from(headers.u8()?);
                    contents.main_data = main_data(record.prefix, body_bytes, bytes)?;
                    return Some(contents);
                }
                MAIN_DATA_LONG => {
                    let bytes = usize::try_from(headers.u32()?).ok()?;
                    contents.main_data = main_data(record.prefix, body_bytes, bytes)?;
                    return Some(contents);
                }
                ORIGIN => headers.skip(2)?,
                TOP_LEVEL_XID => headers.skip(4)?,
                0..=BLOCK_ID_MAX => data_bytes += contents.block_header(&mut headers, record)?,
                _ => return None,
            }
        }
        Some(contents)
    }

    /// Reads the header of a block after its number; returns how many bytes of image and data it announces.
    fn block_header(&mut self, headers: &mut Fields<'a>, record: &Record<'a>) -> Option<usize> {
        let flags = headers.u8()?;
        let mut announced = usize::from(headers.u16()?);
        if flags & BLOCK_HAS_IMAGE != 0 {
            let compressed = record.format?.image_compressed_flags();
            let image_bytes = headers.u16()?;
            headers.skip(2)?;
            let image_flags = headers.u8()?;
            if image_flags & compressed != 0 && image_flags & IMAGE_HAS_HOLE != 0 {
                headers.skip(2)?;
            }
            self.images += 1;
            self.image_bytes += u64::from(image_bytes);
            announced += usize::from(image_bytes);
        }
        if flags & BLOCK_SAME_RELATION == 0 {
            headers.skip(12)?;
        }
        headers.skip(4)?;
        Some(announced)
    }
}

/// The main data is the last part of a record.
fn main_data(prefix: &[u8], body_bytes: usize, main_data_bytes: usize) -> Option<&[u8]> {
    let start = body_bytes.checked_sub(main_data_bytes)?;
    Some(prefix.get(start..).unwrap_or_default())
}

/// Reads fields one after another; `None` past the end.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn i64(&mut self) -> Option<i64> {
        self.array().map(i64::from_le_bytes)
    }

    pub(crate) fn skip(&mut self, bytes: usize) -> Option<()> {
        self.0 = self.0.get(bytes..)?;
        Some(())
    }
}

/// `XLR_BLOCK_ID_DATA_SHORT`: the main data, its length in one byte.
pub const MAIN_DATA_SHORT: u8 = 255;
/// `XLR_BLOCK_ID_DATA_LONG`: the main data, its length in four bytes.
pub const MAIN_DATA_LONG: u8 = 254;
/// `XLR_BLOCK_ID_ORIGIN`.
const ORIGIN: u8 = 253;
/// `XLR_BLOCK_ID_TOPLEVEL_XID`.
const TOP_LEVEL_XID: u8 = 252;
/// `XLR_MAX_BLOCK_ID`.
const BLOCK_ID_MAX: u8 = 32;
/// `BKPBLOCK_HAS_IMAGE`.
pub const BLOCK_HAS_IMAGE: u8 = 0x10;
/// `BKPBLOCK_SAME_REL`: the relation is that of the block before, and not repeated.
const BLOCK_SAME_RELATION: u8 = 0x80;
/// `BKPIMAGE_HAS_HOLE`.
pub const IMAGE_HAS_HOLE: u8 = 0x01;
