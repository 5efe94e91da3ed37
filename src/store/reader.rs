//! Reads WAL back for senders.
//!
//! Owns nothing on disk. Looks in memory first, then in the segment files, and never waits for the disk where it is
//! asked to: what is not in memory comes back as `Cold`, to be loaded where blocking is allowed. The caller asks only
//! for what is verified.
//!
//! Files are handed out as they are mapped, for the kernel to copy, or as copies, for whoever looks at the bytes himself (to
//! encrypt or to compress them): a page that has left memory, and that the disk does not give back, would end the process.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::store::error::ReadError;
use crate::store::mapping::{COLD_WINDOW_BYTES, MappedSegment, offset};
use crate::store::shared::Shared;
use crate::store::tail::Located;
use crate::wal::{Lineage, Lsn, LsnRange, SegmentName, SegmentNo, TimelineId};

/// Reads one timeline's WAL, for one consumer.
pub struct WalReader {
    shared: Arc<Shared>,
    timeline: TimelineId,
    access: Access,
    /// Where the timeline's first segment begins.
    begin: Option<Lsn>,
    open: Arc<Mutex<Open>>,
}

/// How files are handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Mapped: the bytes must only be given to the kernel.
    Mapped,
    /// Copied: they may be looked at.
    Copied,
}

/// The segments a reader is at and will be at; few, because a range is much shorter than a segment.
#[derive(Default)]
struct Open {
    segments: Vec<Arc<MappedSegment>>,
    /// Just found in memory, or brought in: need not be looked for again.
    resident: Option<LsnRange>,
    /// Up to here the files were brought in; `None` until the reader has waited for them once.
    brought_to: Option<Lsn>,
    /// What was copied last, for [`Access::Copied`].
    copied: Option<Copied>,
}

struct Copied {
    range: LsnRange,
    bytes: Bytes,
    /// Made while some of what is held was unproven, and so might be replaced: good only as long as that is so.
    is_provisional: bool,
}

/// How much is copied at a time.
const COPIED_BYTES_MAX: u64 = 1 << 20;

/// How far the files are brought in before the reader comes there.
const AHEAD_BYTES: u64 = 2 * COLD_WINDOW_BYTES as u64;

/// What a read found.
#[derive(Debug)]
pub enum Read {
    /// The whole range, in order.
    Ready(Vec<Bytes>),
    /// Some of it must come from the disk first.
    Cold(ColdRead),
}

/// A read that must wait for the disk.
pub struct ColdRead {
    shared: Arc<Shared>,
    timeline: TimelineId,
    range: LsnRange,
    open: Arc<Mutex<Open>>,
    purpose: Purpose,
    access: Access,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// Somebody waits for it.
    Wanted,
    /// Somebody will.
    Ahead,
}

impl std::fmt::Debug for ColdRead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ColdRead").field("timeline", &self.timeline).field("range", &self.range).finish()
    }
}

impl WalReader {
    pub(super) fn new(shared: Arc<Shared>, timeline: TimelineId, access: Access) -> Self {
        let first = |lineage: Lineage| lineage.first_segment(timeline);
        let begin = shared.lineage().ok().and_then(first).zip(shared.segment_size().ok());
        let begin = begin.and_then(|(first, size)| first.start(size));
        Self { shared, timeline, access, begin, open: Arc::default() }
    }

    /// The bytes of `range`, which must be verified; a few hundred kilobytes at most. Does not block.
    pub fn read(&mut self, range: LsnRange) -> Result<Read, ReadError> {
        if self.begin.is_some_and(|begin| range.start() < begin)
            && let Ok(size) = self.shared.segment_size()
        {
            let number = SegmentNo::holding(range.start(), size);
            return Err(ReadError::Removed(SegmentName { timeline: self.timeline, number }));
        }
        let Located { in_files, in_memory } = self.shared.tail.lock().locate(self.timeline, range);
        let Some(in_files) = in_files else {
            // It has caught up, perhaps for weeks: the files must not be kept from being used again.
            *self.open.lock() = Open::default();
            return Ok(Read::Ready(in_memory));
        };
        match self.read_files(in_files)? {
            Some(mut bytes) => {
                bytes.extend(in_memory);
                Ok(Read::Ready(bytes))
            }
            None => {
                let wanted = match self.access {
                    Access::Mapped => in_files,
                    Access::Copied => self.copied_at_once(in_files),
                };
                Ok(Read::Cold(self.cold(wanted, Purpose::Wanted)))
            }
        }
    }

    /// What to bring in while the bytes before `position` are sent; WAL up to `limit` may be read. `None` when enough is
    /// there, or the reader does not read from files. Its failure means nothing yet: the read that comes there fails, too.
    pub fn ahead(&self, position: Lsn, limit: Lsn) -> Option<ColdRead> {
        // Reading one after the other is what the kernel reads ahead for by itself.
        if self.access == Access::Copied {
            return None;
        }
        let start = self.open.lock().brought_to?.max(position);
        let size = self.shared.segment_size().ok()?;
        // Not beyond the next segment: each is an open file.
        let next_end = SegmentNo::holding(position, size).next().end(size);
        let wanted = position.advance(AHEAD_BYTES).min(limit).min(next_end);
        let range = LsnRange::new(start, wanted.min(SegmentNo::holding(start, size).end(size)))?;
        let range = self.shared.tail.lock().locate(self.timeline, range).in_files?;
        Some(self.cold(range, Purpose::Ahead))
    }

    fn cold(&self, range: LsnRange, purpose: Purpose) -> ColdRead {
        let (shared, timeline, open) = (self.shared.clone(), self.timeline, self.open.clone());
        ColdRead { shared, timeline, range, open, purpose, access: self.access }
    }

    /// The range and some of what follows it: no more than is verified and written, for the rest may still change.
    fn copied_at_once(&self, range: LsnRange) -> LsnRange {
        let positions = *self.shared.positions.lock();
        let of_current = positions.filter(|positions| positions.timeline == self.timeline);
        let left = || self.shared.lineage().ok()?.left(self.timeline).map(|(left, _)| left);
        let limit = of_current.map(|positions| positions.verified.min(positions.written)).or_else(left);
        let (Some(limit), Ok(size)) = (limit, self.shared.segment_size()) else { return range };
        let segment_end = SegmentNo::holding(range.start(), size).end(size);
        let end = range.start().advance(COPIED_BYTES_MAX).min(limit).min(segment_end);
        LsnRange::new(range.start(), end.max(range.end())).unwrap_or(range)
    }

    /// What was found in memory may have left since: the next read looks again. To be called after a wait.
    pub fn forget_residency(&mut self) {
        self.open.lock().resident = None;
    }

    /// `None`: some of it is not in memory.
    fn read_files(&self, range: LsnRange) -> Result<Option<Vec<Bytes>>, ReadError> {
        if self.access == Access::Copied {
            let is_settled = self.shared.unproven.is_empty();
            let mut open = self.open.lock();
            if is_settled && open.copied.as_ref().is_some_and(|copied| copied.is_provisional) {
                open.copied = None;
            }
            return Ok(open.copied_part(range).map(|part| vec![part]));
        }
        let parts = self.shared.parts(self.timeline, range)?;
        Ok(self.slices(range, parts))
    }

    fn slices(&self, range: LsnRange, parts: Vec<(SegmentName, Range<usize>)>) -> Option<Vec<Bytes>> {
        let size = self.shared.segment_size().ok()?;
        let mut open = self.open.lock();
        let first = SegmentNo::holding(range.start(), size);
        open.segments.retain(|segment| segment.name.number >= first);
        let is_resident = open
            .resident
            .is_some_and(|resident| resident.start() <= range.start() && range.end() <= resident.end());
        let (mut all, mut resident) = (Vec::new(), range.end());
        for (name, within) in parts {
            let segment = open.segments.iter().find(|segment| segment.name == name)?;
            if !is_resident {
                let end = segment.resident_to(within.clone())?;
                resident = name.number.start(size)?.advance(end as u64);
            }
            all.push(segment.slice(within)?);
        }
        if !is_resident {
            open.resident = LsnRange::new(range.start(), resident);
        }
        Some(all)
    }
}

impl Open {
    fn copied_part(&self, range: LsnRange) -> Option<Bytes> {
        let Copied { range: copied, bytes, .. } = self.copied.as_ref()?;
        let offset = |position: Lsn| usize::try_from(position.bytes_since(copied.start())).ok();
        let is_inside = copied.start() <= range.start() && range.end() <= copied.end();
        is_inside.then_some(())?;
        Some(bytes.slice(offset(range.start())?..offset(range.end())?))
    }
}

impl ColdRead {
    /// Brings the range into memory, and a window behind it; blocks. Then read again.
    pub fn load(self) -> Result<(), ReadError> {
        if self.access == Access::Copied {
            return self.copy();
        }
        let loaded = self.load_parts();
        let mut open = self.open.lock();
        match (loaded, self.purpose) {
            (Ok((segments, end)), Purpose::Wanted) => {
                *open = Open { segments, resident: Some(self.range), brought_to: Some(end), copied: None };
                Ok(())
            }
            (Ok((segments, end)), Purpose::Ahead) => {
                // Unless it has caught up meanwhile.
                if open.brought_to.is_some() {
                    open.brought_to = Some(end);
                    let known: Vec<_> = open.segments.iter().map(|segment| segment.name).collect();
                    open.segments.extend(segments.into_iter().filter(|new| !known.contains(&new.name)));
                }
                Ok(())
            }
            (Err(error), _) => {
                open.brought_to = None;
                Err(error)
            }
        }
    }

    fn copy(self) -> Result<(), ReadError> {
        let is_provisional = !self.shared.unproven.is_empty();
        let (mut segments, mut parts) = (Vec::new(), Vec::new());
        for (name, within) in self.shared.parts(self.timeline, self.range)? {
            let segment = self.shared.mappings.open(&self.shared, name)?;
            parts.push(segment.copy(&self.shared, within)?);
            segments.push(segment);
        }
        let bytes = match parts.len() {
            1 => parts.pop().unwrap_or_default(),
            _ => parts.concat().into(),
        };
        // The segments stay open: each opening would compare their checksum again.
        let copied = Some(Copied { range: self.range, bytes, is_provisional });
        *self.open.lock() = Open { segments, copied, ..Open::default() };
        Ok(())
    }

    /// Also returns how far more than the range was brought in.
    fn load_parts(&self) -> Result<(Vec<Arc<MappedSegment>>, Lsn), ReadError> {
        let (mut segments, mut end) = (Vec::new(), self.range.end());
        for (name, within) in self.shared.parts(self.timeline, self.range)? {
            let segment = self.shared.mappings.open(&self.shared, name)?;
            let (from, brought) = (within.start, segment.load(&self.shared, within)?);
            // The first part begins where the range does, the others with their segment.
            let start = if segments.is_empty() { self.range.start() } else { end };
            end = start.advance((brought - from) as u64);
            segments.push(segment);
        }
        Ok((segments, end))
    }
}

impl Shared {
    /// The parts of a range of `timeline` in each segment. One that was left is read from its successors' files where it
    /// has none of its own any more; there it ends where it was left.
    fn parts(
        &self,
        timeline: TimelineId,
        range: LsnRange,
    ) -> Result<Vec<(SegmentName, Range<usize>)>, ReadError> {
        let removed = |number| ReadError::Removed(SegmentName { timeline, number });
        let lineage = self.lineage.lock();
        let (Some(lineage), Ok(size)) = (&*lineage, self.segment_size()) else {
            return Err(removed(SegmentNo(0)));
        };
        let (first, last) =
            (SegmentNo::holding(range.start(), size), SegmentNo::ending_at(range.end(), size));
        if lineage.first_segment(timeline).is_none_or(|own| first < own) {
            return Err(removed(first));
        }
        if lineage.left(timeline).is_some_and(|(left, _)| range.end() > left) {
            return Err(ReadError::TimelineLeft(timeline));
        }
        let part = |number: SegmentNo| {
            let start = if number == first { offset(range.start(), size) } else { 0 };
            let whole = usize::try_from(size.bytes()).unwrap_or(usize::MAX);
            let end = if range.end() < number.end(size) { offset(range.end(), size) } else { whole };
            (lineage.name(number), start..end)
        };
        Ok((first.0..=last.0).map(SegmentNo).map(part).collect())
    }
}
