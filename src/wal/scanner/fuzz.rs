//! The body of a fuzz target.

use crate::wal::{
    Lsn, PAGE_BYTES, Record, RecordVisitor, SegmentSize, TimelineId,
    insight::WalInsight,
    page::{LONG_HEADER_BYTES, SHORT_HEADER_BYTES},
    scanner::{ScanContext, Scanner},
};

/// Scans arbitrary bytes, whole and in pieces whose size the first byte picks: both must end alike, at a place where a
/// stream may be cut. Also run by `tests/scan_properties.rs`.
pub fn fuzz_scan(bytes: &[u8]) {
    let Some((split, bytes)) = bytes.split_first() else { return };
    let segment_size = SegmentSize::DEFAULT;
    let context = ScanContext {
        segment_size,
        system_id: None,
        timeline: TimelineId::new(3).unwrap_or(TimelineId::FIRST),
        format: None,
    };
    let start = Lsn::MIN.advance(segment_size.bytes() - 1);
    let mut whole = Scanner::at_segment_start(context, start);
    let mut seen = Seen::default();
    let result = whole.feed(bytes, &mut seen);
    assert!(seen.ends.is_sorted());
    assert!(whole.verified_end() <= whole.position());
    assert_may_be_cut(whole.verified_end(), segment_size);

    let mut pieces = Scanner::at_segment_start(context, start);
    let mut seen_in_pieces = Seen::default();
    let mut pieces_result = Ok(());
    for piece in bytes.chunks(usize::from(*split) + 1) {
        pieces_result = pieces_result.and_then(|()| pieces.feed(piece, &mut seen_in_pieces));
    }
    assert_eq!(pieces_result, result);
    assert_eq!(pieces.resume_point(), whole.resume_point());
    assert_eq!(seen_in_pieces.ends, seen.ends);
}

fn assert_may_be_cut(position: Lsn, segment_size: SegmentSize) {
    let is_first_page = segment_size.offset_of(position) < PAGE_BYTES;
    let header = if is_first_page { LONG_HEADER_BYTES } else { SHORT_HEADER_BYTES };
    let in_page = position.page_offset();
    assert!(in_page == 0 || in_page > header as u64, "{position} is in a page header or at its end");
}

#[derive(Default)]
struct Seen {
    ends: Vec<Lsn>,
    insight: WalInsight,
}

impl RecordVisitor for Seen {
    fn record(&mut self, record: &Record<'_>) {
        self.ends.push(record.end);
        self.insight.record(record);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::builder::WalBuilder;

    #[test]
    fn valid_wal_and_its_damaged_forms_pass() {
        let mut wal = WalBuilder::new(
            crate::wal::WalFormat::V17,
            crate::wal::SystemId(1),
            SegmentSize::DEFAULT,
            TimelineId::FIRST,
            Lsn::new(16 << 20).unwrap(),
        );
        wal.noise(9000);
        wal.full_page_image(&[1; 300]);
        wal.overwritten(1);
        for split in [0, 10, 255] {
            let mut bytes = vec![split];
            bytes.extend(wal.bytes());
            fuzz_scan(&bytes);
            for at in (1..bytes.len()).step_by(97) {
                bytes[at] ^= 0x10;
                fuzz_scan(&bytes);
                bytes[at] ^= 0x10;
            }
        }
    }
}
