//! How much received WAL is gathered before it is handed to the store.
//!
//! Owns one decision: while the upstream is far ahead, nobody waits for the newest byte, and every hand-over, sync and
//! report costs the same for a little WAL as for much; close to its end each byte may be a commit that somebody waits
//! for. Never holds WAL back for longer than [`GATHER_TIME_MAX`].

use std::time::{Duration, Instant};

use crate::wal::Lsn;

/// What to do with what was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandOver {
    /// Keep it for now; there is a deadline.
    Wait,
    /// Hand it over; much more comes, so the sync may wait for that.
    MoreFollows,
    /// Hand it over, and let all of it become durable now.
    Now,
}

/// Whether anybody may wait for the newest byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Each byte may be a commit that somebody waits for.
    Streaming,
    /// The upstream is far ahead.
    CatchingUp,
}

/// Decides when to hand over.
#[derive(Debug)]
pub struct Gathering {
    /// End of WAL on the upstream, as far as it has told.
    upstream_end: Lsn,
    /// Arrival of the first byte that is not handed over, or whose sync may still wait.
    since: Option<Instant>,
    /// Bytes that are not handed over.
    bytes: u64,
    /// The upstream has asked how far we are.
    is_asked: bool,
    pace: Pace,
}

impl Gathering {
    /// Nothing was received.
    pub fn new() -> Self {
        Self { upstream_end: Lsn::MIN, since: None, bytes: 0, is_asked: false, pace: Pace::Streaming }
    }

    /// The upstream has WAL up to `end`.
    pub fn handle_upstream_end(&mut self, end: Lsn) {
        self.upstream_end = end;
    }

    /// End of WAL on the upstream, as far as it has told.
    pub fn upstream_end(&self) -> Lsn {
        self.upstream_end
    }

    /// The upstream wants an answer: what is there becomes durable at once.
    pub fn handle_question(&mut self) {
        self.is_asked = true;
    }

    /// `bytes` of WAL arrived.
    pub fn handle_received(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    /// What to do now, with `received` the end of WAL that arrived. To be called after each arrival and at the deadline.
    pub fn decide(&mut self, now: Instant, received: Lsn) -> HandOver {
        let is_far_behind = self.upstream_end.bytes_since(received) >= FAR_BEHIND_BYTES;
        self.pace = if is_far_behind { Pace::CatchingUp } else { Pace::Streaming };
        let since = *self.since.get_or_insert(now);
        if !is_far_behind || self.is_asked || now.saturating_duration_since(since) >= GATHER_TIME_MAX {
            (self.since, self.bytes, self.is_asked) = (None, 0, false);
            return HandOver::Now;
        }
        if self.bytes >= HAND_OVER_BYTES {
            self.bytes = 0;
            return HandOver::MoreFollows;
        }
        HandOver::Wait
    }

    /// As of the last decision.
    pub fn pace(&self) -> Pace {
        self.pace
    }

    /// When `decide` is to be called again, whatever arrives.
    pub fn deadline(&self) -> Option<Instant> {
        self.since.map(|since| since + GATHER_TIME_MAX)
    }
}

impl Default for Gathering {
    fn default() -> Self {
        Self::new()
    }
}

/// The upstream is far ahead when it has so much that has not arrived: more than any commit writes at once, and more than
/// arrives in [`GATHER_TIME_MAX`].
const FAR_BEHIND_BYTES: u64 = 16 << 20;

/// Handed over at once while the upstream is far ahead: some receive blocks, in one write.
const HAND_OVER_BYTES: u64 = 1 << 20;

/// Longest time that a byte waits here, or that its sync may wait for more.
pub const GATHER_TIME_MAX: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lsn(position: u64) -> Lsn {
        Lsn::new(position).unwrap()
    }

    #[test]
    fn close_to_the_end_nothing_waits() {
        let mut gathering = Gathering::new();
        let now = Instant::now();
        gathering.handle_upstream_end(lsn(100));
        for received in [40, 50, 100] {
            gathering.handle_received(10);
            assert_eq!(gathering.decide(now, lsn(received)), HandOver::Now);
            assert_eq!(gathering.deadline(), None);
        }
    }

    #[test]
    fn far_behind_it_gathers_and_ends_when_it_has_caught_up() {
        let mut gathering = Gathering::new();
        let now = Instant::now();
        gathering.handle_upstream_end(lsn(100 << 20));
        gathering.handle_received(HAND_OVER_BYTES - 1);
        assert_eq!(gathering.decide(now, lsn(HAND_OVER_BYTES)), HandOver::Wait);
        gathering.handle_received(1);
        assert_eq!(gathering.decide(now, lsn(HAND_OVER_BYTES + 1)), HandOver::MoreFollows);
        assert_eq!(gathering.deadline(), Some(now + GATHER_TIME_MAX), "the sync may still wait");
        assert_eq!(gathering.decide(now + GATHER_TIME_MAX, lsn(HAND_OVER_BYTES + 1)), HandOver::Now);
        gathering.handle_received(1);
        gathering.handle_question();
        assert_eq!(gathering.decide(now, lsn(HAND_OVER_BYTES + 2)), HandOver::Now, "asked for");
        gathering.handle_received(1);
        assert_eq!(gathering.decide(now, lsn(HAND_OVER_BYTES + 3)), HandOver::Wait, "answered");
        gathering.handle_received(1);
        assert_eq!(gathering.decide(now, lsn((100 << 20) - FAR_BEHIND_BYTES + 1)), HandOver::Now);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever arrives when: no byte waits longer than it may for its hand-over or for a sync that is not delayed.
        #[test]
        fn no_byte_waits_for_long(
            arrivals in proptest::collection::vec((0_u64..20_000, 1_u64..2_000_000, 0_u64..64 << 20), 1..60),
        ) {
            let mut gathering = Gathering::new();
            let mut now = Instant::now();
            let mut received = 1 << 20;
            // Arrival of the oldest byte that was not handed over with `Now`.
            let mut oldest: Option<Instant> = None;
            for (micros, bytes, ahead) in arrivals {
                let next = now + Duration::from_micros(micros);
                if let Some(deadline) = gathering.deadline().filter(|deadline| *deadline <= next) {
                    prop_assert_eq!(gathering.decide(deadline, lsn(received)), HandOver::Now);
                    prop_assert!(oldest.is_some_and(|oldest| deadline - oldest <= GATHER_TIME_MAX));
                    oldest = None;
                }
                now = next;
                received += bytes;
                gathering.handle_upstream_end(lsn(received + ahead));
                gathering.handle_received(bytes);
                oldest.get_or_insert(now);
                if gathering.decide(now, lsn(received)) == HandOver::Now {
                    oldest = None;
                }
                prop_assert_eq!(gathering.deadline().is_some(), oldest.is_some());
            }
        }
    }
}
