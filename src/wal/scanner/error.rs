//! Why WAL could not be verified any further.
//!
//! Owns the errors of a scan, in the words of PostgreSQL's own reader (`xlogreader.c`), so that both can be looked for
//! by one text. Decides nothing: whether an error means corruption or just the end of the WAL is known to the caller.

use std::fmt;

use crate::wal::{
    Lsn, SegmentName, SegmentNo, SegmentSize, SystemId, TimelineId, record::RECORD_HEADER_BYTES,
};

/// The bytes are not valid WAL at the position named.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    /// Zero where the length of a record should be: ordinarily the end of what was written.
    #[error("invalid record length at {at}: expected at least {RECORD_HEADER_BYTES}, got 0")]
    EndOfWal {
        /// Where the record would start.
        at: Lsn,
    },
    /// The page does not begin with the format's magic number, or with that of any format.
    #[error("invalid magic number {magic:04X} in WAL segment {page}")]
    InvalidMagic {
        /// What it begins with.
        magic: u16,
        /// The page.
        page: PageLocation,
    },
    /// The page's flags are not all known, or are not for a page at this place.
    #[error("invalid info bits {info:04X} in WAL segment {page}")]
    InvalidInfoBits {
        /// The flags.
        info: u16,
        /// The page.
        page: PageLocation,
    },
    /// The page says it belongs elsewhere, as pages of a recycled segment do.
    #[error("unexpected pageaddr {:X}/{:X} in WAL segment {page}", page_address >> 32, page_address & 0xFFFF_FFFF)]
    UnexpectedPageAddress {
        /// Where it says it belongs.
        page_address: u64,
        /// Where it is.
        page: PageLocation,
    },
    /// The page's timeline is below that of the pages before.
    #[error("out-of-sequence timeline ID {timeline} (after {after}) in WAL segment {page}")]
    OutOfSequenceTimeline {
        /// The page's timeline.
        timeline: u32,
        /// The timeline of the page before; 0 if that is not known.
        after: u32,
        /// The page.
        page: PageLocation,
    },
    /// The page's timeline is above the one whose WAL this is.
    #[error("unexpected timeline ID {timeline} (above {above}) in WAL segment {page}")]
    TimelineTooHigh {
        /// The page's timeline.
        timeline: u32,
        /// The timeline whose WAL this is.
        above: TimelineId,
        /// The page.
        page: PageLocation,
    },
    /// The segment was written by another cluster.
    #[error(
        "WAL file is from different database system: WAL file database system identifier is {got}, expected {expected}"
    )]
    WrongSystem {
        /// The cluster whose WAL this should be.
        expected: SystemId,
        /// The cluster that wrote it.
        got: SystemId,
        /// The page.
        page: PageLocation,
    },
    /// The segment was written for another segment size.
    #[error("WAL file is from different database system: incorrect segment size in page header")]
    WrongSegmentSize {
        /// The size in the page header, in bytes.
        got: u32,
        /// The page.
        page: PageLocation,
    },
    /// The segment was written by a server built with another page size.
    #[error("WAL file is from different database system: incorrect XLOG_BLCKSZ in page header")]
    WrongPageSize {
        /// The size in the page header, in bytes.
        got: u32,
        /// The page.
        page: PageLocation,
    },
    /// The record is shorter than a header.
    #[error("invalid record length at {at}: expected at least {RECORD_HEADER_BYTES}, got {got}")]
    RecordTooShort {
        /// Where the record starts.
        at: Lsn,
        /// Its length.
        got: u32,
    },
    /// The record is longer than a server writes.
    #[error("invalid record length at {at}: expected at most {limit}, got {got}")]
    RecordTooLong {
        /// Where the record starts.
        at: Lsn,
        /// Its length.
        got: u32,
        /// The longest possible.
        limit: u32,
    },
    /// No such resource manager exists.
    #[error("invalid resource manager ID {got} at {at}")]
    InvalidResourceManager {
        /// Where the record starts.
        at: Lsn,
        /// The resource manager it names.
        got: u8,
    },
    /// The record does not name the one before it as such.
    #[error("record with incorrect prev-link {} at {at}", ZeroableLsn(*got))]
    WrongPreviousRecord {
        /// Where the record starts.
        at: Lsn,
        /// The record it says is before it.
        got: Option<Lsn>,
        /// The record that is, if known.
        expected: Option<Lsn>,
    },
    /// The record's bytes are not those that were written.
    #[error("incorrect resource manager data checksum in record at {at}")]
    WrongChecksum {
        /// Where the record starts.
        at: Lsn,
    },
    /// The record does not fit its page, and the next page does not continue it.
    #[error("there is no contrecord flag at {at}")]
    NoContinuation {
        /// Where the record starts.
        at: Lsn,
        /// The page that should continue it.
        page: Lsn,
    },
    /// The next page continues a record of another length.
    #[error("invalid contrecord length {got} (expected {expected}) at {at}")]
    WrongContinuationLength {
        /// Where the record starts; if that is not known, the page.
        at: Lsn,
        /// Bytes that remain according to the page.
        got: u32,
        /// Bytes that do remain; 0 if that is not known.
        expected: u32,
    },
    /// The page continues a record, but none is incomplete.
    #[error("contrecord is requested by {at}")]
    UnexpectedContinuation {
        /// The page.
        at: Lsn,
    },
    /// A record says it stands for one that was never completed, but another was, or none; or a page says its first
    /// record does, and it does not.
    #[error("mismatching overwritten LSN {} -> {}", ZeroableLsn(*got), ZeroableLsn(*expected))]
    WrongOverwrittenRecord {
        /// Where the record starts.
        at: Lsn,
        /// The record it says was never completed; `None` if it says nothing.
        got: Option<Lsn>,
        /// The record that was not.
        expected: Option<Lsn>,
    },
    /// Something other than zero where a server leaves zeros: after a record up to the next multiple of 8, or at the end of
    /// a page header. PostgreSQL's own reader does not look there.
    #[error("unexpected data in the padding at {at}")]
    DataInPadding {
        /// The first byte of the padding.
        at: Lsn,
    },
    /// Something other than zero between an XLOG_SWITCH record and the end of its segment.
    #[error("unexpected data after XLOG_SWITCH at {at}")]
    DataAfterSwitch {
        /// The first byte that is not zero.
        at: Lsn,
    },
}

impl ScanError {
    /// Where the error is: the start of the record, or the page.
    pub fn at(&self) -> Lsn {
        match self {
            Self::EndOfWal { at }
            | Self::RecordTooShort { at, .. }
            | Self::RecordTooLong { at, .. }
            | Self::InvalidResourceManager { at, .. }
            | Self::WrongPreviousRecord { at, .. }
            | Self::WrongChecksum { at }
            | Self::NoContinuation { at, .. }
            | Self::WrongContinuationLength { at, .. }
            | Self::UnexpectedContinuation { at }
            | Self::WrongOverwrittenRecord { at, .. }
            | Self::DataInPadding { at }
            | Self::DataAfterSwitch { at } => *at,
            Self::InvalidMagic { page, .. }
            | Self::InvalidInfoBits { page, .. }
            | Self::UnexpectedPageAddress { page, .. }
            | Self::OutOfSequenceTimeline { page, .. }
            | Self::TimelineTooHigh { page, .. }
            | Self::WrongSystem { page, .. }
            | Self::WrongSegmentSize { page, .. }
            | Self::WrongPageSize { page, .. } => page.position,
        }
    }

    /// Whether the WAL simply goes no further: zeros where a record or a page would begin. (A record of which only the
    /// first page was written ends the WAL in this way too.)
    pub fn is_end_of_wal(&self) -> bool {
        matches!(self, Self::EndOfWal { .. } | Self::InvalidMagic { magic: 0, .. })
    }
}

/// A page in its segment, as PostgreSQL's messages name it: `00000001000000000000000A, LSN 0/A002000, offset 8192`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLocation {
    /// The timeline whose WAL is read.
    pub timeline: TimelineId,
    /// Where the page starts.
    pub position: Lsn,
    /// The size of its segment.
    pub segment_size: SegmentSize,
}

impl fmt::Display for PageLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = SegmentNo::holding(self.position, self.segment_size);
        let segment = SegmentName { timeline: self.timeline, number }.file_name(self.segment_size);
        let offset = self.segment_size.offset_of(self.position);
        write!(f, "{segment}, LSN {}, offset {offset}", self.position)
    }
}

/// Prints an unknown position as `0/0`.
struct ZeroableLsn(Option<Lsn>);

impl fmt::Display for ZeroableLsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(position) => position.fmt(f),
            None => f.write_str("0/0"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_postgresqls() {
        let at = Lsn::new(0x1_0A00_2000).unwrap();
        let page =
            PageLocation { timeline: TimelineId::FIRST, position: at, segment_size: SegmentSize::DEFAULT };
        let texts = [
            (
                ScanError::InvalidMagic { magic: 0, page },
                "invalid magic number 0000 in WAL segment 00000001000000010000000A, LSN 1/A002000, offset 8192",
            ),
            (
                ScanError::UnexpectedPageAddress { page_address: 0x2_0000, page },
                "unexpected pageaddr 0/20000 in WAL segment 00000001000000010000000A, LSN 1/A002000, offset 8192",
            ),
            (ScanError::EndOfWal { at }, "invalid record length at 1/A002000: expected at least 24, got 0"),
            (
                ScanError::WrongPreviousRecord { at, got: None, expected: None },
                "record with incorrect prev-link 0/0 at 1/A002000",
            ),
            (
                ScanError::WrongChecksum { at },
                "incorrect resource manager data checksum in record at 1/A002000",
            ),
        ];
        for (error, text) in texts {
            assert_eq!(error.to_string(), text);
            assert_eq!(error.at(), at);
        }
    }
}
