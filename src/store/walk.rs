//! How far the WAL in the files is valid.
//!
//! Owns the scan over segment files on start: it begins in the last complete segment in which a record ends (further back
//! when a record spans whole segments, so that the continued record is proved too) and goes on through the segments that
//! were being written. Reads with `pread`; changes nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::store::control::{Control, Layout};
use crate::store::disk::{Disk, OpenMode, read_full_at};
use crate::store::error::StoreError;
use crate::store::partials::READ_BYTES;
use crate::store::unproven::Gaps;
use crate::wal::record::{Record, RecordVisitor};
use crate::wal::scanner::{ScanContext, ScanError, Scanner};
use crate::wal::{Lineage, Lsn, LsnRange, SegmentName, SegmentNo, SegmentSize};

/// Segment files to be walked, in order and without a gap.
pub(super) struct Walk<'a> {
    pub disk: &'a dyn Disk,
    pub layout: &'a Layout,
    pub control: &'a Control,
    pub lineage: &'a Lineage,
    pub size: SegmentSize,
    /// Where what is held begins, if there are no complete segments.
    pub begin: SegmentNo,
    /// The complete segments: first and last number.
    pub complete: Option<(SegmentNo, SegmentNo)>,
    /// Those that were being written; only those that follow the last complete one are looked at.
    pub partials: &'a BTreeMap<SegmentNo, u64>,
}

/// What a walk found.
pub(super) struct Walked {
    /// Its verified end is the end of the WAL.
    pub scanner: Scanner,
    /// Where it began.
    pub start: SegmentNo,
    /// The complete segment that is not valid to its end, and why.
    pub damaged: Option<(SegmentNo, ScanError)>,
    /// What no checksum covers.
    pub gaps: Vec<LsnRange>,
}

/// Sees whether there are records.
#[derive(Default)]
pub(super) struct FirstRecord(pub Option<Lsn>);

impl RecordVisitor for FirstRecord {
    fn record(&mut self, record: &Record<'_>) {
        self.0.get_or_insert(record.start);
    }
}

impl Walk<'_> {
    /// Walks to the end of the valid WAL.
    pub(super) fn run(&self) -> Result<Walked, StoreError> {
        let begin = self.begin;
        let Some((oldest, newest)) = self.complete else {
            let mut scanner = self.scanner_at(begin);
            let mut seen = Gaps::from(scanner.position());
            self.feed_partials(&mut scanner, begin, &mut seen)?;
            let gaps = seen.of(&scanner);
            return Ok(Walked { scanner, start: begin, damaged: None, gaps });
        };
        let mut start = newest;
        loop {
            let mut scanner = self.scanner_at(start);
            let mut seen = Gaps::from(scanner.position());
            for number in (start.0..=newest.0).map(SegmentNo) {
                let path = self.complete_path(number);
                if let Some(error) = self.feed(&mut scanner, &path, &mut seen)? {
                    if matches!(error, ScanError::WrongSystem { .. }) {
                        self.scan_alone(number, &path)?;
                    }
                    let gaps = seen.of(&scanner);
                    return Ok(Walked { scanner, start, damaged: Some((number, error)), gaps });
                }
            }
            match start.previous().filter(|before| *before >= oldest && seen.first.is_none()) {
                Some(before) => start = before,
                None => {
                    self.feed_partials(&mut scanner, newest.next(), &mut seen)?;
                    let gaps = seen.of(&scanner);
                    return Ok(Walked { scanner, start, damaged: None, gaps });
                }
            }
        }
    }

    /// Scans one segment file from its start; `Err` inside if it is not valid.
    pub(super) fn scan_alone(&self, number: SegmentNo, path: &Path) -> Result<Alone, StoreError> {
        let mut scanner = self.scanner_at(number);
        let mut seen = FirstRecord::default();
        let error = self.feed(&mut scanner, path, &mut seen)?;
        if let Some(error @ ScanError::WrongSystem { .. }) = &error {
            // Half a page header may say anything; records that verify do not lie.
            let context = ScanContext { system_id: None, format: None, ..scanner.context() };
            let mut scanner = Scanner::at_segment_start(context, scanner.verified_end());
            let mut others = FirstRecord::default();
            self.feed(&mut scanner, path, &mut others)?;
            if others.0.is_some() {
                refuse_other_system(path, error)?;
            }
        }
        Ok(Alone { has_records: seen.0.is_some(), error })
    }

    fn scanner_at(&self, number: SegmentNo) -> Scanner {
        let context = ScanContext {
            segment_size: self.size,
            system_id: Some(self.control.system_id),
            timeline: self.control.timeline,
            format: None,
        };
        Scanner::at_segment_start(context, number.start(self.size).unwrap_or(self.control.start))
    }

    fn feed_partials(
        &self,
        scanner: &mut Scanner,
        first: SegmentNo,
        seen: &mut Gaps,
    ) -> Result<(), StoreError> {
        let mut number = first;
        while self.partials.contains_key(&number) {
            let path = self.partial_path(number);
            // What is not valid here was never finished: that is the end.
            let error = self.feed(scanner, &path, seen)?;
            if matches!(&error, Some(ScanError::WrongSystem { .. })) {
                self.scan_alone(number, &path)?;
            }
            if error.is_some() || scanner.position() < number.end(self.size) {
                break;
            }
            number = number.next();
        }
        Ok(())
    }

    /// Feeds a segment file, as far as it goes but not beyond the segment.
    fn feed<V: RecordVisitor>(
        &self,
        scanner: &mut Scanner,
        path: &Path,
        seen: &mut V,
    ) -> Result<Option<ScanError>, StoreError> {
        let file = self.disk.open(path, OpenMode::Read).map_err(StoreError::io("open", path))?;
        let mut buffer = vec![0; READ_BYTES];
        let mut at = 0;
        while at < self.size.bytes() {
            let wanted = usize::try_from(self.size.bytes() - at).unwrap_or(READ_BYTES).min(READ_BYTES);
            let buffer = buffer.get_mut(..wanted).unwrap_or_default();
            let read = read_full_at(&*file, buffer, at).map_err(StoreError::io("read", path))?;
            let result = scanner.feed(buffer.get(..read).unwrap_or_default(), seen);
            match result {
                Err(error) => return Ok(Some(error)),
                Ok(()) if read < wanted => break,
                Ok(()) => at += read as u64,
            }
        }
        Ok(None)
    }

    pub(super) fn name(&self, number: SegmentNo) -> SegmentName {
        self.lineage.name(number)
    }

    pub(super) fn complete_path(&self, number: SegmentNo) -> PathBuf {
        self.layout.complete(self.name(number), self.size)
    }

    pub(super) fn partial_path(&self, number: SegmentNo) -> PathBuf {
        self.layout.partial(self.name(number), self.size)
    }
}

fn refuse_other_system(path: &Path, error: &ScanError) -> Result<(), StoreError> {
    match error {
        ScanError::WrongSystem { expected, got, .. } => {
            Err(StoreError::OtherSystem { path: path.to_path_buf(), expected: *expected, found: *got })
        }
        _ => Ok(()),
    }
}

/// What is in one segment, seen without its neighbours.
pub(super) struct Alone {
    pub has_records: bool,
    pub error: Option<ScanError>,
}
