//! Where a message of WAL may end.
//!
//! A standby treats every byte it received as readable, and checks a page header as soon as 24 bytes of the page are
//! there; one that is left with part of a header rejects the page and asks no more until it is restarted. So a message
//! ends at a position that the sender of the WAL itself stopped at (a record's end), or at a page boundary, and nowhere else.

use crate::wal::{Lsn, PAGE_BYTES};

/// Largest WAL payload in one message: 16 pages, as walsender.c sends (`MAX_SEND_SIZE`).
pub const WAL_DATA_BYTES_MAX: u64 = 16 * PAGE_BYTES;

/// End of the next message that begins at `start`, when WAL up to `limit` may be sent; `None` when nothing may be.
///
/// `limit` must be a safe end itself: a record's end, or a page boundary. The result is `limit` when at most `bytes_max`
/// bytes remain, else the last page boundary that many bytes reach. `bytes_max` counts as one page at least, because a
/// message from anywhere in a page must be able to reach the next one.
pub fn message_end(start: Lsn, limit: Lsn, bytes_max: u64) -> Option<Lsn> {
    let available = limit.get().checked_sub(start.get()).filter(|bytes| *bytes > 0)?;
    let bytes_max = bytes_max.max(PAGE_BYTES);
    if available <= bytes_max {
        return Some(limit);
    }
    start.advance(bytes_max).page_start()
}

const _: () = assert!(WAL_DATA_BYTES_MAX.is_multiple_of(PAGE_BYTES));

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wal::SegmentSize;

    fn at(raw: u64) -> Lsn {
        Lsn::new(raw).unwrap()
    }

    #[test]
    fn what_remains_is_sent_whole_when_it_fits() {
        let start = at(0x100_0000);
        assert_eq!(message_end(start, start.advance(5), WAL_DATA_BYTES_MAX), Some(start.advance(5)));
        let full = start.advance(WAL_DATA_BYTES_MAX);
        assert_eq!(message_end(start, full, WAL_DATA_BYTES_MAX), Some(full));
        assert_eq!(message_end(start, start, WAL_DATA_BYTES_MAX), None);
        assert_eq!(message_end(start.advance(1), start, WAL_DATA_BYTES_MAX), None);
    }

    #[test]
    fn a_long_stretch_is_cut_at_a_page_boundary() {
        let start = at(0x100_0007);
        let limit = at(0x200_0000);
        assert_eq!(message_end(start, limit, WAL_DATA_BYTES_MAX), Some(at(0x102_0000)));
        assert_eq!(message_end(start, limit, 1), Some(at(0x100_2000)), "one page at least");
    }

    /// PostgreSQL's rule, written down from `XLogPageRead`, `ReadPageInternal` and `XLogReaderValidatePageHeader`: a
    /// page is looked at once 24 bytes of it are flushed. Then the header must be there whole: 24 bytes, or 40 on a
    /// segment's first page; and with nothing after the short header the reader takes what it finds for WAL. Returns
    /// whether a standby whose flush position rests here is wedged. Stricter than what was seen, in that any part of
    /// a header counts.
    fn wedges_a_standby(flush: Lsn, segment_size: SegmentSize) -> bool {
        let page_offset = flush.get() % 8192;
        let segment_offset = flush.get() % segment_size.bytes();
        let header = if segment_offset < 8192 { 40 } else { 24 };
        let empty_short_header = page_offset == 24;
        (page_offset > 0 && page_offset < header) || empty_short_header
    }

    /// A log as PostgreSQL lays it out: records of the given lengths, 8-byte aligned, with page headers in between.
    /// Returns where the records end (`XLogBytePosToEndRecPtr`: a record that fills its page ends at the boundary).
    fn record_ends(start_of_segment: Lsn, segment_size: SegmentSize, lengths: &[u64]) -> Vec<Lsn> {
        let mut position = start_of_segment.get();
        let mut ends = Vec::new();
        for length in lengths {
            let mut left = length.next_multiple_of(8).max(24);
            while left > 0 {
                if position.is_multiple_of(8192) {
                    position += if position.is_multiple_of(segment_size.bytes()) { 40 } else { 24 };
                }
                let taken = left.min(8192 - position % 8192);
                position += taken;
                left -= taken;
            }
            ends.push(at(position));
        }
        ends
    }

    fn record_lengths() -> impl Strategy<Value = Vec<u64>> {
        let length = prop_oneof![
            8 => 24_u64..400,
            2 => 400_u64..20_000,
            1 => 100_000_u64..3_000_000,
        ];
        prop::collection::vec(length, 1..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]

        /// Whatever the layout, the arrival pattern and the start that a client asks for: messages are contiguous, small
        /// enough, reach the limit, and none ends where a standby would be wedged.
        #[test]
        fn no_message_ends_where_a_standby_is_wedged(
            shift in 20_u32..=24,
            lengths in record_lengths(),
            start_offset in 0_u64..300_000,
            pages_max in 1_u64..=16,
            every in 1_usize..20,
        ) {
            let size = SegmentSize::new(1 << shift).unwrap();
            let origin = at(5 * size.bytes());
            let mut position = origin.advance(start_offset);
            for limit in record_ends(origin, size, &lengths).into_iter().step_by(every) {
                prop_assert!(!wedges_a_standby(limit, size), "the model itself ends records safely");
                while let Some(end) = message_end(position, limit, pages_max * PAGE_BYTES) {
                    prop_assert!(end > position && end <= limit);
                    prop_assert!(end.bytes_since(position) <= pages_max * PAGE_BYTES);
                    prop_assert!(end == limit || end.page_offset() == 0);
                    prop_assert!(!wedges_a_standby(end, size), "{position} .. {end}, limit {limit}");
                    position = end;
                }
                prop_assert!(position >= limit);
            }
        }
    }

    #[test]
    fn the_oracle_knows_the_places_that_were_seen_to_wedge() {
        let size = SegmentSize::DEFAULT;
        let segment = 5 * size.bytes();
        for offset in [24, 32, 36, 39] {
            assert!(wedges_a_standby(at(segment + offset), size), "segment start + {offset}");
        }
        assert!(wedges_a_standby(at(segment + 8192 + 24), size));
        for offset in [0, 40, 8192, 8192 + 25, 8192 + 32] {
            assert!(!wedges_a_standby(at(segment + offset), size), "segment start + {offset}");
        }
    }
}
