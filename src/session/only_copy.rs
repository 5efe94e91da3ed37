//! WAL that was acknowledged upstream and that no standby has flushed: if this relay is lost now, so is that.
//!
//! Owns the two ends of it, and since when it has been so, by samples of when the acknowledged position moved. Has no clock and
//! asks nobody. It is an alarm, and no policy: nothing that is acknowledged depends on it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::wal::{Lsn, TimelineId};

/// What exists only here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OnlyCopy {
    /// How much.
    pub bytes: u64,
    /// How long the oldest of it has been acknowledged; zero when there is none.
    pub age: Duration,
}

/// The memory of what was acknowledged when, as far as it is only here.
#[derive(Debug)]
pub struct OnlyCopyTracker {
    timeline: Option<TimelineId>,
    /// The most that any standby of this relay has flushed.
    elsewhere: Option<Lsn>,
    /// Positions as they were acknowledged, none of them elsewhere, oldest first.
    samples: VecDeque<(Lsn, Instant)>,
    /// Two samples are at least so far apart.
    spacing: Duration,
}

impl Default for OnlyCopyTracker {
    fn default() -> Self {
        Self { timeline: None, elsewhere: None, samples: VecDeque::new(), spacing: SPACING_MIN }
    }
}

/// What is known at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// The timeline of the positions.
    pub timeline: TimelineId,
    /// Where the timeline was begun, if it left another one.
    pub begun: Option<Lsn>,
    /// Acknowledged upstream as flushed.
    pub acknowledged: Lsn,
    /// Start of what is held.
    pub oldest: Lsn,
    /// The most that a standby says it has flushed.
    pub flushed: Option<Lsn>,
}

impl OnlyCopyTracker {
    /// Takes in what is so `now`.
    pub fn update(&mut self, now: Instant, held: Held) -> OnlyCopy {
        if self.timeline != Some(held.timeline) {
            // Of what standbys had, only what came before the fork is on this timeline.
            self.elsewhere = self.elsewhere.and_then(|had| held.begun.map(|begun| had.min(begun)));
            self.samples.retain(|(position, _)| held.begun.is_some_and(|begun| *position <= begun));
            self.timeline = Some(held.timeline);
        }
        if self.samples.is_empty() {
            self.spacing = SPACING_MIN;
        }
        self.elsewhere = self.elsewhere.max(held.flushed);
        let from = self.elsewhere.unwrap_or(held.oldest).max(held.oldest);
        while self.samples.front().is_some_and(|(position, _)| *position <= from) {
            self.samples.pop_front();
        }
        if held.acknowledged > from && self.samples.back().is_none_or(|(last, _)| *last < held.acknowledged) {
            self.add(held.acknowledged, now);
        }
        let oldest = self.samples.front().map(|(_, at)| now.saturating_duration_since(*at));
        OnlyCopy { bytes: held.acknowledged.bytes_since(from), age: oldest.unwrap_or_default() }
    }

    fn add(&mut self, position: Lsn, now: Instant) {
        if let Some((last, at)) = self.samples.back_mut()
            && now.saturating_duration_since(*at) < self.spacing
        {
            // It is taken to be as old as what came shortly before.
            *last = position;
            return;
        }
        self.samples.push_back((position, now));
        if self.samples.len() > SAMPLES_MAX {
            self.spacing *= 2;
            let mut merged = VecDeque::with_capacity(SAMPLES_MAX);
            while let Some((first, at)) = self.samples.pop_front() {
                let second = self.samples.pop_front().map(|(second, _)| second);
                merged.push_back((second.unwrap_or(first), at));
            }
            self.samples = merged;
        }
    }
}

/// Most samples remembered; then their distance is doubled.
const SAMPLES_MAX: usize = 1024;

/// Their distance at first.
const SPACING_MIN: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    fn lsn(position: u64) -> Lsn {
        Lsn::new(position).unwrap()
    }

    fn held(acknowledged: u64, flushed: Option<u64>) -> Held {
        let flushed = flushed.map(lsn);
        let timeline = TimelineId::FIRST;
        Held { timeline, begun: None, acknowledged: lsn(acknowledged), oldest: lsn(100), flushed }
    }

    #[test]
    fn it_is_as_old_as_the_oldest_acknowledgement_that_nobody_else_has() {
        let (start, mut tracker) = (Instant::now(), OnlyCopyTracker::default());
        let mut at = |seconds, held| {
            let told = tracker.update(start + Duration::from_secs(seconds), held);
            (told.bytes, told.age.as_secs())
        };
        assert_eq!(at(0, held(100, None)), (0, 0), "nothing is held");
        assert_eq!(at(1, held(150, None)), (50, 0), "there is no standby");
        assert_eq!(at(5, held(150, Some(150))), (0, 0));
        assert_eq!(at(6, held(200, Some(150))), (50, 0));
        assert_eq!(at(9, held(300, Some(150))), (150, 3));
        assert_eq!(at(10, held(300, Some(200))), (100, 1), "what was acknowledged first is there");
        assert_eq!(at(20, held(300, None)), (100, 11), "who had it was there");
        assert_eq!(at(30, held(300, Some(400))), (0, 0));
    }

    #[test]
    fn a_fork_takes_back_what_standbys_had_beyond_it() {
        let (start, mut tracker) = (Instant::now(), OnlyCopyTracker::default());
        assert_eq!(tracker.update(start, held(500, Some(500))).bytes, 0);
        let next = TimelineId::new(2).unwrap();
        let forked = Held { timeline: next, begun: Some(lsn(400)), ..held(450, None) };
        assert_eq!(tracker.update(start, forked).bytes, 50);
    }

    #[test]
    fn memory_is_bounded_and_no_age_too_small() {
        let (start, mut tracker) = (Instant::now(), OnlyCopyTracker::default());
        for second in 0..20_000 {
            let now = start + Duration::from_secs(second);
            let told = tracker.update(now, held(101 + second, None));
            assert_eq!((told.bytes, told.age.as_secs()), (1 + second, second));
            assert!(tracker.samples.len() <= SAMPLES_MAX);
        }
        let told = tracker.update(start + Duration::from_secs(20_000), held(20_100, Some(10_101)));
        assert!((9_999..10_100).contains(&told.age.as_secs()), "{told:?}");
    }
}
