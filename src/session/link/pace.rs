//! How fast links may send: a bucket of bytes that fills at a rate, one for each link and one for all of them.
//!
//! A message is sent whole as soon as there is anything in the bucket, and may leave it in debt. What is live may go into
//! debt a little further than what catches up, so that a backlog on one link does not make the newest WAL of another wait.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

/// How urgent a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// The newest WAL.
    Live,
    /// What was missed.
    CatchUp,
}

/// A bucket of bytes that may be sent.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// Bytes in a second; `None`: there is no limit.
    rate: Option<NonZeroU64>,
    /// What may be sent now, in billionths of a byte; negative: what was sent too early.
    balance: i128,
    at: Instant,
}

impl Bucket {
    /// A bucket that is full.
    pub fn new(rate: Option<NonZeroU64>, now: Instant) -> Self {
        let balance = rate.map_or(0, |rate| burst(rate) * BILLION);
        Self { rate, balance, at: now }
    }

    /// Changes the rate from now on.
    pub fn set_rate(&mut self, rate: Option<NonZeroU64>, now: Instant) {
        if rate != self.rate {
            *self = Self::new(rate, now);
        }
    }

    /// The rate.
    pub fn rate(&self) -> Option<NonZeroU64> {
        self.rate
    }

    /// Whether a message may be sent now; else when to ask again.
    pub fn check(&mut self, urgency: Urgency, now: Instant) -> Result<(), Instant> {
        let Some(rate) = self.rate else { return Ok(()) };
        self.fill(now);
        let least = match urgency {
            Urgency::Live => -credit(rate) * BILLION,
            Urgency::CatchUp => 0,
        };
        let missing = least - self.balance;
        if missing < 0 {
            return Ok(());
        }
        let nanoseconds = missing / i128::from(rate.get()) + 1;
        Err(now + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX)).min(WAIT_MAX))
    }

    /// So many bytes are sent.
    pub fn spend(&mut self, bytes: u64, now: Instant) {
        if self.rate.is_some() {
            self.fill(now);
            self.balance -= i128::from(bytes) * BILLION;
        }
    }

    fn fill(&mut self, now: Instant) {
        let Some(rate) = self.rate else { return };
        let passed = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        let new = i128::from(rate.get()) * i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX >> 64);
        self.balance = (self.balance + new).min(burst(rate) * BILLION);
    }
}

/// Bytes that may be sent at once after a pause.
fn burst(rate: NonZeroU64) -> i128 {
    i128::from(rate.get()) / BURSTS_PER_SECOND
}

/// Bytes by which live messages may be in debt when another is sent: what may be sent at once, and the longest message of a
/// link that catches up.
fn credit(rate: NonZeroU64) -> i128 {
    burst(rate) + CATCH_UP_MESSAGE_BYTES_MAX
}

const BILLION: i128 = 1_000_000_000;

/// A tenth of a second's worth may be sent at once.
const BURSTS_PER_SECOND: i128 = 10;

/// A standalone frame, or a plain message.
const CATCH_UP_MESSAGE_BYTES_MAX: i128 = 264 << 10;

/// Whoever waits looks again after this time, because the rate may have changed.
const WAIT_MAX: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rate(bytes: u64) -> Option<NonZeroU64> {
        NonZeroU64::new(bytes)
    }

    #[test]
    fn without_a_rate_nothing_waits() {
        let now = Instant::now();
        let mut bucket = Bucket::new(None, now);
        bucket.spend(u64::MAX, now);
        assert_eq!(bucket.check(Urgency::CatchUp, now), Ok(()));
    }

    #[test]
    fn what_is_live_does_not_wait_for_a_backlog() {
        let start = Instant::now();
        let mut bucket = Bucket::new(rate(100_000), start);
        bucket.spend(256 << 10, start);
        let later = bucket.check(Urgency::CatchUp, start).unwrap_err();
        assert!(later > start);
        for number in 0..20 {
            assert_eq!(bucket.check(Urgency::Live, start), Ok(()), "{number}");
            bucket.spend(1_000, start);
        }
        bucket.spend(10_000, start);
        assert!(bucket.check(Urgency::Live, start).is_err(), "but not for ever");
    }

    #[test]
    fn a_rate_that_is_changed_counts_at_once() {
        let start = Instant::now();
        let mut bucket = Bucket::new(rate(1_000), start);
        bucket.spend(1 << 20, start);
        assert!(bucket.check(Urgency::Live, start).is_err());
        bucket.set_rate(rate(1 << 30), start);
        assert_eq!(bucket.check(Urgency::CatchUp, start), Ok(()));
        bucket.spend(1 << 30, start);
        bucket.set_rate(rate(1 << 30), start);
        assert!(bucket.check(Urgency::CatchUp, start).is_err(), "the same rate: nothing is forgotten");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// Whoever sends when, and waits as told: over any stretch of time not more goes out than the rate allows, but for what is
        /// allowed at once; and with a backlog the rate is used.
        #[test]
        fn not_more_than_the_rate_and_no_less(
            bytes_per_second in 1_000_u64..1 << 30,
            messages in prop::collection::vec((1_u64..256 << 10, any::<bool>(), 0_u64..3), 1..200),
        ) {
            let start = Instant::now();
            let mut bucket = Bucket::new(rate(bytes_per_second), start);
            let mut now = start;
            let mut sent: Vec<(Instant, u64)> = Vec::new();
            let mut has_paused = false;
            for (bytes, is_live, pause_ms) in messages {
                has_paused |= pause_ms > 0;
                now += Duration::from_millis(pause_ms);
                let urgency = if is_live { Urgency::Live } else { Urgency::CatchUp };
                while let Err(later) = bucket.check(urgency, now) {
                    prop_assert!(later > now && later <= now + WAIT_MAX);
                    now = later;
                }
                bucket.spend(bytes, now);
                sent.push((now, bytes));
            }
            let least = NonZeroU64::new(bytes_per_second).unwrap();
            let at_once = u64::try_from(burst(least) + credit(least)).unwrap() + (256 << 10);
            for (first, (begin, _)) in sent.iter().enumerate() {
                let mut total = 0;
                for (at, bytes) in &sent[first..] {
                    total += bytes;
                    let seconds = at.duration_since(*begin).as_secs_f64();
                    prop_assert!(total as f64 <= bytes_per_second as f64 * seconds + at_once as f64 + 1.0);
                }
            }
            if !has_paused {
                let total: u64 = sent.iter().map(|(_, bytes)| bytes).sum();
                let seconds = now.duration_since(start).as_secs_f64();
                prop_assert!(bytes_per_second as f64 * seconds <= total as f64 + 1.0, "time was wasted");
            }
        }
    }
}
