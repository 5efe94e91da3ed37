//! How far behind in time a standby writes, flushes and replays.
//!
//! Owns the samples (position, time it became sendable here) and one reading position for each of write, flush and replay,
//! as `LagTrackerWrite` and `LagTrackerRead` in walsender.c. Measures this hop only. Has no clock, and knows nothing of
//! what was sent: the sender decides when a lag is cleared.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::wal::Lsn;

/// Which of a standby's positions a lag belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LagKind {
    /// Received and handed to its operating system.
    Write,
    /// Synced by it.
    Flush,
    /// Applied by it.
    Replay,
}

/// The samples of one stream.
#[derive(Debug, Default)]
pub struct LagTracker {
    samples: VecDeque<Sample>,
    /// Samples that left the front of `samples` so far: the absolute number of its first element.
    dropped: u64,
    last_position: Option<Lsn>,
    write: ReadHead,
    flush: ReadHead,
    replay: ReadHead,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    position: Lsn,
    at: Instant,
}

/// How far one of the three positions has read.
#[derive(Debug, Default)]
struct ReadHead {
    /// Absolute number of the next sample to read.
    next: u64,
    /// The next sample to read, when the ring had no room for it any longer.
    overflowed: Option<Sample>,
    /// The sample read last, unless everything was read: what came before an idle time says nothing about now.
    last_read: Option<Sample>,
}

impl LagTracker {
    /// WAL up to `position` became sendable. Counts only when it is further than before.
    pub fn note_sendable(&mut self, position: Lsn, now: Instant) {
        if self.last_position.is_some_and(|last| position <= last) {
            return;
        }
        self.last_position = Some(position);
        self.forget_what_all_have_read();
        if self.samples.len() >= LAG_SAMPLES_MAX {
            self.park_the_slowest();
        }
        self.samples.push_back(Sample { position, at: now });
    }

    /// The lag that a report of `position` shows, or `None` when it says nothing new.
    pub fn read(&mut self, kind: LagKind, position: Lsn, now: Instant) -> Option<Duration> {
        let head = match kind {
            LagKind::Write => &mut self.write,
            LagKind::Flush => &mut self.flush,
            LagKind::Replay => &mut self.replay,
        };
        let mut crossed = None;
        while let Some(sample) =
            head.peek(&self.samples, self.dropped).filter(|sample| sample.position <= position)
        {
            head.consume();
            head.last_read = Some(sample);
            crossed = Some(sample.at);
        }
        let future = head.peek(&self.samples, self.dropped);
        let reached = match (crossed, future, head.last_read) {
            (Some(at), _, _) => Some(at),
            // Nothing was crossed, so estimate when this position became sendable.
            (None, Some(next), Some(last)) => interpolate(last, next, position),
            // Idle before, and the first of the new WAL is not there yet: the lag if it were reported now.
            (None, Some(next), None) => Some(next.at),
            (None, None, _) => None,
        };
        if future.is_none() {
            head.last_read = None;
        }
        reached.map(|at| now.saturating_duration_since(at))
    }

    fn forget_what_all_have_read(&mut self) {
        let slowest = self.heads().into_iter().map(|head| head.next).min().unwrap_or(self.dropped);
        while self.dropped < slowest && self.samples.pop_front().is_some() {
            self.dropped += 1;
        }
    }

    /// Makes room for one sample: a reading position that still needs the oldest keeps it in a cell of its own.
    fn park_the_slowest(&mut self) {
        let Some(oldest) = self.samples.pop_front() else { return };
        let number = self.dropped;
        self.dropped += 1;
        for head in [&mut self.write, &mut self.flush, &mut self.replay] {
            if head.next == number {
                head.overflowed.get_or_insert(oldest);
                head.next = number + 1;
            }
        }
    }

    fn heads(&self) -> [&ReadHead; 3] {
        [&self.write, &self.flush, &self.replay]
    }
}

impl ReadHead {
    fn peek(&self, samples: &VecDeque<Sample>, dropped: u64) -> Option<Sample> {
        self.overflowed.or_else(|| {
            let index = usize::try_from(self.next.checked_sub(dropped)?).ok()?;
            samples.get(index).copied()
        })
    }

    fn consume(&mut self) {
        if self.overflowed.take().is_none() {
            self.next += 1;
        }
    }
}

/// When `position`, between two samples, became sendable, if WAL was produced evenly between them. `None` for a
/// position before the first: a report went backwards.
fn interpolate(last: Sample, next: Sample, position: Lsn) -> Option<Instant> {
    if position < last.position || next.at < last.at {
        return None;
    }
    let whole = next.position.bytes_since(last.position);
    let part = position.bytes_since(last.position).min(whole);
    let nanos = u128::from(part) * next.at.duration_since(last.at).as_nanos() / u128::from(whole.max(1));
    Some(last.at + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
}

/// Samples kept for one stream (`LAG_TRACKER_BUFFER_SIZE`).
pub const LAG_SAMPLES_MAX: usize = 8192;

#[cfg(test)]
mod tests {
    use super::*;

    fn at(raw: u64) -> Lsn {
        Lsn::new(raw).unwrap()
    }

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn a_crossed_sample_gives_the_time_since_it_became_sendable() {
        let zero = Instant::now();
        let mut lag = LagTracker::default();
        lag.note_sendable(at(100), zero);
        lag.note_sendable(at(200), zero + ms(10));
        assert_eq!(lag.read(LagKind::Write, at(200), zero + ms(25)), Some(ms(15)));
        assert_eq!(lag.read(LagKind::Flush, at(100), zero + ms(30)), Some(ms(30)), "each reads for itself");
    }

    #[test]
    fn between_two_samples_the_time_is_interpolated() {
        let zero = Instant::now();
        let mut lag = LagTracker::default();
        lag.note_sendable(at(100), zero);
        lag.note_sendable(at(200), zero + ms(100));
        assert_eq!(lag.read(LagKind::Replay, at(100), zero + ms(110)), Some(ms(110)));
        assert_eq!(lag.read(LagKind::Replay, at(150), zero + ms(120)), Some(ms(70)));
    }

    #[test]
    fn a_stuck_replay_shows_a_growing_lag() {
        let zero = Instant::now();
        let mut lag = LagTracker::default();
        lag.note_sendable(at(100), zero);
        assert_eq!(lag.read(LagKind::Replay, at(100), zero + ms(1)), Some(ms(1)));
        lag.note_sendable(at(200), zero + ms(1_000));
        assert_eq!(lag.read(LagKind::Replay, at(100), zero + ms(2_000)), Some(ms(1_000)));
        assert_eq!(lag.read(LagKind::Replay, at(100), zero + ms(3_000)), Some(ms(2_000)));
    }

    #[test]
    fn an_idle_standby_says_nothing_new() {
        let zero = Instant::now();
        let mut lag = LagTracker::default();
        lag.note_sendable(at(100), zero);
        assert!(lag.read(LagKind::Write, at(100), zero + ms(1)).is_some());
        assert_eq!(lag.read(LagKind::Write, at(100), zero + ms(9_000)), None);
        lag.note_sendable(at(100), zero + ms(9_500));
        assert_eq!(lag.read(LagKind::Write, at(100), zero + ms(9_900)), None, "no WAL, no sample");
    }

    #[test]
    fn a_report_that_goes_backwards_says_nothing() {
        let zero = Instant::now();
        let mut lag = LagTracker::default();
        lag.note_sendable(at(100), zero);
        lag.note_sendable(at(200), zero + ms(10));
        assert!(lag.read(LagKind::Write, at(100), zero + ms(20)).is_some());
        assert_eq!(lag.read(LagKind::Write, at(50), zero + ms(30)), None);
    }

    #[test]
    fn when_the_ring_is_full_the_slowest_keeps_its_oldest_sample() {
        let zero = Instant::now();
        let mut lag = LagTracker::default();
        let count = LAG_SAMPLES_MAX as u64 + 5_000;
        for number in 1..=count {
            lag.note_sendable(at(number * 8), zero + ms(number));
            lag.read(LagKind::Write, at(number * 8), zero + ms(number));
        }
        assert_eq!(lag.samples.len(), LAG_SAMPLES_MAX);
        let now = zero + ms(count + 10);
        assert_eq!(lag.read(LagKind::Flush, at(8), now), Some(ms(count + 9)), "the parked sample");
        assert_eq!(lag.read(LagKind::Flush, at(count * 8), now), Some(ms(10)));
        assert_eq!(lag.read(LagKind::Replay, at(16), now).map(|lag| lag > ms(count)), Some(true));
    }

    #[test]
    fn samples_that_all_have_read_are_forgotten() {
        let zero = Instant::now();
        let mut lag = LagTracker::default();
        for number in 1..=20_000_u64 {
            lag.note_sendable(at(number * 8), zero);
            for kind in [LagKind::Write, LagKind::Flush, LagKind::Replay] {
                lag.read(kind, at(number * 8), zero);
            }
        }
        assert!(lag.samples.len() <= 1);
    }
}
