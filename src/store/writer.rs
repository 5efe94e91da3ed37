//! The way in: WAL as it comes off the socket.
//!
//! Owns the only writing half of the store. Every byte passes here: what is held already is compared with it, what is
//! new is verified, kept in the tail and handed to the writer thread. Bytes beyond the verified end are provisional:
//! they are written, because a record may be longer than any buffer, but never readable, and forgotten when the next
//! upstream session begins. Never waits for the disk, except to read back what is compared.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use crate::store::StoreHandle;
use crate::store::error::{AppendError, StoreError};
use crate::store::overlap::{Overlap, Verdict};
use crate::store::queue::{Batch, Follows, Piece, WriteQueue};
use crate::store::shared::Shared;
use crate::store::tail::BlockId;
use crate::store::xids::recount;
use crate::wal::record::{Record, RecordVisitor};
use crate::wal::scanner::{ScanContext, Scanner};
use crate::wal::{Lsn, NewestCheckpoint, NextXid, SegmentNo, SegmentSize, TimelineId};

/// Takes WAL from the upstream. There is exactly one.
pub struct WalWriter {
    pub(super) shared: Arc<Shared>,
    /// Keeps the threads.
    _handle: Option<Arc<StoreHandle>>,
    pub(super) scanner: Option<Scanner>,
    pub(super) session: Option<Session>,
    pub(super) crossings: Crossings,
    pub(super) next_xid: NextXid,
    checkpoint: NewestCheckpoint,
}

/// What one upstream session has delivered.
pub(super) struct Session {
    /// End of what was taken.
    received: Lsn,
    /// Verified end when the session began: what is before it is compared, not written.
    held_end: Lsn,
    /// Whether the first new record will prove, by naming ours as the one before it, that it continues what is held.
    is_chain_to_prove: bool,
    overlap: Overlap,
    epoch: u64,
    /// Taken since the last hand-over.
    pieces: Vec<(Piece, BlockId)>,
    /// Verified end when it was last handed over.
    submitted: Lsn,
    /// What was said with it.
    follows: Follows,
    /// To be written over what is held, once everything is compared.
    replacements: Vec<Piece>,
    /// That everything was compared was handed on.
    is_proof_given: bool,
}

/// Where to ask the upstream to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResumePlan {
    /// The timeline.
    pub timeline: TimelineId,
    /// End of what is held.
    pub held_end: Lsn,
    /// Where to start, so that some of what is held is delivered again and compared.
    pub start: Lsn,
    /// Where to start if the upstream has no WAL from `start` any more: with the newest of what is held.
    pub newest_start: Lsn,
    /// Where to start if the upstream has no WAL from there either.
    pub fallback: Option<Lsn>,
    /// The first byte that only a comparison can prove; a session that starts behind it leaves it as it is.
    pub unproven: Option<Lsn>,
}

impl ResumePlan {
    /// The first place to start that comes after `refused`, or the first of all.
    pub fn start_after(&self, refused: Option<Lsn>) -> Option<Lsn> {
        let starts = [self.start, self.newest_start].into_iter().chain(self.fallback);
        starts.into_iter().find(|start| refused.is_none_or(|refused| *start > refused))
    }
}

impl WalWriter {
    pub(super) fn new(
        shared: Arc<Shared>,
        handle: Option<Arc<StoreHandle>>,
        scanner: Option<Scanner>,
    ) -> Self {
        let size = shared.segment_size().ok();
        let crossings = Crossings::from(scanner.as_ref(), size);
        let (next_xid, checkpoint) = (recount(&shared, scanner.as_ref()), NewestCheckpoint::default());
        if let Some(scanner) = &scanner {
            shared.xids.note(next_xid.get(), scanner.context().timeline, scanner.verified_end());
        }
        Self { shared, _handle: handle, scanner, session: None, crossings, next_xid, checkpoint }
    }

    /// Where to ask the upstream to start; `None` in a fresh directory.
    pub fn plan(&self) -> Option<ResumePlan> {
        let size = self.shared.segment_size().ok()?;
        let positions = self.shared.positions().ok()?;
        let timeline = positions.timeline;
        let scanner = self.scanner.as_ref()?;
        let held_end = scanner.verified_end();
        let oldest = self.shared.begin()?;
        if held_end <= oldest {
            let (start, newest_start) = (held_end, held_end);
            let (fallback, unproven) = (None, None);
            return Some(ResumePlan { timeline, held_end, start, newest_start, fallback, unproven });
        }
        // Zeros prove nothing, so from the last record on; but not from before the segment of our end, which the
        // upstream may not have any more.
        let number = SegmentNo::ending_at(held_end, size);
        let segment_start = number.start(size).unwrap_or(oldest);
        let page_start = scanner.last_record().and_then(Lsn::page_start).unwrap_or(segment_start);
        let newest_start = page_start.max(segment_start).max(oldest);
        // What a timeline began with is compared whole: it came from another file.
        let is_first = self.shared.begins_in(number).is_some();
        let newest_start = if is_first { segment_start.max(oldest) } else { newest_start };
        let fallback = (size.offset_of(held_end) == 0).then_some(held_end);
        // What only a comparison can prove is compared, however far back it lies.
        let unproven = self.shared.unproven.first();
        let start = unproven
            .and_then(Lsn::page_start)
            .map_or(newest_start, |page| page.min(newest_start))
            .max(oldest);
        Some(ResumePlan { timeline, held_end, start, newest_start, fallback, unproven })
    }

    /// A new upstream session delivers WAL from `start`, which must be held or be the end of what is. What earlier
    /// sessions delivered beyond the verified end is forgotten.
    pub fn begin(&mut self, start: Lsn) -> Result<(), StoreError> {
        self.shared.health.check()?;
        self.submit();
        self.session = None;
        let scanner = self.scanner.as_mut().ok_or(StoreError::NotInitialized)?;
        let held_end = scanner.verified_end();
        let oldest = self.shared.begin().ok_or(StoreError::NotInitialized)?;
        if start > held_end {
            return Err(StoreError::BadStart { start, reason: "it is beyond what is held" });
        }
        if start < oldest {
            return Err(StoreError::BadStart { start, reason: "it is before what is held" });
        }
        *scanner = Scanner::resume(scanner.context(), scanner.resume_point());
        let is_chain_to_prove = start == held_end && scanner.last_record().is_some();
        let epoch = self.shared.tail.lock().begin(held_end);
        let unproven = self.shared.unproven.begin(epoch);
        let overlap = Overlap::new(self.shared.clone(), start..held_end, scanner.context(), unproven);
        self.session = Some(Session {
            received: start,
            held_end,
            is_chain_to_prove,
            overlap,
            epoch,
            pieces: Vec::new(),
            submitted: held_end,
            follows: Follows::Nothing,
            replacements: Vec::new(),
            is_proof_given: false,
        });
        Ok(())
    }

    /// Takes the next bytes of the session, a slice of the receive block `block`. After an error the session is over.
    pub fn append(&mut self, at: Lsn, bytes: Bytes, block: BlockId) -> Result<(), AppendError> {
        self.shared.health.check()?;
        let (Some(session), Some(scanner)) = (&mut self.session, &mut self.scanner) else {
            return Err(StoreError::NotInitialized.into());
        };
        if at != session.received {
            return Err(AppendError::Gap { expected: session.received, got: at });
        }
        let Some(new) = session.compare(at, bytes, &self.shared.queue)? else { return Ok(()) };
        if new.is_empty() {
            return Ok(());
        }
        let at = session.received;
        let mut seen = Seen {
            crossings: &mut self.crossings,
            next_xid: &mut self.next_xid,
            checkpoint: &mut self.checkpoint,
        };
        let result = scanner.feed(&new, &mut seen);
        let taken = match result {
            Ok(()) => new,
            // What was verified before the fault is good.
            Err(_) => {
                let good = usize::try_from(scanner.verified_end().bytes_since(at)).unwrap_or(usize::MAX);
                new.slice(..good.min(new.len()))
            }
        };
        if !taken.is_empty() {
            session.received = at.advance(taken.len() as u64);
            let piece = Piece { at, bytes: taken };
            self.shared.queue.received(piece.memory_bytes());
            session.pieces.push((piece, block));
        }
        result.map_err(AppendError::Corrupt)
    }

    /// Hands what was taken to the writer thread, and makes what is verified readable; all of it becomes durable as soon
    /// as it can. To be called when the socket has run dry.
    pub fn submit(&mut self) {
        self.hand_over(Follows::Nothing);
    }

    /// As `submit`, but the sync may wait until some megabytes are there. The caller knows that more comes, and
    /// calls `submit` soon if it does not.
    pub fn submit_before_more(&mut self) {
        self.hand_over(Follows::More);
    }

    fn hand_over(&mut self, follows: Follows) {
        let is_compared = self.is_all_compared();
        let (Some(session), Some(scanner)) = (&mut self.session, &self.scanner) else { return };
        let verified = scanner.verified_end();
        let is_proof = is_compared && !session.is_proof_given && !self.shared.unproven.is_empty();
        // Until it is durable nothing can be reported.
        let follows = if is_proof { Follows::Nothing } else { follows };
        let is_sync_due = session.follows == Follows::More && follows == Follows::Nothing;
        let has_pieces = !session.pieces.is_empty() || !session.replacements.is_empty();
        if !has_pieces && verified == session.submitted && !is_proof && !is_sync_due {
            return;
        }
        session.is_proof_given |= is_compared;
        session.follows = follows;
        // These first: what is acknowledged because of the others says that all before it is durable.
        let mut pieces = VecDeque::from(std::mem::take(&mut session.replacements));
        let mut end = session.submitted;
        {
            let mut tail = self.shared.tail.lock();
            for (piece, block) in session.pieces.drain(..) {
                tail.push(piece.bytes.clone(), block);
                end = piece.at.advance(piece.bytes.len() as u64);
                pieces.push_back(piece);
            }
        }
        session.submitted = verified;
        if !self.crossings.found.is_empty() {
            let mut catalog = self.shared.catalog.lock();
            for (number, start) in self.crossings.found.drain(..) {
                catalog.note_crossing(number, start);
            }
        }
        self.shared.xids.note(self.next_xid.get(), scanner.context().timeline, verified);
        self.shared.redo.note(self.checkpoint.take());
        self.shared.publish(|positions| positions.verified = verified);
        let epoch = session.epoch;
        self.shared.queue.push(Batch { pieces, end, verified, epoch, follows, is_proof });
    }

    /// Whether this session has shown that the upstream's WAL is what is held, and made it so durably where it was not:
    /// only then may positions be reported. The observer hears of positions when it is so.
    pub fn is_overlap_proven(&self) -> bool {
        self.is_all_compared() && self.shared.unproven.is_empty()
    }

    fn is_all_compared(&self) -> bool {
        let (Some(session), Some(scanner)) = (&self.session, &self.scanner) else { return false };
        !session.overlap.is_disputed()
            && session.overlap.left().is_none()
            && session.received >= session.held_end
            && (!session.is_chain_to_prove || scanner.verified_end() > session.held_end)
    }

    /// End of the bytes taken in this session, verified or not; of what is held when there is none.
    pub fn received(&self) -> Lsn {
        let verified = || self.scanner.as_ref().map_or(Lsn::MIN, Scanner::verified_end);
        self.session.as_ref().map_or_else(verified, |session| session.received)
    }

    /// Whether more may be read from the socket: the bytes that are not yet written are below the limit; once they were
    /// not, below half of it. The observer hears of positions when there is room again.
    pub fn has_room(&self) -> bool {
        self.shared.queue.has_room()
    }

    /// Most memory for received bytes, in the tail and waiting to be written.
    pub fn memory_bytes_max(&self) -> u64 {
        self.shared.settings.tail_bytes_max.saturating_add(self.shared.settings.unwritten_bytes_max)
    }

    /// The context of the scan, with what was learnt from the WAL (its format).
    pub fn context(&self) -> Option<ScanContext> {
        self.scanner.as_ref().map(Scanner::context)
    }
}

impl Session {
    pub(super) fn unsubmitted_memory_bytes(&self) -> u64 {
        let pieces = self.pieces.iter().map(|(piece, _)| piece).chain(&self.replacements);
        pieces.map(Piece::memory_bytes).sum()
    }

    /// Compares what is held already; returns what is not, or `None` while other bytes than the held ones are examined.
    fn compare(
        &mut self,
        at: Lsn,
        mut bytes: Bytes,
        queue: &WriteQueue,
    ) -> Result<Option<Bytes>, AppendError> {
        let overlap = usize::try_from(self.held_end.bytes_since(at)).unwrap_or(usize::MAX).min(bytes.len());
        if overlap == 0 && !self.overlap.is_disputed() {
            return Ok(Some(bytes));
        }
        let whole = bytes.clone();
        let held = bytes.split_to(overlap);
        match self.overlap.compare(at, &held, &whole)? {
            Verdict::Same => {
                let received = at.advance(overlap as u64);
                if received >= self.held_end {
                    self.replacements = self.overlap.close(self.held_end)?;
                    queue.received(self.replacements.iter().map(Piece::memory_bytes).sum());
                }
                self.received = received;
                if let Some(at) = self.overlap.left().filter(|_| received >= self.held_end) {
                    return Err(AppendError::TooMuchToReplace { at });
                }
                Ok(Some(bytes))
            }
            Verdict::Disputed => {
                self.received = at.advance(whole.len() as u64);
                Ok(None)
            }
        }
    }
}

/// What is noted of each new record.
struct Seen<'a> {
    crossings: &'a mut Crossings,
    next_xid: &'a mut NextXid,
    checkpoint: &'a mut NewestCheckpoint,
}

impl RecordVisitor for Seen<'_> {
    #[inline]
    fn record(&mut self, record: &Record<'_>) {
        self.crossings.record(record);
        self.next_xid.note(record);
        self.checkpoint.note(record);
    }
}

/// Finds, for the end of each segment, the record that crosses it or ends there.
pub(super) struct Crossings {
    size: Option<SegmentSize>,
    /// The segment whose end comes next.
    number: SegmentNo,
    boundary: Option<Lsn>,
    previous: Option<Lsn>,
    found: Vec<(SegmentNo, Lsn)>,
}

impl Crossings {
    const NOTHING: Self =
        Self { size: None, number: SegmentNo(0), boundary: None, previous: None, found: Vec::new() };

    pub(super) fn from(scanner: Option<&Scanner>, size: Option<SegmentSize>) -> Self {
        let (Some(scanner), Some(size)) = (scanner, size) else { return Self::NOTHING };
        let number = SegmentNo::holding(scanner.verified_end(), size);
        Self {
            size: Some(size),
            number,
            boundary: Some(number.end(size)),
            previous: scanner.last_record(),
            found: Vec::new(),
        }
    }

    #[cold]
    fn cross(&mut self, start: Lsn, end: Lsn) {
        let Some(size) = self.size else { return };
        while self.boundary.is_some_and(|boundary| boundary <= end) {
            // Zeros lie between the record before and the boundary if this one starts after it.
            let crossing = if self.boundary.is_some_and(|boundary| start < boundary) {
                Some(start)
            } else {
                self.previous
            };
            if let Some(crossing) = crossing.or(self.number.start(size)) {
                self.found.push((self.number, crossing));
            }
            self.number = self.number.next();
            self.boundary = Some(self.number.end(size));
        }
    }
}

impl RecordVisitor for Crossings {
    #[inline]
    fn record(&mut self, record: &Record<'_>) {
        if self.boundary.is_some_and(|boundary| boundary <= record.end) {
            self.cross(record.start, record.end);
        }
        self.previous = Some(record.start);
    }
}
