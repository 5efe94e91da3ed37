//! Page headers within a scan, and the record that began before it.
//!
//! Owns the rules of what page may follow (`XLogReaderValidatePageHeader`, and the treatment of continuations in
//! `XLogDecodeNextRecord`).

use crate::wal::{
    Lsn, PAGE_BYTES, SystemId, TimelineId,
    format::{PAGE_FIRST_IS_CONTRECORD, PAGE_LONG_HEADER, WalFormat},
    page::{LONG_HEADER_BYTES, LongPageHeader, PageHeader, SHORT_HEADER_BYTES},
    record::{RMGR_INFO_MASK, XLOG_RESOURCE_MANAGER, XLOG_SWITCH},
    scanner::{Limits, Overwritten, PageLocation, ScanContext, ScanError, Scanner, Within},
};

/// Holds a page header until it is complete.
#[derive(Clone, Copy, Debug)]
pub(super) struct PageHeaderBuffer {
    bytes: [u8; LONG_HEADER_BYTES],
}

impl PageHeaderBuffer {
    pub(super) const EMPTY: Self = Self { bytes: [0; LONG_HEADER_BYTES] };

    /// Whether the header's padding, its last 4 bytes, is zero.
    fn has_zero_padding(&self) -> bool {
        self.bytes.get(SHORT_HEADER_BYTES - 4..SHORT_HEADER_BYTES) == Some(&[0; 4])
    }

    /// The header, and what follows it on a segment's first page.
    fn decode(&self) -> (PageHeader, LongPageHeader) {
        let (short, long) = self.bytes.split_at(SHORT_HEADER_BYTES);
        let short = short.first_chunk().unwrap_or(&[0; SHORT_HEADER_BYTES]);
        let long = long.first_chunk().unwrap_or(&[0; LONG_HEADER_BYTES - SHORT_HEADER_BYTES]);
        (PageHeader::decode(short), LongPageHeader::decode(long))
    }
}

/// The last bytes of a record that began before the first page, and where it ended.
///
/// If that record was XLOG_SWITCH nothing but zeros follow, which otherwise are the end of the WAL. Its header lies on
/// both pages then; what tells it is in the last 8 bytes, which are on the second.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct HeadEnd {
    /// Bytes of the record on the first page.
    head_bytes: u32,
    bytes: [u8; 8],
    pub(super) after: Option<Lsn>,
}

impl HeadEnd {
    /// Takes bytes of the head, of which `remaining` are left with these.
    fn keep(&mut self, remaining: u32, bytes: &[u8]) {
        let remaining = remaining as usize;
        let skipped = remaining.saturating_sub(self.bytes.len());
        let already = self.bytes.len().saturating_sub(remaining);
        let to = self.bytes.iter_mut().skip(already);
        to.zip(bytes.iter().skip(skipped)).for_each(|(to, from)| *to = *from);
    }

    /// Whether the head ended at `position` and may have been XLOG_SWITCH.
    pub(super) fn may_be_switch(&self, position: Lsn) -> bool {
        let [info, resource_manager, padding @ .., _, _, _, _] = self.bytes;
        let is_short = matches!(self.head_bytes, 8 | 16);
        self.after == Some(position)
            && is_short
            && resource_manager == XLOG_RESOURCE_MANAGER
            && info & RMGR_INFO_MASK == XLOG_SWITCH
            && padding == [0, 0]
    }
}

impl Scanner {
    /// Whether the next byte belongs to a page header.
    #[inline]
    pub(super) fn is_in_page_header(&self) -> bool {
        let offset = self.position.page_offset();
        offset < SHORT_HEADER_BYTES as u64
            || (offset < LONG_HEADER_BYTES as u64
                && self.context.segment_size.offset_of(self.position) < LONG_HEADER_BYTES as u64)
    }

    /// Takes more of a page header, and acts on it once it is complete.
    pub(super) fn page_header(&mut self, bytes: &[u8]) -> Result<usize, ScanError> {
        let in_segment = self.context.segment_size.offset_of(self.position);
        let filled = usize::try_from(self.position.page_offset()).unwrap_or(0);
        let length = if in_segment < PAGE_BYTES { LONG_HEADER_BYTES } else { SHORT_HEADER_BYTES };
        let wanted = self.page_header.bytes.get_mut(filled..length).unwrap_or_default();
        let taken = wanted.len().min(bytes.len());
        wanted.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        self.position = self.position.advance(taken as u64);
        if filled + taken == length {
            // The log's first page, whose position would be zero, is never used.
            let page = self.position.page_start().unwrap_or(Lsn::MIN);
            let (header, long) = self.page_header.decode();
            let format = self.check_page(page, header, (length == LONG_HEADER_BYTES).then_some(long))?;
            if !self.page_header.has_zero_padding() {
                return Err(ScanError::DataInPadding { at: page.advance(SHORT_HEADER_BYTES as u64 - 4) });
            }
            if header.info & PAGE_FIRST_IS_CONTRECORD == 0 && header.remaining != 0 {
                let got = header.remaining;
                return Err(ScanError::WrongContinuationLength { at: page, got, expected: 0 });
            }
            self.begin_page(page, header, format)?;
        }
        Ok(taken)
    }

    /// Whether a page with this header may stand here, whatever record it continues.
    fn check_page(
        &mut self,
        position: Lsn,
        header: PageHeader,
        long: Option<LongPageHeader>,
    ) -> Result<WalFormat, ScanError> {
        let ScanContext { segment_size, timeline: stream_timeline, .. } = self.context;
        let page = PageLocation { timeline: stream_timeline, position, segment_size };
        let PageHeader { magic, info, timeline, page_address, .. } = header;
        let format = WalFormat::from_magic(magic)
            .filter(|format| self.context.format.is_none_or(|expected| expected == *format))
            .ok_or(ScanError::InvalidMagic { magic, page })?;
        let is_long = info & PAGE_LONG_HEADER != 0;
        if info & !format.page_flags() != 0 || is_long != long.is_some() {
            return Err(ScanError::InvalidInfoBits { info, page });
        }
        let system_id = long.map(|long| self.check_long_header(long, page)).transpose()?;
        if page_address != position.get() {
            return Err(ScanError::UnexpectedPageAddress { page_address, page });
        }
        let after = self.page_timeline;
        let timeline =
            TimelineId::new(timeline).filter(|timeline| after.is_none_or(|after| *timeline >= after));
        let Some(timeline) = timeline else {
            let after = after.map_or(0, TimelineId::get);
            return Err(ScanError::OutOfSequenceTimeline { timeline: header.timeline, after, page });
        };
        if timeline > stream_timeline {
            return Err(ScanError::TimelineTooHigh {
                timeline: header.timeline,
                above: stream_timeline,
                page,
            });
        }
        self.page_timeline = Some(timeline);
        self.context.system_id = system_id.or(self.context.system_id);
        if self.context.format.is_none() {
            self.context.format = Some(format);
            self.limits = Limits::of(Some(format));
        }
        Ok(format)
    }

    fn check_long_header(&self, long: LongPageHeader, page: PageLocation) -> Result<SystemId, ScanError> {
        let got = SystemId(long.system_id);
        match self.context.system_id {
            Some(expected) if expected != got => Err(ScanError::WrongSystem { expected, got, page }),
            Some(_) | None if u64::from(long.segment_bytes) != page.segment_size.bytes() => {
                Err(ScanError::WrongSegmentSize { got: long.segment_bytes, page })
            }
            Some(_) | None if u64::from(long.page_bytes) != PAGE_BYTES => {
                Err(ScanError::WrongPageSize { got: long.page_bytes, page })
            }
            Some(_) | None => Ok(got),
        }
    }

    /// Decides what the page's first data are.
    fn begin_page(&mut self, page: Lsn, header: PageHeader, format: WalFormat) -> Result<(), ScanError> {
        let continues = header.info & PAGE_FIRST_IS_CONTRECORD != 0;
        let overwrites = header.info & format.overwrite_contrecord_flag() != 0;
        if continues && overwrites {
            return Err(ScanError::UnexpectedContinuation { at: page });
        }
        // Only on the first page of a scan may a record continue of which nothing is known.
        let is_unknown = self.verified.position == page && self.verified.previous_record.is_none();
        match self.within {
            Within::Boundary if overwrites && is_unknown => {
                self.overwritten = Some(Overwritten::BeforeScan);
                Ok(())
            }
            Within::Boundary if overwrites => {
                Err(ScanError::WrongOverwrittenRecord { at: page, got: None, expected: None })
            }
            Within::Boundary if continues && is_unknown => {
                let got = header.remaining;
                if !(1..=self.limits.record_bytes_max).contains(&got) {
                    return Err(ScanError::WrongContinuationLength { at: page, got, expected: 0 });
                }
                self.within = Within::Head { remaining: got };
                self.head_end.head_bytes = got;
                Ok(())
            }
            Within::Boundary if continues => Err(ScanError::UnexpectedContinuation { at: page }),
            Within::Boundary | Within::ZeroTail => Ok(()),
            Within::Head { .. } if overwrites => {
                self.within = Within::Boundary;
                self.overwritten = Some(Overwritten::BeforeScan);
                Ok(())
            }
            // XLOG_OVERWRITE_CONTRECORD itself never leaves its page, so it cannot be lost in part.
            Within::Record if overwrites && self.overwritten.is_some() => {
                let at = self.partial.start();
                Err(ScanError::WrongOverwrittenRecord { at, got: None, expected: None })
            }
            Within::Record if overwrites => {
                self.within = Within::Boundary;
                self.overwritten = Some(Overwritten::Record(self.partial.start()));
                Ok(())
            }
            Within::Head { remaining } => continuation(page, page, header, remaining),
            Within::Record => continuation(self.partial.start(), page, header, self.partial.remaining()),
        }
    }

    /// Takes bytes of a record that began before the first page, and the padding after it.
    pub(super) fn skip_head(&mut self, remaining: u32, bytes: &[u8]) -> Result<usize, ScanError> {
        let of_record = bytes.len().min(remaining as usize);
        self.head_end.keep(remaining, bytes.get(..of_record).unwrap_or_default());
        let remaining = remaining - u32::try_from(of_record).unwrap_or(remaining);
        self.position = self.position.advance(of_record as u64);
        self.within = Within::Head { remaining };
        if remaining > 0 {
            return Ok(of_record);
        }
        let padding = self.skip_padding(bytes.get(of_record..).unwrap_or_default())?;
        if self.position == self.position.max_align() {
            self.within = Within::Boundary;
            self.head_end.after = Some(self.position);
        }
        Ok(of_record + padding)
    }
}

/// Checks that a page continues a record, of which so many bytes remain.
fn continuation(at: Lsn, page: Lsn, header: PageHeader, remaining: u32) -> Result<(), ScanError> {
    if header.info & PAGE_FIRST_IS_CONTRECORD == 0 {
        return Err(ScanError::NoContinuation { at, page });
    }
    if header.remaining != remaining {
        return Err(ScanError::WrongContinuationLength { at, got: header.remaining, expected: remaining });
    }
    Ok(())
}
