//! Whether what the upstream delivers again is what is held.
//!
//! Owns the comparison, byte for byte, and the dispute when bytes differ: a flipped bit on the way is no divergence. The
//! delivered WAL is scanned from before the first difference on: if it does not verify, it is corrupt and is fetched
//! again; if it does, the upstream has other WAL than we do, and nothing of it is taken. Where what is held is proved by
//! nothing (see `unproven`), a difference is a tear: the delivered bytes are to replace the held ones, if the delivered
//! WAL verifies, and everything else that is held, to its end, is the same. Writes nothing itself.

use std::sync::Arc;

use bytes::Bytes;

use crate::store::disk::{DiskFile, OpenMode, read_full_at};
use crate::store::error::{AppendError, StoreError};
use crate::store::queue::Piece;
use crate::store::shared::Shared;
use crate::store::walk::FirstRecord;
use crate::wal::scanner::{ScanContext, ScanError, Scanner};
use crate::wal::{Lsn, LsnRange, SegmentNo};

pub(super) struct Overlap {
    shared: Arc<Shared>,
    context: ScanContext,
    file: Option<(SegmentNo, Arc<dyn DiskFile>)>,
    /// Where the session began.
    start: Lsn,
    dispute: Option<Dispute>,
    /// Proved by nothing.
    unproven: Vec<LsnRange>,
    tears: Tears,
}

/// Differences in what is unproven.
#[derive(Default)]
struct Tears {
    /// Sees the delivered WAL from before the first of them on.
    scanner: Option<Scanner>,
    /// What was delivered.
    pieces: Vec<Piece>,
    /// Memory that they take; at most about as much as may wait to be written.
    bytes: u64,
    /// The first one for which there was no room: the next session will find it again.
    left: Option<Lsn>,
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
    pub(super) fn new(
        shared: Arc<Shared>,
        start: Lsn,
        context: ScanContext,
        unproven: Vec<LsnRange>,
    ) -> Self {
        Self { shared, context, file: None, start, dispute: None, unproven, tears: Tears::default() }
    }

    pub(super) fn is_disputed(&self) -> bool {
        self.dispute.is_some()
    }

    /// Where the unproven bytes begin that differ and are not replaced.
    pub(super) fn left(&self) -> Option<Lsn> {
        self.tears.left
    }

    /// All that is held, up to `held_end`, was compared: its file is not needed any more. What is to replace held bytes.
    pub(super) fn close(&mut self, held_end: Lsn) -> Result<Vec<Piece>, AppendError> {
        self.file = None;
        let ends_elsewhere = |scanner: &Scanner| scanner.verified_end() != held_end;
        if let Some(scanner) = self.tears.scanner.take().filter(ends_elsewhere) {
            return Err(AppendError::Corrupt(ScanError::EndOfWal { at: scanner.verified_end() }));
        }
        Ok(std::mem::take(&mut self.tears.pieces))
    }

    /// `whole` was delivered at `at`; `part`, its beginning, is held.
    pub(super) fn compare(&mut self, at: Lsn, part: &[u8], whole: &Bytes) -> Result<Verdict, AppendError> {
        if self.dispute.is_none() {
            let held = self.held(at, part.len())?;
            let differences = self.differences(at, &held, part);
            if let (None, Some(first)) = (&self.tears.scanner, differences.first()) {
                self.tears.scanner = Some(self.scanner_before(at, first.start)?);
            }
            match differences.iter().find(|difference| !difference.is_tear) {
                None => {
                    self.note_tears(at, part, &differences)?;
                    return Ok(Verdict::Same);
                }
                Some(other) => {
                    let scanner = self.tears.scanner.take();
                    self.dispute = scanner.map(|scanner| Dispute { at: other.start, scanner });
                }
            }
        }
        let Some(dispute) = &mut self.dispute else { return Ok(Verdict::Same) };
        dispute.scanner.feed(whole, &mut ()).map_err(AppendError::Corrupt)?;
        if dispute.scanner.verified_end() > dispute.at {
            return Err(AppendError::Diverged { at: dispute.at, timeline: self.context.timeline });
        }
        Ok(Verdict::Disputed)
    }

    /// Where `held` and `delivered`, from `at` on, differ: as far as only unproven bytes do, and the first other.
    fn differences(&self, at: Lsn, held: &[u8], delivered: &[u8]) -> Vec<Difference> {
        let mut found: Vec<Difference> = Vec::new();
        if held == delivered {
            return found;
        }
        let differing =
            held.iter().zip(delivered).enumerate().filter(|(_, (held, delivered))| held != delivered);
        for at in differing.map(|(offset, _)| at.advance(offset as u64)) {
            if let Some(last) = found.last_mut().filter(|last| at < last.unproven_to) {
                last.end = at.advance(1);
                continue;
            }
            let unproven = self.unproven.iter().find(|range| range.start() <= at && at < range.end());
            let (is_tear, unproven_to) = (unproven.is_some(), unproven.map_or(at, |range| range.end()));
            found.push(Difference { start: at, end: at.advance(1), unproven_to, is_tear });
            if !is_tear {
                break;
            }
        }
        found
    }

    /// Only unproven bytes of `part`, delivered at `at`, differ. Keeps them until all is compared.
    fn note_tears(&mut self, at: Lsn, part: &[u8], differences: &[Difference]) -> Result<(), AppendError> {
        if let Some(scanner) = &mut self.tears.scanner {
            scanner.feed(part, &mut ()).map_err(AppendError::Corrupt)?;
        }
        let offset = |position: Lsn| usize::try_from(position.bytes_since(at)).unwrap_or(usize::MAX);
        for Difference { start, end, .. } in differences {
            // A copy, so that a few bytes do not keep their receive block.
            let bytes = part.get(offset(*start)..offset(*end)).unwrap_or_default();
            self.tears.bytes += (bytes.len() + size_of::<Piece>()) as u64;
            let is_full = self.tears.bytes > self.shared.settings.unwritten_bytes_max;
            if is_full && !self.tears.pieces.is_empty() {
                self.tears.left.get_or_insert(*start);
                break;
            }
            self.tears.pieces.push(Piece { at: *start, bytes: Bytes::copy_from_slice(bytes) });
        }
        Ok(())
    }

    /// A scanner that has seen what is held up to `fed`, from a segment on in which a record starts before the
    /// difference at `at`.
    fn scanner_before(&mut self, fed: Lsn, at: Lsn) -> Result<Scanner, StoreError> {
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
                _ => return Ok(scanner),
            }
        }
    }

    /// The bytes that are held from `at` on.
    fn held(&mut self, at: Lsn, bytes: usize) -> Result<Vec<u8>, StoreError> {
        let Some(range) = LsnRange::new(at, at.advance(bytes as u64)) else { return Ok(Vec::new()) };
        let located = self.shared.tail.lock().locate(self.context.timeline, range);
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
        let name = self.shared.name_of(number)?;
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

/// Bytes that differ; what lies between them may be the same.
struct Difference {
    start: Lsn,
    end: Lsn,
    /// To here nothing proves what is held; where that is proved, the first difference.
    unproven_to: Lsn,
    /// What is held there is unproven.
    is_tear: bool,
}

/// Held bytes read at a time.
const COMPARE_BYTES: usize = 1 << 20;
