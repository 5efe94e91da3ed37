//! Verifies WAL as it arrives.
//!
//! A `Scanner` is fed the bytes of one timeline in order, in pieces of any size, and knows at each moment how far they
//! are proved: page headers belong where they stand, records form a chain, their checksums match. The rules are those
//! of PostgreSQL's reader (`xlogreader.c`, `xlogrecovery.c`), with some that it need not have: the zeros after
//! XLOG_SWITCH and those in padding are verified to be zeros, a page that continues nothing has no `xlp_rem_len`, and only
//! a segment's first page may have the long header.
//!
//! It never allocates per record, holds no WAL but the beginning of one record that does not lie whole in the bytes at
//! hand, and changes nothing.
//!
//! ```text
//!                 ┌──────────── page header ───────────┐
//!                 ▼                                    │ page ends
//!   (first page continues ──▶ Head ──▶) Boundary ◀──▶ Record ──▶ overwritten: Boundary, the next record must say so
//!                                          │
//!                                          └ XLOG_SWITCH ──▶ ZeroTail ── segment ends ──▶ Boundary
//! ```
//!
//! What nothing covers, and is therefore not proved: the bytes of a record that began before the first page scanned;
//! the flag XLP_BKP_REMOVABLE; the timeline of a page between that of the page before and the stream's; what
//! the context leaves to be learnt; and the first record's link to the one before it where that one is not known: then
//! a whole old record, in a recycled file, may pass as the first. A scan for the end of torn WAL should therefore
//! start where the record before is known.

use crate::wal::{
    Lsn, PAGE_BYTES, SegmentSize, SystemId, TimelineId, crc,
    format::WalFormat,
    record::{RECORD_HEADER_BYTES, RECORD_PREFIX_BYTES_MAX, Record, RecordHeader, RecordVisitor},
};

mod error;
mod fuzz;
mod pages;
mod partial;

pub use error::{PageLocation, ScanError};
pub use fuzz::fuzz_scan;
use partial::Partial;
pub use partial::overwritten_record;

/// What the WAL must belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanContext {
    /// `wal_segment_size`.
    pub segment_size: SegmentSize,
    /// The cluster; `None`: taken from the first long page header.
    pub system_id: Option<SystemId>,
    /// The timeline whose WAL this is. Pages may have a lower one (they were copied when it began).
    pub timeline: TimelineId,
    /// The format; `None`: taken from the first page.
    pub format: Option<WalFormat>,
}

/// All that must be known to continue a scan at a verified end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResumePoint {
    /// The verified end.
    pub position: Lsn,
    /// Start of the last record before it. `None`: not known, which is allowed at the start of a page only; if that
    /// page continues a record, this is skipped unverified.
    pub previous_record: Option<Lsn>,
    /// Timeline of the last page before it; no later page has a lower one.
    pub page_timeline: Option<TimelineId>,
    /// Only zeros follow up to the end of the segment.
    pub is_in_zero_tail: bool,
}

impl ResumePoint {
    /// A point of which nothing is known but that a segment or page starts there.
    pub const fn unknown(position: Lsn) -> Self {
        Self { position, previous_record: None, page_timeline: None, is_in_zero_tail: false }
    }
}

/// Verifies the WAL of one timeline; see the module.
#[derive(Clone, Debug)]
pub struct Scanner {
    context: ScanContext,
    limits: Limits,
    /// The next byte wanted.
    position: Lsn,
    /// State at the verified end, which is not after `position`.
    verified: ResumePoint,
    /// Timeline of the newest page whose header was accepted.
    page_timeline: Option<TimelineId>,
    within: Within,
    /// Set from a page with the overwrite flag to its first record.
    overwritten: Option<Overwritten>,
    head_end: pages::HeadEnd,
    page_header: pages::PageHeaderBuffer,
    partial: Partial,
    failed: Option<ScanError>,
}

/// What the next byte belongs to, page headers aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Within {
    /// A new record.
    Boundary,
    /// A record that began before the first page; so many of its bytes remain.
    Head { remaining: u32 },
    /// The record in `partial`.
    Record,
    /// The zeros after XLOG_SWITCH.
    ZeroTail,
}

/// The record that was never completed, which the next record must name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overwritten {
    Record(Lsn),
    /// It began before the first page.
    BeforeScan,
}

/// What a record header may hold.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// `None` until a page was seen: then all is allowed that some format allows.
    format: Option<WalFormat>,
    record_bytes_max: u32,
}

impl Scanner {
    /// Starts at a segment's first byte. If a record continues there, the rest of it is skipped unverified.
    pub fn at_segment_start(context: ScanContext, start: Lsn) -> Self {
        Self::resume(context, ResumePoint::unknown(start))
    }

    /// Starts at a verified end.
    pub fn resume(context: ScanContext, from: ResumePoint) -> Self {
        Self {
            context,
            limits: Limits::of(context.format),
            position: from.position,
            verified: from,
            page_timeline: from.page_timeline,
            within: if from.is_in_zero_tail { Within::ZeroTail } else { Within::Boundary },
            overwritten: None,
            head_end: pages::HeadEnd::default(),
            page_header: pages::PageHeaderBuffer::EMPTY,
            partial: Partial::new(from.position),
            failed: None,
        }
    }

    /// Takes the bytes at [`position`](Self::position), any number of them; `visitor` sees each record that they
    /// complete. After an error nothing more is taken, and the same error is returned again.
    pub fn feed<V: RecordVisitor>(&mut self, bytes: &[u8], visitor: &mut V) -> Result<(), ScanError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = self.scan(bytes, visitor);
        if let Err(error) = &result {
            self.failed = Some(error.clone());
        }
        result
    }

    /// The next byte wanted.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// The end of what is proved, where a stream may be cut: the end of the last verified record rounded up to 8
    /// (the page boundary if it fills its page); within the zeros after XLOG_SWITCH the last page boundary, or the
    /// segment's end. The start before any record was verified.
    pub fn verified_end(&self) -> Lsn {
        self.verified.position
    }

    /// The state at [`verified_end`](Self::verified_end).
    pub fn resume_point(&self) -> ResumePoint {
        self.verified
    }

    /// Start of the last verified record, which may be the one before the point resumed at.
    pub fn last_record(&self) -> Option<Lsn> {
        self.verified.previous_record
    }

    /// End of the record that began before the first page and was skipped unverified, if there was one and it ended.
    pub fn head_end(&self) -> Option<Lsn> {
        self.head_end.after
    }

    /// What the WAL must belong to, with what was learnt since the start.
    pub fn context(&self) -> ScanContext {
        self.context
    }

    fn scan<V: RecordVisitor>(&mut self, mut bytes: &[u8], visitor: &mut V) -> Result<(), ScanError> {
        while !bytes.is_empty() {
            let taken = match self.within {
                Within::ZeroTail => self.zero_tail(bytes)?,
                Within::Boundary | Within::Head { .. } | Within::Record if self.is_in_page_header() => {
                    self.page_header(bytes)?
                }
                Within::Head { remaining } => self.skip_head(remaining, self.part_in_page(bytes))?,
                Within::Boundary => self.whole_records(self.part_in_page(bytes), visitor)?,
                Within::Record => self.record_part(self.part_in_page(bytes), visitor)?,
            };
            bytes = bytes.get(taken..).unwrap_or_default();
        }
        Ok(())
    }

    /// The beginning of `bytes` that belongs to the page of the position.
    fn part_in_page<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        let left = usize::try_from(PAGE_BYTES - self.position.page_offset()).unwrap_or(usize::MAX);
        bytes.get(..left).unwrap_or(bytes)
    }

    /// Verifies the records that lie whole in `bytes`, which end within the page; the fast path. Returns how many
    /// bytes they have. If there is none, what is there is the beginning of a record, for the slow path.
    fn whole_records<V: RecordVisitor>(&mut self, bytes: &[u8], visitor: &mut V) -> Result<usize, ScanError> {
        let mut walk = Walk { start: self.position, previous: self.verified.previous_record, rest: bytes };
        // The first record after one that was not seen whole is looked at more closely, on the slow path.
        let is_plain = self.overwritten.is_none() && !self.head_end.may_be_switch(self.position);
        let ended = if is_plain { walk.run(self.limits, visitor) } else { Ok(WalkEnd::NoWholeRecord) };
        let taken = bytes.len() - walk.rest.len();
        if taken > 0 {
            self.position = walk.start;
            self.verified.previous_record = walk.previous;
            self.verify_to(walk.start);
        }
        match ended? {
            WalkEnd::Switch => self.enter_zero_tail(),
            WalkEnd::NoWholeRecord if taken == 0 => {
                self.partial.begin(self.position);
                self.within = Within::Record;
            }
            WalkEnd::NoWholeRecord => {}
        }
        Ok(taken)
    }

    /// Takes more of a record that does not lie whole in one page and one piece of input.
    fn record_part<V: RecordVisitor>(&mut self, bytes: &[u8], visitor: &mut V) -> Result<usize, ScanError> {
        let taken = match self.partial.take(bytes, self.limits, self.verified.previous_record) {
            Err(ScanError::EndOfWal { at }) if self.head_end.may_be_switch(at) && self.partial.is_zero() => {
                // The head was the rest of an XLOG_SWITCH record.
                let position = self.partial.position_in_first_page();
                let zeros = position.bytes_since(self.position);
                self.position = position;
                self.within = Within::ZeroTail;
                return Ok(usize::try_from(zeros).unwrap_or(bytes.len()));
            }
            taken => taken?,
        };
        self.position = self.position.advance(taken as u64);
        if !self.partial.is_complete() {
            return Ok(taken);
        }
        let padding = self.skip_padding(bytes.get(taken..).unwrap_or_default())?;
        if self.position == self.position.max_align() {
            self.record_complete(visitor)?;
        }
        Ok(taken + padding)
    }

    fn record_complete<V: RecordVisitor>(&mut self, visitor: &mut V) -> Result<(), ScanError> {
        let record = self.partial.verified(self.position, self.limits)?;
        partial::check_overwrite(&record, self.overwritten)?;
        visitor.record(&record);
        let is_switch = record.header.is_switch();
        self.overwritten = None;
        self.within = Within::Boundary;
        self.verified.previous_record = Some(self.partial.start());
        self.verify_to(self.position);
        if is_switch {
            self.enter_zero_tail();
        }
        Ok(())
    }

    /// Moves towards the next multiple of 8, over at most as many bytes as are present; a server leaves them zero.
    fn skip_padding(&mut self, present: &[u8]) -> Result<usize, ScanError> {
        let padding = usize::try_from(self.position.max_align().bytes_since(self.position)).unwrap_or(0);
        let padding = present.get(..padding).unwrap_or(present);
        if !is_zero(padding) {
            return Err(ScanError::DataInPadding { at: self.position });
        }
        self.position = self.position.advance(padding.len() as u64);
        Ok(padding.len())
    }

    /// After an XLOG_SWITCH record, which ended at the position.
    fn enter_zero_tail(&mut self) {
        if self.context.segment_size.offset_of(self.position) != 0 {
            self.within = Within::ZeroTail;
            self.verified.is_in_zero_tail = true;
        }
    }

    /// Takes zeros up to the end of the segment; page headers there are zero as well.
    fn zero_tail(&mut self, bytes: &[u8]) -> Result<usize, ScanError> {
        let left = self.context.segment_size.bytes() - self.context.segment_size.offset_of(self.position);
        let part = usize::try_from(left).ok().and_then(|left| bytes.get(..left)).unwrap_or(bytes);
        let zeros = leading_zeros(part);
        self.position = self.position.advance(zeros as u64);
        if let Some(page) = self.position.page_start().filter(|page| *page > self.verified.position) {
            self.verify_to(page);
        }
        if zeros < part.len() {
            return Err(ScanError::DataAfterSwitch { at: self.position });
        }
        if self.context.segment_size.offset_of(self.position) == 0 {
            self.within = Within::Boundary;
            self.verified.is_in_zero_tail = false;
        }
        Ok(zeros)
    }

    fn verify_to(&mut self, end: Lsn) {
        debug_assert!(end <= self.position);
        self.verified.position = end;
        self.verified.page_timeline = self.page_timeline;
        self.verified.is_in_zero_tail = self.within == Within::ZeroTail;
    }
}

/// A walk over the records that lie whole within a part of a page.
struct Walk<'a> {
    start: Lsn,
    previous: Option<Lsn>,
    rest: &'a [u8],
}

/// Why a walk ended, other than by an error.
enum WalkEnd {
    /// Nothing, or only the beginning of a record, is left.
    NoWholeRecord,
    /// The last record was XLOG_SWITCH.
    Switch,
}

impl Walk<'_> {
    fn run<V: RecordVisitor>(&mut self, limits: Limits, visitor: &mut V) -> Result<WalkEnd, ScanError> {
        loop {
            let Some(header_bytes) = self.rest.first_chunk::<RECORD_HEADER_BYTES>() else {
                return Ok(WalkEnd::NoWholeRecord);
            };
            let header = RecordHeader::decode(header_bytes);
            let total = header.total_bytes as usize;
            let Some((whole, after)) = self.rest.split_at_checked(total.next_multiple_of(8)) else {
                return Ok(WalkEnd::NoWholeRecord);
            };
            limits.check_header(&header, self.start, self.previous)?;
            let body = whole.get(RECORD_HEADER_BYTES..total).unwrap_or_default();
            let [checked @ .., _, _, _, _] = header_bytes;
            if crc::of_record(checked, body) != header.crc {
                return Err(ScanError::WrongChecksum { at: self.start });
            }
            if whole.get(total..).is_some_and(|padding| !is_zero(padding)) {
                return Err(ScanError::DataInPadding { at: self.start.advance(total as u64) });
            }
            let end = self.start.advance(whole.len() as u64);
            let prefix = body.get(..RECORD_PREFIX_BYTES_MAX).unwrap_or(body);
            let record = Record { start: self.start, end, header, format: limits.format, prefix };
            if header.is_overwrite_contrecord() {
                partial::check_overwrite(&record, None)?;
            }
            visitor.record(&record);
            *self = Self { start: end, previous: Some(self.start), rest: after };
            if header.is_switch() {
                return Ok(WalkEnd::Switch);
            }
        }
    }
}

impl Limits {
    fn of(format: Option<WalFormat>) -> Self {
        let longest = WalFormat::V13.record_bytes_max();
        Self { format, record_bytes_max: format.map_or(longest, WalFormat::record_bytes_max) }
    }

    #[inline]
    fn is_resource_manager(self, id: u8) -> bool {
        self.format.unwrap_or(WalFormat::V19).is_resource_manager(id)
    }

    /// As `ValidXLogRecordHeader`.
    #[inline]
    fn check_header(self, header: &RecordHeader, at: Lsn, previous: Option<Lsn>) -> Result<(), ScanError> {
        let is_chained = match previous {
            Some(previous) => header.previous == Some(previous),
            None => header.previous.is_none_or(|previous| previous < at),
        };
        let is_long_enough = header.total_bytes as usize >= RECORD_HEADER_BYTES;
        let is_short_enough = header.total_bytes <= self.record_bytes_max;
        let has_manager = self.is_resource_manager(header.resource_manager);
        if is_long_enough && is_short_enough && has_manager && is_chained {
            return Ok(());
        }
        Err(self.header_error(header, at, previous))
    }

    /// What is wrong with a header that is; the first fault in PostgreSQL's order.
    #[cold]
    fn header_error(self, header: &RecordHeader, at: Lsn, previous: Option<Lsn>) -> ScanError {
        match self.check_length(header.total_bytes, at) {
            Err(error) => error,
            Ok(()) if !self.is_resource_manager(header.resource_manager) => {
                ScanError::InvalidResourceManager { at, got: header.resource_manager }
            }
            Ok(()) => ScanError::WrongPreviousRecord { at, got: header.previous, expected: previous },
        }
    }

    fn check_length(self, total_bytes: u32, at: Lsn) -> Result<(), ScanError> {
        let limit = self.record_bytes_max;
        match total_bytes {
            0 => Err(ScanError::EndOfWal { at }),
            got if (got as usize) < RECORD_HEADER_BYTES => Err(ScanError::RecordTooShort { at, got }),
            got if got > limit => Err(ScanError::RecordTooLong { at, got, limit }),
            _ => Ok(()),
        }
    }
}

/// Whether the bytes, which are few, are all zero.
#[inline]
fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Number of zero bytes at the beginning.
fn leading_zeros(bytes: &[u8]) -> usize {
    const BLOCK_BYTES: usize = 256;
    let mut zeros = 0;
    for block in bytes.chunks(BLOCK_BYTES) {
        if block.iter().fold(0, |all, byte| all | byte) != 0 {
            return zeros + block.iter().take_while(|byte| **byte == 0).count();
        }
        zeros += block.len();
    }
    zeros
}

#[cfg(test)]
mod tests;
