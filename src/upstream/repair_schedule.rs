//! Which damaged segment is fetched next, and when.
//!
//! Owns the delays: what failed is tried again later and later, what was repaired and is damaged again waits too (a disk that
//! fails would have it fetched for ever), and what the upstream has removed is asked for rarely. The newest comes first:
//! if that was removed, all older ones were. Has no clock of its own.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::upstream::backoff::Backoff;
use crate::upstream::error::Advice;
use crate::wal::SegmentName;

/// What was tried, and when it may be tried again.
#[derive(Default)]
pub(super) struct Schedule {
    segments: BTreeMap<SegmentName, Delayed>,
    /// For all.
    all: Option<Delayed>,
}

struct Delayed {
    backoff: Backoff,
    until: Instant,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Fetch this one.
    Now(SegmentName),
    /// Wait; something is due then.
    At(Instant),
    /// Nothing is damaged.
    Nothing,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The segment is whole.
    Repaired,
    /// The upstream has not got it any more.
    Removed,
    /// What came was not it.
    SegmentFailed,
    /// What would have kept any other one away, too.
    Failed,
}

impl Schedule {
    /// What is to be done about the damaged segments, which come oldest first.
    pub(super) fn next(&mut self, now: Instant, damaged: &[SegmentName]) -> Next {
        self.segments.retain(|name, delayed| damaged.contains(name) || now < delayed.until + RETRY_DELAY_MAX);
        let all = self.all.as_ref().map_or(now, |delayed| delayed.until);
        let due = |name: &SegmentName| self.segments.get(name).map_or(now, |delayed| delayed.until).max(all);
        let Some((due, name)) =
            damaged.iter().rev().map(|name| (due(name), *name)).min_by_key(|(due, _)| *due)
        else {
            return Next::Nothing;
        };
        if due <= now { Next::Now(name) } else { Next::At(due) }
    }

    /// An attempt at `name` has ended. `random` spreads what comes next.
    pub(super) fn note(&mut self, now: Instant, name: SegmentName, outcome: Outcome, random: u64) {
        let fresh = || Delayed { backoff: Backoff::new(RETRY_DELAY_MAX), until: now };
        if outcome == Outcome::Failed {
            let all = self.all.get_or_insert_with(fresh);
            all.until = now + all.backoff.next_delay(Advice::RetryLater, random);
            return;
        }
        self.all = None;
        let delayed = self.segments.entry(name).or_insert_with(fresh);
        delayed.until = now
            + match outcome {
                Outcome::Removed => REMOVED_RETRY_INTERVAL,
                _ => delayed.backoff.next_delay(Advice::RetryLater, random),
            };
    }

    /// The upstream has not got `name` any more: it has none of the older ones either.
    pub(super) fn note_removed(&mut self, now: Instant, name: SegmentName, damaged: &[SegmentName]) {
        let is_older = |other: &&SegmentName| other.timeline == name.timeline && other.number <= name.number;
        for older in damaged.iter().filter(is_older) {
            self.note(now, *older, Outcome::Removed, 0);
        }
    }
}

/// Longest delay between two attempts at a segment.
const RETRY_DELAY_MAX: Duration = Duration::from_secs(300);

/// How often in one session the upstream is asked again for what it has removed.
const REMOVED_RETRY_INTERVAL: Duration = Duration::from_secs(1800);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::{SegmentNo, TimelineId};

    fn name(number: u64) -> SegmentName {
        SegmentName { timeline: TimelineId::FIRST, number: SegmentNo(number) }
    }

    /// Attempts within a time, if all end in the same way.
    fn attempts(outcome: Outcome, damaged: &[SegmentName], time: Duration) -> usize {
        let (start, mut schedule) = (Instant::now(), Schedule::default());
        let (mut now, mut count) = (start, 0);
        while now < start + time {
            match schedule.next(now, damaged) {
                Next::Now(name) => {
                    count += 1;
                    match outcome {
                        Outcome::Removed => schedule.note_removed(now, name, damaged),
                        _ => schedule.note(now, name, outcome, 500),
                    }
                }
                Next::At(then) => now = then,
                Next::Nothing => break,
            }
        }
        count
    }

    #[test]
    fn each_is_fetched_at_once_and_the_newest_first() {
        let (now, mut schedule) = (Instant::now(), Schedule::default());
        let mut damaged = vec![name(1), name(2), name(7)];
        for expected in [7, 2, 1] {
            assert_eq!(schedule.next(now, &damaged), Next::Now(name(expected)));
            schedule.note(now, name(expected), Outcome::Repaired, 0);
            damaged.pop();
        }
        assert_eq!(schedule.next(now, &damaged), Next::Nothing);
    }

    #[test]
    fn what_is_damaged_again_or_cannot_be_fetched_is_tried_ever_more_rarely() {
        let day = Duration::from_secs(86_400);
        for outcome in [Outcome::Repaired, Outcome::SegmentFailed, Outcome::Failed] {
            let count = attempts(outcome, &[name(1)], day);
            assert!((280..700).contains(&count), "{outcome:?}: {count}");
        }
        let all = attempts(Outcome::Failed, &[name(1), name(2), name(3)], day);
        assert!(all < 700, "what concerns all is not tried with each: {all}");
    }

    #[test]
    fn what_was_removed_is_asked_for_rarely_and_once_for_all_that_are_older() {
        let damaged: Vec<_> = (1..1000).map(name).collect();
        assert_eq!(attempts(Outcome::Removed, &damaged, REMOVED_RETRY_INTERVAL), 1);
        assert_eq!(attempts(Outcome::Removed, &damaged, REMOVED_RETRY_INTERVAL * 5), 5);
    }
}
