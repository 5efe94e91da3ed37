//! A record whose bytes arrive in pieces, or lie on more than one page.
//!
//! Owns what must be kept of such a record: its header, the first bytes after it, and the checksum so far. It does not
//! see page headers and padding.

use crate::wal::{
    Lsn, PAGE_BYTES,
    contents::Contents,
    crc,
    record::{RECORD_HEADER_BYTES, RECORD_PREFIX_BYTES_MAX, Record, RecordHeader},
    scanner::{Limits, Overwritten, ScanError},
};

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Partial {
    start: Lsn,
    /// Bytes taken.
    taken: u32,
    /// `xl_tot_len`; 0 until all of the header that is on the first page was taken.
    total: u32,
    header: [u8; RECORD_HEADER_BYTES],
    prefix: [u8; RECORD_PREFIX_BYTES_MAX],
    /// Checksum of what was taken after the header.
    crc: u32,
}

impl Partial {
    /// No record yet.
    pub(super) fn new(start: Lsn) -> Self {
        let (header, prefix) = ([0; RECORD_HEADER_BYTES], [0; RECORD_PREFIX_BYTES_MAX]);
        Self { start, taken: 0, total: 0, header, prefix, crc: 0 }
    }

    /// A record starts at `start`.
    pub(super) fn begin(&mut self, start: Lsn) {
        self.start = start;
        self.taken = 0;
        self.total = 0;
        self.crc = 0;
    }

    /// Where the record starts.
    pub(super) fn start(&self) -> Lsn {
        self.start
    }

    /// Bytes that remain; known whenever a page has ended.
    pub(super) fn remaining(&self) -> u32 {
        self.total.saturating_sub(self.taken)
    }

    /// Whether all that was taken of the header is zero.
    pub(super) fn is_zero(&self) -> bool {
        self.header.iter().take(self.taken as usize).all(|byte| *byte == 0)
    }

    /// Position after the bytes taken, as long as they are all on one page.
    pub(super) fn position_in_first_page(&self) -> Lsn {
        self.start.advance(u64::from(self.taken))
    }

    /// Whether all bytes were taken.
    pub(super) fn is_complete(&self) -> bool {
        self.total != 0 && self.taken == self.total
    }

    /// Takes what belongs to the record from `bytes`, which end within the page; returns how many bytes that are. The
    /// header is checked as soon as it is complete. If it goes on to the next page its length is checked before that
    /// page is looked at, as the server does.
    pub(super) fn take(
        &mut self,
        bytes: &[u8],
        limits: Limits,
        previous: Option<Lsn>,
    ) -> Result<usize, ScanError> {
        let mut taken = 0;
        let header_taken = self.taken as usize;
        if header_taken < RECORD_HEADER_BYTES {
            taken = copy_to(&mut self.header, header_taken, bytes);
            self.taken += count(taken);
            let header = RecordHeader::decode(&self.header);
            let page_left = PAGE_BYTES - self.start.page_offset();
            if self.total == 0 && u64::from(self.taken) >= page_left.min(RECORD_HEADER_BYTES as u64) {
                limits.check_length(header.total_bytes, self.start)?;
                self.total = header.total_bytes;
            }
            if self.taken as usize == RECORD_HEADER_BYTES {
                limits.check_header(&header, self.start, previous)?;
            }
        }
        if self.taken as usize >= RECORD_HEADER_BYTES {
            let body = bytes.get(taken..).unwrap_or_default();
            let body = body.get(..self.remaining() as usize).unwrap_or(body);
            copy_to(&mut self.prefix, self.taken as usize - RECORD_HEADER_BYTES, body);
            self.crc = crc::extend(self.crc, body);
            self.taken += count(body.len());
            taken += body.len();
        }
        Ok(taken)
    }

    /// The complete record, if its checksum is right.
    pub(super) fn verified(&self, end: Lsn, limits: Limits) -> Result<Record<'_>, ScanError> {
        let header = RecordHeader::decode(&self.header);
        let [checked @ .., _, _, _, _] = &self.header;
        if crc::extend(self.crc, checked) != header.crc {
            return Err(ScanError::WrongChecksum { at: self.start });
        }
        let body_bytes = (self.total as usize).saturating_sub(RECORD_HEADER_BYTES);
        let prefix = self.prefix.get(..body_bytes).unwrap_or(&self.prefix);
        Ok(Record { start: self.start, end, header, format: limits.format, prefix })
    }
}

/// Checks that `record` says of the right record that it was never completed, or says nothing of the kind if none was
/// not (`VerifyOverwriteContrecord`).
pub(super) fn check_overwrite(record: &Record<'_>, expected: Option<Overwritten>) -> Result<(), ScanError> {
    let at = record.start;
    let got = overwritten_record(record);
    let is_right = match expected {
        None => !record.header.is_overwrite_contrecord(),
        Some(Overwritten::Record(start)) => got == Some(start),
        Some(Overwritten::BeforeScan) => got.is_some_and(|got| got < at),
    };
    let expected = match expected {
        Some(Overwritten::Record(start)) => Some(start),
        Some(Overwritten::BeforeScan) | None => None,
    };
    if is_right { Ok(()) } else { Err(ScanError::WrongOverwrittenRecord { at, got, expected }) }
}

/// Where the record began of which `record`, an XLOG_OVERWRITE_CONTRECORD, says that it was never completed.
pub fn overwritten_record(record: &Record<'_>) -> Option<Lsn> {
    if !record.header.is_overwrite_contrecord() {
        return None;
    }
    let main_data = Contents::of(record)?.main_data;
    Lsn::from_wire(u64::from_le_bytes(*main_data.first_chunk()?))
}

/// Copies as much of `from` to `to`, from offset `at`, as fits.
fn copy_to(to: &mut [u8], at: usize, from: &[u8]) -> usize {
    let to = to.get_mut(at..).unwrap_or_default();
    let length = to.len().min(from.len());
    if let (Some(to), Some(from)) = (to.get_mut(..length), from.get(..length)) {
        to.copy_from_slice(from);
    }
    length
}

/// A number of bytes of one record, which its length field bounds.
fn count(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
