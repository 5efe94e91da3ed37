//! Segments: the files into which the log is divided, and their names.
//!
//! Owns the arithmetic between positions, segment numbers and file names. Knows nothing of directories.

use std::{fmt, str::FromStr};

use crate::wal::{Lsn, TimelineId};

/// `wal_segment_size`: a power of two from 1 MiB to 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SegmentSize(u32);

/// The value is not a segment size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid WAL segment size: {0} bytes (must be a power of two between 1 MB and 1 GB)")]
pub struct InvalidSegmentSize(pub u64);

impl SegmentSize {
    /// The size most clusters have: 16 MiB.
    pub const DEFAULT: Self = Self(16 << 20);

    /// Checks that `bytes` is a power of two from 1 MiB to 1 GiB.
    pub fn new(bytes: u64) -> Result<Self, InvalidSegmentSize> {
        let good = bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes);
        u32::try_from(bytes).ok().filter(|_| good).map(Self).ok_or(InvalidSegmentSize(bytes))
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0 as u64
    }

    /// Offset of `position` in the segment that holds it.
    pub const fn offset_of(self, position: Lsn) -> u64 {
        position.get() % self.bytes()
    }

    /// Segments that share one "log id", the first 32 bits of a position.
    const fn segments_per_log_id(self) -> u64 {
        (1 << 32) / self.bytes()
    }
}

impl fmt::Display for SegmentSize {
    /// As `SHOW wal_segment_size` prints it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            gib if gib == 1 << 30 => f.write_str("1GB"),
            bytes => write!(f, "{}MB", bytes >> 20),
        }
    }
}

/// Number of a segment (`XLogSegNo`): its start divided by the segment size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentNo(pub u64);

impl SegmentNo {
    /// The segment that holds the byte at `position`: use it for a start.
    pub fn holding(position: Lsn, size: SegmentSize) -> Self {
        Self(position.get() / size.bytes())
    }

    /// The segment that holds the byte before `position`: use it for an end.
    pub fn ending_at(position: Lsn, size: SegmentSize) -> Self {
        Self((position.get() - 1) / size.bytes())
    }

    /// First position in the segment; `None` for segment 0, which no log uses.
    pub fn start(self, size: SegmentSize) -> Option<Lsn> {
        self.0.checked_mul(size.bytes()).and_then(Lsn::new)
    }

    /// First position after the segment; after the last one of all, the last position.
    pub fn end(self, size: SegmentSize) -> Lsn {
        Lsn::MIN.advance(self.next().0.saturating_mul(size.bytes()).saturating_sub(1))
    }

    /// The segment after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The segment before this one; `None` before segment 0.
    #[must_use]
    pub fn previous(self) -> Option<Self> {
        self.0.checked_sub(1).map(Self)
    }
}

/// Identity of a segment file: timeline and number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The timeline in the file's name.
    pub timeline: TimelineId,
    /// The segment's number.
    pub number: SegmentNo,
}

impl SegmentName {
    /// The file name: 24 upper-case hexadecimal digits.
    pub fn file_name(self, size: SegmentSize) -> String {
        let per = size.segments_per_log_id();
        format!("{:08X}{:08X}{:08X}", self.timeline.get(), self.number.0 / per, self.number.0 % per)
    }

    /// The file name while the segment is being written, as `pg_receivewal` names it.
    pub fn partial_file_name(self, size: SegmentSize) -> String {
        self.file_name(size) + PARTIAL_SUFFIX
    }

    /// Reads a segment file's name, with or without `.partial`; `None` when it is not one for this size.
    pub fn parse(file_name: &str, size: SegmentSize) -> Option<(Self, SegmentFile)> {
        let (digits, file) = match file_name.strip_suffix(PARTIAL_SUFFIX) {
            Some(digits) => (digits, SegmentFile::Partial),
            None => (file_name, SegmentFile::Complete),
        };
        let is_upper_hex = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
        if digits.len() != 24 || !digits.bytes().all(is_upper_hex) {
            return None;
        }
        let field = |range| digits.get(range).and_then(|text| u32::from_str_radix(text, 16).ok());
        let (log_id, within) = (u64::from(field(8..16)?), u64::from(field(16..24)?));
        let per = size.segments_per_log_id();
        let number = (within < per).then(|| SegmentNo(log_id * per + within))?;
        Some((Self { timeline: TimelineId::new(field(0..8)?)?, number }, file))
    }
}

/// Whether a segment's file has its final name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentFile {
    /// Still being written: the name ends in `.partial`.
    Partial,
    /// Complete and synced under its final name.
    Complete,
}

/// Suffix of a segment that is not complete.
pub const PARTIAL_SUFFIX: &str = ".partial";

impl FromStr for SegmentSize {
    type Err = InvalidSegmentSize;

    /// Reads what `SHOW wal_segment_size` prints: `16MB`, `1GB`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = [("GB", 30), ("MB", 20), ("kB", 10)].iter().find_map(|(unit, shift)| {
            let count: u64 = text.strip_suffix(unit)?.parse().ok()?;
            count.checked_mul(1 << shift)
        });
        Self::new(parsed.unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_convert_both_ways_for_every_size() {
        for shift in 20..=30 {
            let size = SegmentSize::new(1 << shift).unwrap();
            for number in [1, 255, 256, 4095, 4096, 1 << 20] {
                let name =
                    SegmentName { timeline: TimelineId::new(0x1F).unwrap(), number: SegmentNo(number) };
                let text = name.file_name(size);
                assert_eq!(text.len(), 24);
                assert_eq!(SegmentName::parse(&text, size), Some((name, SegmentFile::Complete)));
                let partial = name.partial_file_name(size);
                assert_eq!(SegmentName::parse(&partial, size), Some((name, SegmentFile::Partial)));
            }
        }
    }

    #[test]
    fn the_two_meanings_of_a_boundary_differ() {
        let size = SegmentSize::DEFAULT;
        let boundary = Lsn::new(2 * size.bytes()).unwrap();
        assert_eq!(SegmentNo::holding(boundary, size), SegmentNo(2));
        assert_eq!(SegmentNo::ending_at(boundary, size), SegmentNo(1));
        assert_eq!(SegmentNo(1).end(size), boundary);
        assert_eq!(SegmentNo(2).start(size), Some(boundary));
    }

    #[test]
    fn arithmetic_at_the_end_of_the_address_space_does_not_overflow() {
        let end = Lsn::new(u64::MAX).unwrap();
        for size in [SegmentSize::new(1 << 20).unwrap(), SegmentSize::new(1 << 30).unwrap()] {
            let last = SegmentNo::holding(end, size);
            assert_eq!(last.end(size), end);
            assert_eq!(last.start(size), Lsn::new(u64::MAX - size.bytes() + 1));
            assert_eq!((last.next().start(size), last.next().end(size)), (None, end));
            assert_eq!(SegmentNo(u64::MAX).next(), SegmentNo(u64::MAX));
        }
    }

    #[test]
    fn other_files_are_not_segments() {
        let size = SegmentSize::DEFAULT;
        for name in [
            "00000002.history",
            "0000000100000000000000",
            "000000010000000000000100",
            "00000000000000000000000A",
        ] {
            assert_eq!(SegmentName::parse(name, size), None, "{name}");
        }
        assert_eq!(SegmentName::parse("00000001000000000000000a", size), None);
    }

    #[test]
    fn sizes_print_and_parse_as_the_server_shows_them() {
        for text in ["1MB", "16MB", "64MB", "512MB", "1GB"] {
            assert_eq!(text.parse::<SegmentSize>().unwrap().to_string(), text);
        }
        for text in ["0MB", "3MB", "2GB", "16", "16 MB", "-1MB", "18446744073709551615GB"] {
            assert!(text.parse::<SegmentSize>().is_err(), "{text}");
        }
    }
}
