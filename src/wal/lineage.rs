//! The line of segments that leads to one timeline.
//!
//! A timeline goes on where its parent was left, in the middle of a segment mostly. Owns the question which timeline's file
//! holds which segment: each segment is there once on the line, and the one in which a timeline was left belongs to the
//! timeline that goes on. Its beginning is a copy of the parent's, so that whoever reads the parent up to its end can read
//! it there, as PostgreSQL does. Knows nothing of files that exist.

use crate::wal::timeline::Ancestor;
use crate::wal::{Lsn, SegmentName, SegmentNo, SegmentSize, TimelineHistory, TimelineId};

/// A timeline with its ancestors, as segments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lineage {
    timeline: TimelineId,
    /// Oldest first.
    ancestors: Vec<Ancestor>,
    size: SegmentSize,
}

/// The segments of one timeline on the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineagePart {
    /// The timeline in the files' names.
    pub timeline: TimelineId,
    /// Its first segment.
    pub first: SegmentNo,
    /// The first segment that is not its own any more; `None` for the last timeline.
    pub end: Option<SegmentNo>,
}

impl Lineage {
    /// The line that leads to `timeline` by way of `ancestors`, oldest first.
    pub fn new(timeline: TimelineId, ancestors: Vec<Ancestor>, size: SegmentSize) -> Self {
        Self { timeline, ancestors, size }
    }

    /// The line of a history.
    pub fn of(history: &TimelineHistory, size: SegmentSize) -> Self {
        Self::new(history.timeline(), history.ancestors().to_vec(), size)
    }

    /// The timeline that it leads to.
    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// All ancestors, oldest first.
    pub fn ancestors(&self) -> &[Ancestor] {
        &self.ancestors
    }

    /// The file that holds the segment.
    pub fn name(&self, number: SegmentNo) -> SegmentName {
        let holds = |ancestor: &&Ancestor| number < SegmentNo::holding(ancestor.switch_lsn, self.size);
        let timeline = self.ancestors.iter().find(holds).map_or(self.timeline, |ancestor| ancestor.timeline);
        SegmentName { timeline, number }
    }

    /// Whether the file is on the line.
    pub fn contains(&self, name: SegmentName) -> bool {
        self.name(name.number) == name
    }

    /// The first segment of which the timeline has a file of its own, or had before its successor's took its place; `None`
    /// for a timeline that is not on the line.
    pub fn first_segment(&self, timeline: TimelineId) -> Option<SegmentNo> {
        self.begin(timeline)
            .map(|begin| begin.map_or(SegmentNo(0), |begin| SegmentNo::holding(begin, self.size)))
    }

    /// Where the timeline began; inside `None` for the oldest, outside for one that is not on the line.
    pub fn begin(&self, timeline: TimelineId) -> Option<Option<Lsn>> {
        let place = self.ancestors.iter().position(|ancestor| ancestor.timeline == timeline);
        let place = place.or_else(|| (timeline == self.timeline).then_some(self.ancestors.len()))?;
        let parent = place.checked_sub(1).and_then(|parent| self.ancestors.get(parent));
        Some(parent.map(|parent| parent.switch_lsn))
    }

    /// Where the timeline was left, and for which; `None` for the last one and those that are not on the line.
    pub fn left(&self, timeline: TimelineId) -> Option<(Lsn, TimelineId)> {
        let place = self.ancestors.iter().position(|ancestor| ancestor.timeline == timeline)?;
        let next = self.ancestors.get(place + 1).map_or(self.timeline, |next| next.timeline);
        self.ancestors.get(place).map(|ancestor| (ancestor.switch_lsn, next))
    }

    /// The timeline on which the byte before `end` was written: what is to be asked for to go on there.
    pub fn timeline_at(&self, end: Lsn) -> TimelineId {
        let holds = |ancestor: &&Ancestor| end < ancestor.switch_lsn;
        self.ancestors.iter().find(holds).map_or(self.timeline, |ancestor| ancestor.timeline)
    }

    /// Whether the place `at` of `timeline` is on the line, not beyond `end`.
    pub fn leads_by(&self, timeline: TimelineId, at: Lsn, end: Lsn) -> bool {
        let limit = match self.left(timeline) {
            Some((left, _)) => Some(left.min(end)),
            None => (self.timeline == timeline).then_some(end),
        };
        limit.is_some_and(|limit| at <= limit)
    }

    /// The line as far as `timeline`, which is on it; itself where it is not.
    #[must_use]
    pub fn up_to(&self, timeline: TimelineId) -> Self {
        let place = self.ancestors.iter().position(|ancestor| ancestor.timeline == timeline);
        let Some(place) = place else { return self.clone() };
        Self::new(timeline, self.ancestors.iter().take(place).copied().collect(), self.size)
    }

    /// The line that leaves this one's timeline at `switch_lsn`, for `next`.
    #[must_use]
    pub fn followed_by(&self, next: TimelineId, switch_lsn: Lsn) -> Self {
        let mut ancestors = self.ancestors.clone();
        ancestors.push(Ancestor { timeline: self.timeline, switch_lsn });
        Self::new(next, ancestors, self.size)
    }

    /// The timelines that have segments on the line, oldest first.
    pub fn parts(&self) -> impl DoubleEndedIterator<Item = LineagePart> + '_ {
        let holding = |lsn| SegmentNo::holding(lsn, self.size);
        let begins = std::iter::once(SegmentNo(0))
            .chain(self.ancestors.iter().map(move |ancestor| holding(ancestor.switch_lsn)));
        let ends = self.ancestors.iter().map(move |ancestor| Some(holding(ancestor.switch_lsn)));
        let timelines = self.ancestors.iter().map(|ancestor| ancestor.timeline);
        let parts: Vec<_> = begins
            .zip(ends.chain([None]))
            .zip(timelines.chain([self.timeline]))
            .map(|((first, end), timeline)| LineagePart { timeline, first, end })
            .filter(|part| part.end.is_none_or(|end| part.first < end))
            .collect();
        parts.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn timeline(raw: u32) -> TimelineId {
        TimelineId::new(raw).unwrap()
    }

    fn lineage(switches: &[(u32, u64)], last: u32) -> Lineage {
        let ancestor = |(raw, lsn): &(u32, u64)| Ancestor {
            timeline: timeline(*raw),
            switch_lsn: Lsn::new(*lsn).unwrap(),
        };
        let size = SegmentSize::new(1 << 20).unwrap();
        Lineage::new(timeline(last), switches.iter().map(ancestor).collect(), size)
    }

    #[test]
    fn the_segment_of_a_switch_belongs_to_the_timeline_that_goes_on() {
        let lineage = lineage(&[(1, (3 << 20) + 5), (3, 6 << 20)], 4);
        let names: Vec<u32> = (0..9).map(|n| lineage.name(SegmentNo(n)).timeline.get()).collect();
        assert_eq!(names, [1, 1, 1, 3, 3, 3, 4, 4, 4]);
        assert_eq!(lineage.first_segment(timeline(1)), Some(SegmentNo(0)));
        assert_eq!(lineage.first_segment(timeline(3)), Some(SegmentNo(3)));
        assert_eq!(lineage.first_segment(timeline(4)), Some(SegmentNo(6)));
        assert_eq!(lineage.first_segment(timeline(2)), None);
        assert_eq!(lineage.left(timeline(1)), Some((Lsn::new((3 << 20) + 5).unwrap(), timeline(3))));
        assert_eq!(lineage.left(timeline(4)), None);
        assert_eq!(lineage.up_to(timeline(3)).followed_by(timeline(4), Lsn::new(6 << 20).unwrap()), lineage);
    }

    #[test]
    fn a_position_at_a_switch_is_the_next_timelines() {
        let lineage = lineage(&[(1, 100), (2, 200)], 3);
        let at = |raw| lineage.timeline_at(Lsn::new(raw).unwrap()).get();
        assert_eq!([at(99), at(100), at(199), at(200), at(1000)], [1, 2, 2, 3, 3]);
    }

    proptest! {
        /// The parts are what the names say, without a hole.
        #[test]
        fn parts_and_names_agree(mut switches in prop::collection::vec(1_u64..12 << 20, 0..5)) {
            switches.sort_unstable();
            let switches: Vec<(u32, u64)> = (1..).zip(switches).collect();
            let last = u32::try_from(switches.len()).unwrap() + 1;
            let lineage = lineage(&switches, last);
            let mut expected = SegmentNo(0);
            for part in lineage.parts() {
                prop_assert_eq!(part.first, expected);
                let end = part.end.unwrap_or(SegmentNo(20));
                for number in (part.first.0..end.0).map(SegmentNo) {
                    prop_assert_eq!(lineage.name(number), SegmentName { timeline: part.timeline, number });
                }
                expected = end;
            }
            prop_assert_eq!(expected, SegmentNo(20));
        }
    }
}
