//! Builds valid WAL, for tests.
//!
//! Owns the writing side of the format: page headers, records chained and checksummed over pages and segments,
//! XLOG_SWITCH and its zeros, records that were never completed. It knows every place where its WAL may be cut
//! ([`WalBuilder::safe_ends`]), independently of the scanner. Not part of the program: compiled for tests only.

use crate::wal::{
    Lsn, LsnRange, PAGE_BYTES, PgTimestamp, SegmentNo, SegmentSize, SystemId, TimelineId, WalFormat,
    contents::{BLOCK_HAS_IMAGE, IMAGE_HAS_HOLE, MAIN_DATA_LONG, MAIN_DATA_SHORT},
    crc,
    format::{PAGE_BLOCKS_REMOVABLE, PAGE_FIRST_IS_CONTRECORD, PAGE_LONG_HEADER},
    page::{LONG_HEADER_BYTES, LongPageHeader, PageHeader, SHORT_HEADER_BYTES},
    record::{
        RECORD_HEADER_BYTES, RECORD_HEADER_CHECKED_BYTES, RecordHeader, TRANSACTION_RESOURCE_MANAGER,
        XLOG_OVERWRITE_CONTRECORD, XLOG_RESOURCE_MANAGER, XLOG_SWITCH,
    },
    scanner::ScanContext,
};

/// WAL of one timeline from a page boundary on, that grows by a record at a time.
#[derive(Clone, Debug)]
pub struct WalBuilder {
    format: WalFormat,
    system_id: SystemId,
    segment_size: SegmentSize,
    timeline: TimelineId,
    start: Lsn,
    bytes: Vec<u8>,
    previous: Option<Lsn>,
    records: Vec<LsnRange>,
    zero_tails: Vec<LsnRange>,
}

impl WalBuilder {
    /// No WAL yet. `start` is the start of a segment, or at least of a page.
    pub fn new(
        format: WalFormat,
        system_id: SystemId,
        segment_size: SegmentSize,
        timeline: TimelineId,
        start: Lsn,
    ) -> Self {
        assert!(start.page_offset() == 0, "{start} is not a page boundary");
        let (bytes, records, zero_tails) = (Vec::new(), Vec::new(), Vec::new());
        Self { format, system_id, segment_size, timeline, start, bytes, previous: None, records, zero_tails }
    }

    /// PostgreSQL 15, segments of 1 MiB, timeline 1, from the second segment on.
    pub fn small() -> Self {
        let segment_size = SegmentSize::new(1 << 20).unwrap_or(SegmentSize::DEFAULT);
        let start = Lsn::MIN.advance(segment_size.bytes() - 1);
        Self::new(WalFormat::V15, SystemId(0x6A5B_4C3D_2E1F_0A0B), segment_size, TimelineId::FIRST, start)
    }

    /// The first record will name `previous` as the one before it, as when WAL before the start was scanned.
    #[must_use]
    pub fn after(mut self, previous: Lsn) -> Self {
        assert!(self.bytes.is_empty() && previous < self.start, "{previous} is not before {}", self.start);
        self.previous = Some(previous);
        self
    }

    /// The first page begins with the end of a record of which `remaining` bytes are not before the start.
    #[must_use]
    pub fn continuing(mut self, remaining: &[u8]) -> Self {
        assert!(self.bytes.is_empty(), "only the first page may continue an unknown record");
        self.put(remaining);
        self.pad();
        self.previous = Some(Lsn::MIN.advance(self.start.get() - 64));
        self
    }

    /// Pages from the next one on belong to another timeline, as after a promotion.
    pub fn switch_timeline(&mut self, timeline: TimelineId) {
        assert!(timeline >= self.timeline, "timelines never decrease");
        self.timeline = timeline;
    }

    /// Appends a record; `body` is all that follows its header.
    pub fn record(&mut self, resource_manager: u8, info: u8, xid: u32, body: &[u8]) -> LsnRange {
        self.begin_page_if_at_boundary(0);
        let start = self.end();
        let bytes = self.encode_record(resource_manager, info, xid, body);
        self.put(&bytes);
        self.pad();
        let range = range(start, self.end());
        self.previous = Some(start);
        self.records.push(range);
        range
    }

    /// Appends a record that has no blocks, only main data.
    pub fn main_data_record(&mut self, resource_manager: u8, info: u8, main_data: &[u8]) -> LsnRange {
        let mut body = Vec::with_capacity(main_data.len() + 5);
        match u8::try_from(main_data.len()) {
            Ok(length) => body.extend([MAIN_DATA_SHORT, length]),
            Err(_) => {
                body.push(MAIN_DATA_LONG);
                body.extend(length_of(main_data).to_le_bytes());
            }
        }
        body.extend(main_data);
        self.record(resource_manager, info, 0, &body)
    }

    /// Appends a record of some extension with `bytes` of main data that look like nothing else.
    pub fn noise(&mut self, bytes: usize) -> LsnRange {
        let mut state = self.end().get() | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        let main_data: Vec<u8> = std::iter::repeat_with(&mut next).flatten().take(bytes).collect();
        self.main_data_record(10, 0, &main_data)
    }

    /// Appends a record that ends exactly at `end`, which must be a multiple of 8, not within a page header, and far
    /// enough ahead for a record to fit.
    pub fn noise_up_to(&mut self, end: Lsn) -> LsnRange {
        let mut record_bytes = 0;
        let mut position = self.end();
        while position < end {
            let header = if position.page_offset() == 0 { self.page_header_bytes(position) } else { 0 };
            let page_left = PAGE_BYTES - position.page_offset();
            let part = page_left.min(end.bytes_since(position));
            record_bytes += part.saturating_sub(header);
            position = position.advance(part);
        }
        let header_bytes = RECORD_HEADER_BYTES + if record_bytes <= 24 + 2 + 255 { 2 } else { 5 };
        let main_data_bytes = usize::try_from(record_bytes).unwrap_or(0).checked_sub(header_bytes);
        let record = self.noise(main_data_bytes.unwrap_or(0));
        assert!(record.end() == end, "no record ends at {end}");
        record
    }

    /// A checkpoint that began at `redo`.
    pub fn checkpoint(&mut self, redo: Lsn, is_shutdown: bool) -> LsnRange {
        let body = self.checkpoint_body(redo, 0);
        self.main_data_record(XLOG_RESOURCE_MANAGER, if is_shutdown { 0x00 } else { 0x10 }, &body)
    }

    /// The same, online, when `next_xid` was given out next.
    pub fn checkpoint_with(&mut self, redo: Lsn, next_xid: u64) -> LsnRange {
        let body = self.checkpoint_body(redo, next_xid);
        self.main_data_record(XLOG_RESOURCE_MANAGER, 0x10, &body)
    }

    fn checkpoint_body(&self, redo: Lsn, next_xid: u64) -> Vec<u8> {
        let timeline = self.timeline.get().to_le_bytes();
        let mut body = redo.get().to_le_bytes().to_vec();
        body.extend(timeline);
        body.extend(timeline);
        // Flags and padding.
        body.extend([0; 8]);
        body.extend(next_xid.to_le_bytes());
        body.extend([0; 56]);
        body
    }

    /// Appends the record of a transaction that was committed at `at`.
    pub fn commit(&mut self, at: PgTimestamp) -> LsnRange {
        self.main_data_record(TRANSACTION_RESOURCE_MANAGER, 0x00, &at.0.to_le_bytes())
    }

    /// Appends a record with a full-page image of so many bytes (less than 8192: without its hole).
    pub fn full_page_image(&mut self, image: &[u8]) -> LsnRange {
        let apply_flag = if self.format < WalFormat::V15 { 0x04 } else { 0x02 };
        let image_bytes = u16::try_from(image.len()).unwrap_or(u16::MAX);
        let mut body = vec![0, BLOCK_HAS_IMAGE, 0, 0];
        body.extend(image_bytes.to_le_bytes());
        body.extend(64_u16.to_le_bytes());
        body.push(IMAGE_HAS_HOLE | apply_flag);
        body.extend([0x7F, 6, 0, 0, 1, 0, 0, 0, 0, 64, 0, 0]);
        body.extend([7, 0, 0, 0]);
        body.extend(image);
        self.record(XLOG_RESOURCE_MANAGER, 0xB0, 0, &body)
    }

    /// Appends XLOG_SWITCH and zeros up to the end of its segment; returns the place of the record.
    pub fn switch(&mut self) -> LsnRange {
        let record = self.record(XLOG_RESOURCE_MANAGER, XLOG_SWITCH, 0, &[]);
        let end = SegmentNo::ending_at(record.end(), self.segment_size).end(self.segment_size);
        if let Some(tail) = LsnRange::new(record.end(), end) {
            self.zero_tails.push(tail);
            self.bytes.resize(self.offset_of(end), 0);
        }
        record
    }

    /// Appends the beginning of a record, up to the end of the page `pages` pages after the one it starts on, and there
    /// the XLOG_OVERWRITE_CONTRECORD record that says it was never completed. Returns the place of the latter.
    pub fn overwritten(&mut self, pages: u64) -> LsnRange {
        self.begin_page_if_at_boundary(0);
        let start = self.end();
        let end = start.advance((pages + 1) * PAGE_BYTES - start.page_offset());
        let bytes_max = usize::try_from(end.bytes_since(start)).unwrap_or(0);
        let record = self.encode_record(10, 0, 0, &vec![0x5A; bytes_max + 100]);
        self.put_until(&record, end);
        self.begin_page(self.format.overwrite_contrecord_flag(), 0);
        let mut main_data = start.get().to_le_bytes().to_vec();
        main_data.extend(PgTimestamp(1).0.to_le_bytes());
        self.main_data_record(XLOG_RESOURCE_MANAGER, XLOG_OVERWRITE_CONTRECORD, &main_data)
    }

    /// Position of the first byte.
    pub fn start(&self) -> Lsn {
        self.start
    }

    /// Position after the last byte.
    pub fn end(&self) -> Lsn {
        self.start.advance(self.bytes.len() as u64)
    }

    /// All bytes from the start.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes of a range; what lies outside is left out.
    pub fn slice(&self, from: Lsn, to: Lsn) -> &[u8] {
        let to = self.offset_of(to).min(self.bytes.len());
        self.bytes.get(self.offset_of(from)..to).unwrap_or_default()
    }

    /// The bytes by segment, each padded with zeros to its whole size.
    pub fn segments(&self) -> Vec<(SegmentNo, Vec<u8>)> {
        let length = usize::try_from(self.segment_size.bytes()).unwrap_or(usize::MAX);
        let first = SegmentNo::holding(self.start, self.segment_size);
        self.bytes
            .chunks(length)
            .enumerate()
            .map(|(number, bytes)| {
                let mut padded = bytes.to_vec();
                padded.resize(length, 0);
                (SegmentNo(first.0 + number as u64), padded)
            })
            .collect()
    }

    /// The place of each complete record, in order; its end is rounded up to 8.
    pub fn records(&self) -> &[LsnRange] {
        &self.records
    }

    /// The end of each complete record, in order.
    pub fn record_ends(&self) -> Vec<Lsn> {
        self.records.iter().map(|record| record.end()).collect()
    }

    /// The zeros after each XLOG_SWITCH.
    pub fn zero_tails(&self) -> &[LsnRange] {
        &self.zero_tails
    }

    /// Every place where a stream may be cut, in order: the start, the end of each record, and in zeros after
    /// XLOG_SWITCH each page boundary and the end.
    pub fn safe_ends(&self) -> Vec<Lsn> {
        let mut ends = vec![self.start];
        ends.extend(self.record_ends());
        for tail in &self.zero_tails {
            let first = tail.start().advance(PAGE_BYTES - tail.start().page_offset());
            let pages = (0..).map(|page| first.advance(page * PAGE_BYTES));
            ends.extend(pages.take_while(|boundary| *boundary <= tail.end()));
        }
        ends.sort_unstable();
        ends.dedup();
        ends
    }

    /// What must be verified when just the first `bytes` are known.
    pub fn safe_end_within(&self, bytes: usize) -> Lsn {
        let limit = self.start.advance(bytes as u64);
        self.safe_ends().into_iter().rfind(|end| *end <= limit).unwrap_or(self.start)
    }

    /// What a scanner of this WAL is to be told.
    pub fn context(&self) -> ScanContext {
        ScanContext {
            segment_size: self.segment_size,
            system_id: Some(self.system_id),
            timeline: self.timeline,
            format: Some(self.format),
        }
    }

    fn encode_record(&self, resource_manager: u8, info: u8, xid: u32, body: &[u8]) -> Vec<u8> {
        let total_bytes = length_of(body) + length_of(&[0; RECORD_HEADER_BYTES]);
        let mut header =
            RecordHeader { total_bytes, xid, previous: self.previous, info, resource_manager, crc: 0 };
        let unchecked = header.encode();
        let checked = unchecked.first_chunk::<RECORD_HEADER_CHECKED_BYTES>();
        header.crc = checked.map_or(0, |checked| crc::extend(crc::extend(0, body), checked));
        let mut bytes = header.encode().to_vec();
        bytes.extend(body);
        bytes
    }

    /// Appends bytes of a record, and the page headers among them.
    fn put(&mut self, bytes: &[u8]) {
        self.put_until(bytes, Lsn::MIN.advance(u64::MAX - 1));
    }

    /// Appends bytes of a record and the page headers among them, but nothing past the page boundary `limit`.
    fn put_until(&mut self, mut bytes: &[u8], limit: Lsn) {
        while !bytes.is_empty() && self.end() < limit {
            self.begin_page_if_at_boundary(length_of(bytes));
            let page_left = PAGE_BYTES - self.end().page_offset();
            let fitting = usize::try_from(page_left).unwrap_or(0).min(bytes.len());
            let (now, later) = bytes.split_at_checked(fitting).unwrap_or((bytes, &[]));
            self.bytes.extend(now);
            bytes = later;
        }
    }

    fn pad(&mut self) {
        self.bytes.resize(self.offset_of(self.end().max_align()), 0);
    }

    /// Begins a page if the last one is full; its first data are the `remaining` bytes of a record, unless 0.
    fn begin_page_if_at_boundary(&mut self, remaining: u32) {
        let is_new_record = remaining == 0;
        if self.end().page_offset() == 0 {
            self.begin_page(if is_new_record { 0 } else { PAGE_FIRST_IS_CONTRECORD }, remaining);
        }
    }

    fn page_header_bytes(&self, page: Lsn) -> u64 {
        let is_first = self.segment_size.offset_of(page) == 0;
        if is_first { LONG_HEADER_BYTES as u64 } else { SHORT_HEADER_BYTES as u64 }
    }

    fn begin_page(&mut self, flags: u16, remaining: u32) {
        let position = self.end();
        let is_first = self.segment_size.offset_of(position) == 0;
        let removable = if self.format < WalFormat::V19 { PAGE_BLOCKS_REMOVABLE } else { 0 };
        let long = if is_first { PAGE_LONG_HEADER } else { 0 };
        let header = PageHeader {
            magic: self.format.magic(),
            info: flags | removable | long,
            timeline: self.timeline.get(),
            page_address: position.get(),
            remaining,
        };
        self.bytes.extend(header.encode());
        if is_first {
            let segment_bytes = u32::try_from(self.segment_size.bytes()).unwrap_or(u32::MAX);
            let page_bytes = u32::try_from(PAGE_BYTES).unwrap_or(u32::MAX);
            let long = LongPageHeader { system_id: self.system_id.0, segment_bytes, page_bytes };
            self.bytes.extend(long.encode());
        }
    }

    fn offset_of(&self, position: Lsn) -> usize {
        usize::try_from(position.bytes_since(self.start)).unwrap_or(usize::MAX)
    }
}

fn range(start: Lsn, end: Lsn) -> LsnRange {
    let Some(range) = LsnRange::new(start, end) else { unreachable!("a record is never empty") };
    range
}

fn length_of(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_filled_ends_at_its_boundary() {
        let mut wal = WalBuilder::small();
        let boundary = wal.start().advance(PAGE_BYTES);
        assert_eq!(wal.noise_up_to(boundary).end(), boundary);
        let next = wal.noise(8);
        assert_eq!(next.start(), boundary.advance(24));
        assert_eq!(wal.safe_ends(), [wal.start(), boundary, next.end()]);
    }

    #[test]
    fn a_switch_fills_the_segment_with_zeros() {
        let mut wal = WalBuilder::small();
        let switch = wal.switch();
        assert_eq!(wal.end().bytes_since(wal.start()), 1 << 20);
        assert!(wal.slice(switch.end(), wal.end()).iter().all(|byte| *byte == 0));
        assert_eq!(wal.safe_ends().len(), 2 + 128);
        assert_eq!(wal.segments().len(), 1);
    }
}
