//! Whether what the upstream delivers again is what is held.
//!
//! Owns the comparison, byte for byte, and the dispute when bytes differ: a flipped bit on the way is no divergence. The
//! delivered WAL is scanned from before the first difference on: if it does not verify, it is corrupt and is fetched
//! again; if it does, the upstream has other WAL than we do, and nothing of it is taken. Where what is held is proved by
//! nothing (see `unproven`), a difference is a tear: the delivered bytes are to replace the held ones, if the delivered
//! WAL verifies, and everything else that is held, to its end, is the same. Writes nothing itself.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::store::error::AppendError;
use crate::store::held::HeldWal;
use crate::store::queue::Piece;
use crate::store::shared::Shared;
use crate::wal::scanner::{ScanContext, ScanError, Scanner};
use crate::wal::{Lsn, LsnRange};

pub(super) struct Overlap {
    held: HeldWal,
    unwritten_bytes_max: u64,
    /// Where the session began, and the end of what was held then.
    start: Lsn,
    held_end: Lsn,
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
        range: Range<Lsn>,
        context: ScanContext,
        unproven: Vec<LsnRange>,
    ) -> Self {
        let unwritten_bytes_max = shared.settings.unwritten_bytes_max;
        let held = HeldWal::new(shared, context);
        let Range { start, end: held_end } = range;
        Self { held, unwritten_bytes_max, start, held_end, dispute: None, unproven, tears: Tears::default() }
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
        self.held.close();
        let ends_elsewhere = |scanner: &Scanner| scanner.verified_end() != held_end;
        if let Some(scanner) = self.tears.scanner.take().filter(ends_elsewhere) {
            return Err(AppendError::Corrupt(ScanError::EndOfWal { at: scanner.verified_end() }));
        }
        Ok(std::mem::take(&mut self.tears.pieces))
    }

    /// `whole` was delivered at `at`; `part`, its beginning, is held.
    pub(super) fn compare(&mut self, at: Lsn, part: &[u8], whole: &Bytes) -> Result<Verdict, AppendError> {
        if self.dispute.is_none() {
            let held = self.held.read(at, part.len())?;
            let differences = self.differences(at, &held, part);
            if let (None, Some(first)) = (&self.tears.scanner, differences.first()) {
                self.tears.scanner = Some(self.held.scanner_before(self.start, at, first.start)?);
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
            let (at, timeline) = (dispute.at, self.held.timeline());
            return Err(AppendError::Diverged { at, held_end: self.held_end, timeline });
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
            let is_full = self.tears.bytes > self.unwritten_bytes_max;
            if is_full && !self.tears.pieces.is_empty() {
                self.tears.left.get_or_insert(*start);
                break;
            }
            self.tears.pieces.push(Piece { at: *start, bytes: Bytes::copy_from_slice(bytes) });
        }
        Ok(())
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
