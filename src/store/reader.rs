//! Reads WAL back for senders.
//!
//! Owns nothing on disk. Looks in memory first, then in the segment files, and never waits for the disk where it is
//! asked to: what is not in memory comes back as `Cold`, to be loaded where blocking is allowed. The caller asks only
//! for what is verified.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::store::error::ReadError;
use crate::store::mapping::{MappedSegment, offset};
use crate::store::shared::Shared;
use crate::wal::{LsnRange, SegmentName, SegmentNo, SegmentSize, TimelineId};

/// Reads one timeline's WAL, for one consumer.
pub struct WalReader {
    shared: Arc<Shared>,
    timeline: TimelineId,
    open: Arc<Mutex<Open>>,
}

/// The segments a reader is at; at most two, because a range is much shorter than a segment.
#[derive(Default)]
struct Open {
    segments: Vec<Arc<MappedSegment>>,
    /// Just brought in: need not be looked for again.
    loaded: Option<LsnRange>,
}

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
}

impl std::fmt::Debug for ColdRead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ColdRead").field("timeline", &self.timeline).field("range", &self.range).finish()
    }
}

impl WalReader {
    pub(super) fn new(shared: Arc<Shared>, timeline: TimelineId) -> Self {
        Self { shared, timeline, open: Arc::default() }
    }

    /// The bytes of `range`, which must be verified; a few hundred kilobytes at most. Does not block.
    pub fn read(&mut self, range: LsnRange) -> Result<Read, ReadError> {
        let is_current = self.shared.positions().is_ok_and(|positions| positions.timeline == self.timeline);
        let (in_files, in_memory) = if is_current {
            let located = self.shared.tail.lock().locate(range);
            (located.in_files, located.in_memory)
        } else {
            (Some(range), Vec::new())
        };
        let Some(in_files) = in_files else {
            // It has caught up, perhaps for weeks: the files must not be kept from being used again.
            *self.open.lock() = Open::default();
            return Ok(Read::Ready(in_memory));
        };
        match self.read_files(in_files) {
            Some(mut bytes) => {
                bytes.extend(in_memory);
                Ok(Read::Ready(bytes))
            }
            None => {
                let (shared, timeline, open) = (self.shared.clone(), self.timeline, self.open.clone());
                Ok(Read::Cold(ColdRead { shared, timeline, range: in_files, open }))
            }
        }
    }

    fn read_files(&self, range: LsnRange) -> Option<Vec<Bytes>> {
        let size = self.shared.segment_size().ok()?;
        let mut open = self.open.lock();
        let is_loaded = open
            .loaded
            .take()
            .is_some_and(|loaded| loaded.start() <= range.start() && range.end() <= loaded.end());
        let mut all = Vec::new();
        for (name, within) in parts(self.timeline, range, size) {
            let segment = open.segments.iter().find(|segment| segment.name == name)?;
            all.push(if is_loaded { segment.slice(within)? } else { segment.resident(within)? });
        }
        Some(all)
    }
}

impl ColdRead {
    /// Brings the range into memory, and a window behind it; blocks. Then read again.
    pub fn load(self) -> Result<(), ReadError> {
        let Ok(size) = self.shared.segment_size() else {
            let name = SegmentName { timeline: self.timeline, number: SegmentNo(0) };
            return Err(ReadError::Removed(name));
        };
        let mut segments = Vec::new();
        for (name, within) in parts(self.timeline, self.range, size) {
            let segment = self.shared.mappings.open(&self.shared, name)?;
            segment.load(&self.shared, within)?;
            segments.push(segment);
        }
        *self.open.lock() = Open { segments, loaded: Some(self.range) };
        Ok(())
    }
}

/// The parts of a range in each segment.
fn parts(
    timeline: TimelineId,
    range: LsnRange,
    size: SegmentSize,
) -> impl Iterator<Item = (SegmentName, Range<usize>)> {
    let (first, last) = (SegmentNo::holding(range.start(), size), SegmentNo::ending_at(range.end(), size));
    (first.0..=last.0).map(SegmentNo).map(move |number| {
        let start = if number == first { offset(range.start(), size) } else { 0 };
        let whole = usize::try_from(size.bytes()).unwrap_or(usize::MAX);
        let end = if range.end() < number.end(size) { offset(range.end(), size) } else { whole };
        (SegmentName { timeline, number }, start..end)
    })
}
