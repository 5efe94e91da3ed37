//! What is here: the complete segments, and from where WAL must stay.
//!
//! Owns the list in memory; the files and the index are the truth on disk. Segments leave it before their files do.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::wal::lineage::LineagePart;
use crate::wal::{Lineage, Lsn, SegmentName, SegmentNo, SegmentSize};

/// A complete segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CompleteSegment {
    /// CRC-32 of the file; `None` if nobody knows any more what it was.
    pub crc: Option<u32>,
    /// What is wrong with the file, if something is.
    pub damage: Option<Damage>,
}

/// What is wrong with the file of a complete segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Damage {
    pub kind: DamageKind,
    pub detail: String,
    /// Why it could not be replaced yet.
    pub repair_error: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DamageKind {
    /// The disk did not give it back. It may the next time: it is still read.
    Unreadable,
    /// It is not what was written, or not there. It is never served.
    Wrong,
}

impl CompleteSegment {
    /// One of which nothing bad is known.
    pub(super) fn sound(crc: u32) -> Self {
        Self { crc: Some(crc), damage: None }
    }

    /// One that is not what was written.
    pub(super) fn wrong(crc: Option<u32>, detail: String) -> Self {
        let damage = Damage { kind: DamageKind::Wrong, detail, repair_error: None };
        Self { crc, damage: Some(damage) }
    }

    /// Why it is not served, if it is not.
    pub(super) fn refusal(&self) -> Option<&str> {
        let damage = self.damage.as_ref().filter(|damage| damage.kind == DamageKind::Wrong);
        damage.map(|damage| damage.detail.as_str())
    }
}

#[derive(Default)]
pub(super) struct Catalog {
    complete: BTreeMap<SegmentName, CompleteSegment>,
    /// For the end of each segment not yet sealed: the record that crosses it or ends there.
    crossing: BTreeMap<SegmentNo, Lsn>,
    /// That of the newest complete segment: recovery begins to verify there, so WAL stays from there on.
    anchor: Option<Lsn>,
}

impl Catalog {
    pub(super) fn new(complete: BTreeMap<SegmentName, CompleteSegment>, anchor: Option<Lsn>) -> Self {
        Self { complete, crossing: BTreeMap::new(), anchor }
    }

    /// Whether there is no complete segment, on whatever timeline.
    pub(super) fn is_empty(&self) -> bool {
        self.complete.is_empty()
    }

    /// How many complete segments there are, on whatever timeline.
    pub(super) fn count(&self) -> usize {
        self.complete.len()
    }

    pub(super) fn get(&self, name: SegmentName) -> Option<&CompleteSegment> {
        self.complete.get(&name)
    }

    /// The segment that comes after `name`, or the first of all; by timeline and number.
    pub(super) fn after(&self, name: Option<SegmentName>) -> Option<SegmentName> {
        let after = name.map_or(Bound::Unbounded, Bound::Excluded);
        self.complete.range((after, Bound::Unbounded)).next().map(|(name, _)| *name)
    }

    pub(super) fn mark_damaged(&mut self, name: SegmentName, kind: DamageKind, detail: &str) {
        let Some(segment) = self.complete.get_mut(&name) else { return };
        let before = segment.damage.take();
        segment.damage = match before {
            Some(before) if before.kind == DamageKind::Wrong && kind == DamageKind::Unreadable => {
                Some(before)
            }
            before => {
                let repair_error = before.and_then(|before| before.repair_error);
                Some(Damage { kind, detail: detail.to_owned(), repair_error })
            }
        };
    }

    /// The file of a segment was read, and is what was written.
    pub(super) fn mark_sound(&mut self, name: SegmentName) {
        if let Some(segment) = self.complete.get_mut(&name) {
            segment.damage = None;
        }
    }

    /// What is known to be damaged, oldest first.
    pub(super) fn damaged(&self) -> impl DoubleEndedIterator<Item = (SegmentName, &Damage)> {
        self.complete.iter().filter_map(|(name, segment)| Some((*name, segment.damage.as_ref()?)))
    }

    /// Remembers why a segment could not be repaired; whether that is news.
    pub(super) fn note_repair_error(&mut self, name: SegmentName, error: &str) -> bool {
        let damage = self.complete.get_mut(&name).and_then(|segment| segment.damage.as_mut());
        let Some(damage) = damage.filter(|damage| damage.repair_error.as_deref() != Some(error)) else {
            return false;
        };
        damage.repair_error = Some(error.to_owned());
        true
    }

    /// The record that crosses the end of segment `number`, or ends there, starts at `start`.
    pub(super) fn note_crossing(&mut self, number: SegmentNo, start: Lsn) {
        self.crossing.insert(number, start);
    }

    pub(super) fn sealed(&mut self, name: SegmentName, crc: u32) {
        self.complete.insert(name, CompleteSegment::sound(crc));
        self.anchor = self.crossing.get(&name.number).copied().or(self.anchor);
        self.crossing.retain(|number, _| *number > name.number);
    }

    pub(super) fn remove(&mut self, name: SegmentName) -> Option<CompleteSegment> {
        self.complete.remove(&name)
    }

    pub(super) fn put_back(&mut self, name: SegmentName, segment: CompleteSegment) {
        self.complete.insert(name, segment);
    }

    /// The oldest complete segment on the line.
    pub(super) fn oldest(&self, lineage: &Lineage) -> Option<SegmentName> {
        self.on(lineage).next()
    }

    /// The oldest complete segment on the line, if nothing in it is needed any more from `horizon` on.
    pub(super) fn removable(
        &self,
        lineage: &Lineage,
        horizon: Lsn,
        size: SegmentSize,
    ) -> Option<SegmentName> {
        let newest = self.on(lineage).next_back()?;
        let horizon = self.anchor.map_or(horizon, |anchor| anchor.min(horizon));
        let oldest = self.oldest(lineage)?;
        (oldest.number < newest.number && oldest.number.end(size) <= horizon).then_some(oldest)
    }

    /// Segments from `first` on are not there any more, whatever their timeline; the proof of what is left begins at `anchor`,
    /// if that has changed.
    pub(super) fn cut(&mut self, first: SegmentNo, anchor: Option<Lsn>) {
        self.complete.retain(|name, _| name.number < first);
        self.crossing.retain(|number, _| *number < first);
        self.anchor = anchor.or(self.anchor);
    }

    pub(super) fn index_entries(&self) -> BTreeMap<SegmentName, u32> {
        self.complete.iter().filter_map(|(name, segment)| Some((*name, segment.crc?))).collect()
    }

    /// In the order of the log.
    fn on(&self, lineage: &Lineage) -> impl DoubleEndedIterator<Item = SegmentName> + '_ {
        let parts: Vec<_> = lineage.parts().collect();
        parts.into_iter().flat_map(|LineagePart { timeline, first, end }| {
            let name = |number| SegmentName { timeline, number };
            let last = end.and_then(SegmentNo::previous).unwrap_or(SegmentNo(u64::MAX));
            self.complete.range(name(first)..=name(last)).map(|(name, _)| *name)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::TimelineId;

    fn name(number: u64) -> SegmentName {
        SegmentName { timeline: TimelineId::FIRST, number: SegmentNo(number) }
    }

    #[test]
    fn wal_stays_from_the_record_that_crosses_the_newest_complete_segment() {
        let size = SegmentSize::new(1 << 20).unwrap();
        let lineage = Lineage::new(TimelineId::FIRST, Vec::new(), size);
        let mut catalog = Catalog::default();
        let far = Lsn::new(100 << 20).unwrap();
        for number in 1..=4 {
            // One record from within segment 2 to within segment 5.
            let start = if number == 1 { (2 << 20) - 100 } else { (2 << 20) + 100 };
            catalog.note_crossing(SegmentNo(number), Lsn::new(start).unwrap());
            catalog.sealed(name(number), 0);
        }
        assert_eq!(catalog.removable(&lineage, far, size), Some(name(1)));
        catalog.remove(name(1));
        assert_eq!(catalog.removable(&lineage, far, size), None);
        catalog.note_crossing(SegmentNo(5), Lsn::new((6 << 20) - 8).unwrap());
        catalog.sealed(name(5), 0);
        assert_eq!(catalog.removable(&lineage, far, size), Some(name(2)));
        let horizon = Lsn::new((3 << 20) - 1).unwrap();
        assert_eq!(catalog.removable(&lineage, horizon, size), None);
    }
}
