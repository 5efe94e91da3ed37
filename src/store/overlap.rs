//! Whether what the upstream delivers again is what is held.
//!
//! Owns the comparison, byte for byte, and the dispute when bytes differ: a flipped bit on the way is no divergence. The
//! delivered WAL is scanned from before the first difference on: if it does not verify, it is corrupt and is fetched
//! again; if it does, the upstream has other WAL than we do, and nothing of it is taken.

use std::sync::Arc;

use bytes::Bytes;

use crate::store::disk::{DiskFile, OpenMode, read_full_at};
use crate::store::error::{AppendError, StoreError};
use crate::store::shared::Shared;
use crate::store::walk::FirstRecord;
use crate::wal::scanner::{ScanContext, Scanner};
use crate::wal::{Lsn, LsnRange, SegmentName, SegmentNo};

pub(super) struct Overlap {
    shared: Arc<Shared>,
    context: ScanContext,
    file: Option<(SegmentNo, Arc<dyn DiskFile>)>,
    /// Where the session began.
    start: Lsn,
    dispute: Option<Dispute>,
}

/// The delivered WAL differs from what is held.
struct Dispute {
    /// First byte that differs.
    at: Lsn,
    /// Has seen what is held up to where the delivered bytes were fed.
    scanner: Scanner,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The bytes are those that are held.
    Same,
    /// They, or some before them, are not; it is not yet known why.
    Disputed,
}

impl Overlap {
    pub(super) fn new(shared: Arc<Shared>, start: Lsn, context: ScanContext) -> Self {
        Self { shared, context, file: None, start, dispute: None }
    }

    pub(super) fn is_disputed(&self) -> bool {
        self.dispute.is_some()
    }

    /// All that is held was compared: its file is not needed any more.
    pub(super) fn close(&mut self) {
        self.file = None;
    }

    /// `whole` was delivered at `at`; `part`, its beginning, is held.
    pub(super) fn compare(&mut self, at: Lsn, part: &[u8], whole: &Bytes) -> Result<Verdict, AppendError> {
        if self.dispute.is_none() {
            let held = self.held(at, part.len())?;
            let Some(offset) = held.iter().zip(part).position(|(held, delivered)| held != delivered) else {
                return Ok(Verdict::Same);
            };
            self.dispute = Some(self.open_dispute(at, at.advance(offset as u64))?);
        }
        let Some(dispute) = &mut self.dispute else { return Ok(Verdict::Same) };
        dispute.scanner.feed(whole, &mut ()).map_err(AppendError::Corrupt)?;
        if dispute.scanner.verified_end() > dispute.at {
            return Err(AppendError::Diverged { at: dispute.at, timeline: self.context.timeline });
        }
        Ok(Verdict::Disputed)
    }

    /// A scanner that has seen what is held up to `fed`, from a segment on in which a record starts before the
    /// difference at `at`.
    fn open_dispute(&mut self, fed: Lsn, at: Lsn) -> Result<Dispute, StoreError> {
        let size = self.context.segment_size;
        let oldest = self.shared.oldest().ok_or(StoreError::NotInitialized)?;
        let mut number = SegmentNo::holding(self.start, size);
        loop {
            let start = number.start(size).unwrap_or(oldest).max(oldest);
            let mut scanner = Scanner::at_segment_start(self.context, start);
            let mut first = FirstRecord::default();
            while scanner.position() < fed {
                let at = scanner.position();
                let wanted = usize::try_from(fed.bytes_since(at)).unwrap_or(usize::MAX).min(COMPARE_BYTES);
                let held = self.held(at, wanted)?;
                scanner.feed(&held, &mut first).map_err(|error| StoreError::Damaged {
                    path: self.shared.layout.wal_dir.clone(),
                    detail: error.to_string(),
                })?;
            }
            match number.previous() {
                Some(before) if first.0.is_none_or(|first| first > at) && start > oldest => number = before,
                _ => return Ok(Dispute { at, scanner }),
            }
        }
    }

    /// The bytes that are held from `at` on.
    fn held(&mut self, at: Lsn, bytes: usize) -> Result<Vec<u8>, StoreError> {
        let Some(range) = LsnRange::new(at, at.advance(bytes as u64)) else { return Ok(Vec::new()) };
        let located = self.shared.tail.lock().locate(range);
        let mut held = Vec::with_capacity(bytes);
        if let Some(range) = located.in_files {
            self.read_files(range, &mut held)?;
        }
        for part in located.in_memory {
            held.extend_from_slice(&part);
        }
        Ok(held)
    }

    fn read_files(&mut self, range: LsnRange, held: &mut Vec<u8>) -> Result<(), StoreError> {
        let size = self.context.segment_size;
        let mut at = range.start();
        while at < range.end() {
            let number = SegmentNo::holding(at, size);
            let end = range.end().min(number.end(size));
            let file = self.file_of(number)?;
            let filled = held.len();
            held.resize(filled + usize::try_from(end.bytes_since(at)).unwrap_or(0), 0);
            let part = held.get_mut(filled..).unwrap_or_default();
            let path = self.shared.layout.wal_dir.clone();
            let read =
                read_full_at(&*file, part, size.offset_of(at)).map_err(StoreError::io("read", &path))?;
            if read < part.len() {
                return Err(StoreError::Damaged { path, detail: "a segment is too short".to_owned() });
            }
            at = end;
        }
        Ok(())
    }

    fn file_of(&mut self, number: SegmentNo) -> Result<Arc<dyn DiskFile>, StoreError> {
        if let Some((_, file)) = self.file.as_ref().filter(|(open, _)| *open == number) {
            return Ok(file.clone());
        }
        let name = SegmentName { timeline: self.context.timeline, number };
        let partial = self.shared.partials.lock().get(&number).map(|segment| segment.file.clone());
        let file = match partial {
            Some(file) => file,
            None => {
                let path = self.shared.layout.complete(name, self.context.segment_size);
                self.shared.disk.open(&path, OpenMode::Read).map_err(StoreError::io("open", &path))?
            }
        };
        self.file = Some((number, file.clone()));
        Ok(file)
    }
}

/// Held bytes read at a time.
const COMPARE_BYTES: usize = 1 << 20;
