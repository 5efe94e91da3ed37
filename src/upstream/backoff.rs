//! How long to wait before the next attempt.
//!
//! Owns the delays: they grow from attempt to attempt, have a bound, and are spread so that many relays do not return to a
//! restarted primary in the same instant. Has no clock and no randomness of its own.

use std::time::Duration;

use crate::upstream::error::{Advice, REFUSED_DELAY_MIN};

/// Delays between attempts.
#[derive(Clone, Debug)]
pub(super) struct Backoff {
    attempt: u32,
    delay_max: Duration,
}

impl Backoff {
    /// `delay_max` bounds the delay after ordinary failures (`wal_retrieve_retry_interval`).
    pub(super) fn new(delay_max: Duration) -> Self {
        Self { attempt: 0, delay_max }
    }

    /// Something was achieved: the next failure is the first again.
    pub(super) fn reset(&mut self) {
        self.attempt = 0;
    }

    /// The delay after one more failure. `random` is any number; it spreads the delay over its upper half.
    pub(super) fn next_delay(&mut self, advice: Advice, random: u64) -> Duration {
        let grown = DELAY_MIN.saturating_mul(1 << self.attempt.min(DOUBLINGS_MAX));
        self.attempt = self.attempt.saturating_add(1);
        let full = match advice {
            Advice::Retry => grown.min(self.delay_max),
            Advice::RetryLater => grown.min(self.delay_max).max(REFUSED_DELAY_MIN * 2),
            Advice::TellAHuman => LOOK_AGAIN_INTERVAL,
        };
        let permille = 500 + u32::try_from(random % 501).unwrap_or(0);
        full * permille / 1000
    }
}

/// Delay after a first failure.
const DELAY_MIN: Duration = Duration::from_millis(100);

/// The delay doubles at most so often; 100 ms become 27 minutes, which `delay_max` has cut long before.
const DOUBLINGS_MAX: u32 = 14;

/// How often a condition is looked at again that only a person can end.
const LOOK_AGAIN_INTERVAL: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_up_to_their_bound_and_are_spread_over_the_upper_half() {
        let delay_max = Duration::from_secs(5);
        for random in 0..2000 {
            let mut backoff = Backoff::new(delay_max);
            let delays: Vec<Duration> = (0..40).map(|_| backoff.next_delay(Advice::Retry, random)).collect();
            assert!(delays.is_sorted());
            assert!(delays[0] >= DELAY_MIN / 2 && delays[0] <= DELAY_MIN);
            assert!(delays[39] >= delay_max / 2 && delays[39] <= delay_max);
            backoff.reset();
            assert_eq!(backoff.next_delay(Advice::Retry, random), delays[0]);
        }
    }

    #[test]
    fn a_server_that_said_no_is_left_alone_for_a_second() {
        for random in 0..2000 {
            let mut backoff = Backoff::new(Duration::from_millis(10));
            assert!(backoff.next_delay(Advice::RetryLater, random) >= REFUSED_DELAY_MIN);
        }
    }
}
