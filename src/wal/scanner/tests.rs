//! Tests of single rules; the properties over all WAL are in `tests/scan_properties.rs`.

use crate::wal::{
    Lsn, PAGE_BYTES, TimelineId,
    builder::WalBuilder,
    record::Record,
    scanner::{RecordVisitor, ResumePoint, ScanError, Scanner},
};

#[derive(Default)]
struct Starts(Vec<Lsn>);

impl RecordVisitor for Starts {
    fn record(&mut self, record: &Record<'_>) {
        self.0.push(record.start);
    }
}

fn scan(wal: &WalBuilder, bytes: &[u8], piece: usize) -> (Scanner, Vec<Lsn>, Result<(), ScanError>) {
    let mut scanner = Scanner::at_segment_start(wal.context(), wal.start());
    let mut starts = Starts::default();
    let result = bytes.chunks(piece).try_for_each(|part| scanner.feed(part, &mut starts));
    (scanner, starts.0, result)
}

fn assert_scans_whole(wal: &WalBuilder) {
    for piece in [1, 7, 24, 8192, 100_000, usize::MAX] {
        let (scanner, starts, result) = scan(wal, wal.bytes(), piece);
        assert_eq!(result, Ok(()), "pieces of {piece}");
        assert_eq!(scanner.verified_end(), wal.safe_end_within(wal.bytes().len()), "pieces of {piece}");
        let expected: Vec<_> = wal.records().iter().map(|record| record.start()).collect();
        assert_eq!(starts, expected, "pieces of {piece}");
    }
}

#[test]
fn records_over_pages_and_segments_are_verified() {
    let mut wal = WalBuilder::small();
    for length in [0, 1, 50, 8000, 8192, 20_000, 100_000, 1_200_000, 3] {
        wal.noise(length);
    }
    assert_scans_whole(&wal);
}

#[test]
fn a_record_begun_before_the_first_segment_is_skipped() {
    for length in [1, 8, 9, 8151, 8152, 8153, 30_000] {
        let mut wal = WalBuilder::small().continuing(&vec![0xAA; length]);
        wal.noise(10);
        wal.noise(10_000);
        assert_scans_whole(&wal);
    }
}

#[test]
fn the_segment_is_zero_after_a_switch() {
    let mut wal = WalBuilder::small();
    wal.noise(100);
    wal.switch();
    wal.noise(9000);
    assert_scans_whole(&wal);
    let mut bytes = wal.bytes().to_vec();
    bytes[50_000] = 1;
    let (scanner, _, result) = scan(&wal, &bytes, 4096);
    assert_eq!(result, Err(ScanError::DataAfterSwitch { at: wal.start().advance(50_000) }));
    assert_eq!(scanner.verified_end(), wal.start().advance(6 * PAGE_BYTES));
}

#[test]
fn an_overwritten_record_is_discarded() {
    for pages in 0..3 {
        let mut wal = WalBuilder::small();
        wal.noise(100);
        wal.overwritten(pages);
        wal.noise(100);
        assert_scans_whole(&wal);
    }
}

#[test]
fn a_timeline_may_rise_but_not_above_the_streams() {
    let mut wal = WalBuilder::small();
    wal.noise(10_000);
    wal.switch_timeline(TimelineId::new(3).unwrap());
    wal.noise(10_000);
    assert_scans_whole(&wal);
    let mut context = wal.context();
    context.timeline = TimelineId::new(2).unwrap();
    let result = Scanner::at_segment_start(context, wal.start()).feed(wal.bytes(), &mut ());
    assert!(matches!(result, Err(ScanError::TimelineTooHigh { timeline: 3, .. })), "{result:?}");
}

#[test]
fn a_scan_resumes_at_each_verified_end() {
    let mut wal = WalBuilder::small();
    wal.noise_up_to(wal.start().advance(PAGE_BYTES));
    wal.noise(9000);
    wal.switch();
    wal.noise(5);
    let (_, all, _) = scan(&wal, wal.bytes(), usize::MAX);
    for end in wal.safe_ends() {
        let mut scanner = Scanner::at_segment_start(wal.context(), wal.start());
        let mut starts = Starts::default();
        scanner.feed(wal.slice(wal.start(), end), &mut starts).unwrap();
        assert_eq!(scanner.verified_end(), end);
        let mut scanner = Scanner::resume(wal.context(), scanner.resume_point());
        scanner.feed(wal.slice(end, wal.end()), &mut starts).unwrap();
        assert_eq!(starts.0, all);
        assert_eq!(scanner.verified_end(), wal.end());
    }
}

#[test]
fn zeros_after_the_last_record_are_the_end_of_wal() {
    let mut wal = WalBuilder::small();
    wal.noise(100);
    let mut bytes = wal.bytes().to_vec();
    bytes.resize(20_000, 0);
    let (scanner, _, result) = scan(&wal, &bytes, 100);
    let error = result.unwrap_err();
    assert_eq!(error, ScanError::EndOfWal { at: wal.end() });
    assert!(error.is_end_of_wal());
    assert_eq!(scanner.verified_end(), wal.end());
}

#[test]
fn an_error_stays() {
    let wal = WalBuilder::small();
    let mut scanner = Scanner::resume(wal.context(), ResumePoint::unknown(wal.start()));
    let error = scanner.feed(&[0; 100], &mut ()).unwrap_err();
    assert_eq!(scanner.feed(&[], &mut ()), Err(error.clone()));
    assert_eq!(scanner.feed(&[1], &mut ()), Err(error));
    assert_eq!(scanner.verified_end(), wal.start());
}

#[test]
fn zeros_follow_a_switch_that_began_before_the_first_segment() {
    for before_boundary in [8, 16] {
        let mut wal = WalBuilder::small();
        let boundary = wal.start().advance(1 << 20);
        wal.noise_up_to(Lsn::new(boundary.get() - before_boundary).unwrap());
        let switch = wal.switch();
        assert!(switch.start() < boundary && switch.end() > boundary);
        wal.noise(100);
        assert_scans_whole(&wal);
        for piece in [1, 13, usize::MAX] {
            let mut scanner = Scanner::at_segment_start(wal.context(), boundary);
            let mut starts = Starts::default();
            for part in wal.slice(boundary, wal.end()).chunks(piece) {
                scanner.feed(part, &mut starts).unwrap();
            }
            assert_eq!(scanner.verified_end(), wal.end());
            assert_eq!(starts.0, [boundary.advance((1 << 20) + 40)]);
        }
    }
}

#[test]
fn zeros_after_a_head_that_was_no_switch_are_the_end_of_wal() {
    for head in [&[0x50, 0, 0, 0, 1, 2, 3, 4][..], &[0x40, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0][..]] {
        let wal = WalBuilder::small().continuing(head);
        let mut bytes = wal.bytes().to_vec();
        bytes.resize(20_000, 0);
        let (scanner, _, result) = scan(&wal, &bytes, 5);
        assert_eq!(result, Err(ScanError::EndOfWal { at: wal.end() }));
        assert_eq!(scanner.verified_end(), wal.start());
    }
}
