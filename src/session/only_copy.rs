//! WAL that was acknowledged upstream and that no standby has flushed: if this relay is lost now, so is that.
//!
//! Owns the two ends of it, and since when it has been so, by samples of when the acknowledged position moved; of what an earlier
//! process acknowledged it knows no more than when that began. Has no clock and asks nobody.

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
    /// What was here when the process began, and was not elsewhere.
    left: Option<Left>,
    /// Positions as they were acknowledged, none of them elsewhere, oldest first.
    samples: VecDeque<(Lsn, Instant)>,
    /// Two samples are at least so far apart.
    spacing: Duration,
}

impl Default for OnlyCopyTracker {
    fn default() -> Self {
        Self { timeline: None, elsewhere: None, left: None, samples: VecDeque::new(), spacing: SPACING_MIN }
    }
}

/// WAL that was acknowledged by an earlier process, as far as `position`; the oldest of it was so old at a moment.
#[derive(Clone, Copy, Debug)]
struct Left {
    position: Lsn,
    age: Duration,
    at: Instant,
}

/// What an earlier process knew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recalled {
    /// The timeline of the positions.
    pub timeline: TimelineId,
    /// The most that any standby had flushed.
    pub elsewhere: Option<Lsn>,
    /// End of what is held: no more was acknowledged.
    pub end: Lsn,
    /// How long ago the first of what is beyond `elsewhere` was acknowledged, or longer than that.
    pub age: Duration,
}

/// What is to be known after a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// The most that any standby has flushed.
    pub elsewhere: Option<Lsn>,
    /// How long ago the first of what is beyond was acknowledged; `None`: there is nothing beyond.
    pub age: Option<Duration>,
}

/// What is known at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// The timeline of the positions.
    pub timeline: TimelineId,
    /// Where the timeline of the last update was left, if it was.
    pub left: Option<Lsn>,
    /// Acknowledged upstream as flushed.
    pub acknowledged: Lsn,
    /// Start of what is held.
    pub oldest: Lsn,
    /// The most that a standby says it has flushed.
    pub flushed: Option<Lsn>,
}

impl OnlyCopyTracker {
    /// Goes on from what an earlier process knew.
    pub fn recall(&mut self, now: Instant, recalled: Recalled) {
        let Recalled { timeline, elsewhere, end, age } = recalled;
        let left = Left { position: end, age, at: now };
        (self.timeline, self.elsewhere) = (Some(timeline), elsewhere);
        self.left = Some(left).filter(|left| elsewhere.is_none_or(|had| had < left.position));
    }

    /// Takes in what is so `now`.
    pub fn update(&mut self, now: Instant, held: Held) -> OnlyCopy {
        if self.timeline != Some(held.timeline) {
            self.go_over(held.left);
            self.timeline = Some(held.timeline);
        }
        self.elsewhere = self.elsewhere.max(held.flushed);
        let from = self.elsewhere.unwrap_or(held.oldest).max(held.oldest);
        self.left = self.left.filter(|left| left.position > from);
        while self.samples.front().is_some_and(|(position, _)| *position <= from) {
            self.samples.pop_front();
        }
        if self.samples.is_empty() {
            self.spacing = SPACING_MIN;
        }
        if held.acknowledged > from && self.samples.back().is_none_or(|(last, _)| *last < held.acknowledged) {
            self.add(held.acknowledged, now);
        }
        let bytes = held.acknowledged.bytes_since(from);
        let age = self.age(now).filter(|_| bytes > 0);
        OnlyCopy { bytes, age: age.unwrap_or_default() }
    }

    /// The timeline was left at `fork`, as far as that is known. What lies beyond is neither here nor elsewhere any more; what
    /// is before it is as old as it was.
    fn go_over(&mut self, fork: Option<Lsn>) {
        let Some(fork) = fork else {
            (self.elsewhere, self.left) = (None, None);
            self.samples.clear();
            return;
        };
        self.elsewhere = self.elsewhere.map(|had| had.min(fork));
        self.left = self.left.map(|left| Left { position: left.position.min(fork), ..left });
        let beyond = self.samples.iter().position(|(position, _)| *position > fork);
        if let Some(first) = beyond {
            self.samples.truncate(first + 1);
            if let Some((position, _)) = self.samples.back_mut() {
                *position = fork;
            }
        }
    }

    /// What a later process is to know.
    pub fn known(&self, now: Instant) -> Known {
        Known { elsewhere: self.elsewhere, age: self.age(now) }
    }

    /// The most that any standby has flushed.
    pub fn elsewhere(&self) -> Option<Lsn> {
        self.elsewhere
    }

    /// The timeline of the last update.
    pub fn timeline(&self) -> Option<TimelineId> {
        self.timeline
    }

    /// How long the oldest has been acknowledged.
    fn age(&self, now: Instant) -> Option<Duration> {
        let left = self.left.map(|left| left.age.saturating_add(now.saturating_duration_since(left.at)));
        left.or_else(|| self.samples.front().map(|(_, at)| now.saturating_duration_since(*at)))
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
        Held { timeline, left: None, acknowledged: lsn(acknowledged), oldest: lsn(100), flushed }
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
        let forked = Held { timeline: next, left: Some(lsn(400)), ..held(450, None) };
        assert_eq!(tracker.update(start, forked).bytes, 50);
    }

    #[test]
    fn what_is_before_a_fork_is_as_old_as_it_was() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let next = TimelineId::new(2).unwrap();
        for (fork, rest) in [(250, 0), (350, 20), (450, 20)] {
            let mut tracker = OnlyCopyTracker::default();
            for (seconds, acknowledged) in [(0, 300), (10, 400), (20, 500)] {
                tracker.update(at(seconds), held(acknowledged, None));
            }
            let forked = Held { timeline: next, left: Some(lsn(fork)), ..held(fork, None) };
            assert_eq!(tracker.update(at(30), forked).age.as_secs(), 30, "left at {fork}");
            // What was acknowledged first is at a standby.
            let forked = Held { flushed: Some(lsn(fork.min(300))), ..forked };
            assert_eq!(tracker.update(at(30), forked).age.as_secs(), rest, "left at {fork}");
        }
    }

    #[test]
    fn what_an_earlier_process_acknowledged_keeps_its_age_until_a_standby_has_all_that_was_held() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let age = Duration::from_secs(100);
        let recalled =
            Recalled { timeline: TimelineId::FIRST, elsewhere: Some(lsn(200)), end: lsn(300), age };
        let mut tracker = OnlyCopyTracker::default();
        tracker.recall(start, recalled);
        assert_eq!(tracker.known(at(1)), Known { elsewhere: Some(lsn(200)), age: Some(at(101) - start) });
        let told = tracker.update(at(5), held(300, None));
        assert_eq!((told.bytes, told.age.as_secs()), (100, 105));
        let told = tracker.update(at(10), held(400, Some(299)));
        assert_eq!((told.bytes, told.age.as_secs()), (101, 110));
        let told = tracker.update(at(12), held(400, Some(300)));
        assert_eq!((told.bytes, told.age.as_secs()), (100, 2), "it was acknowledged by this process");
        // Nothing was only here.
        let mut tracker = OnlyCopyTracker::default();
        tracker.recall(start, Recalled { elsewhere: Some(lsn(300)), ..recalled });
        let told = tracker.update(at(5), held(300, None));
        assert_eq!((told.bytes, told.age.as_secs()), (0, 0), "who had it was there");
        assert_eq!(tracker.known(at(5)), Known { elsewhere: Some(lsn(300)), age: None });
        // The timeline was left before the end.
        let mut tracker = OnlyCopyTracker::default();
        tracker.recall(start, recalled);
        let next = TimelineId::new(2).unwrap();
        let forked = Held { timeline: next, left: Some(lsn(250)), ..held(250, Some(249)) };
        assert_eq!(tracker.update(at(5), forked).age.as_secs(), 105);
        assert_eq!(tracker.update(at(5), Held { flushed: Some(lsn(250)), ..forked }).age.as_secs(), 0);
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
