//! Hot standby feedback: what the standbys behind us still read, told upstream as one.
//!
//! Owns the smallest of what they hold back, in 64 bits, and when it is told: at once at the beginning of a session, soon when
//! it has changed, and again from time to time. Just after the start of the relay a slot's memory is not overwritten: the
//! standbys it stands for are still coming back. Asks nobody and sends nothing.

use std::time::{Duration, Instant};

use crate::protocol::feedback::Feedback;

/// Who tells what is held back by all.
pub trait Feedbacks: Send + Sync {
    /// The smallest of it.
    fn smallest(&self) -> Feedback;

    /// Until then standbys that were there before this process began may not have come back.
    fn complete_from(&self) -> Instant;
}

/// When feedback is told in one upstream session.
#[derive(Clone, Copy, Debug, Default)]
pub struct FeedbackSender {
    /// Nothing is told before.
    silent_until: Option<Instant>,
    sent: Option<(Feedback, Instant)>,
}

impl FeedbackSender {
    /// One that says nothing before `silent_until`: the slot that the session streams by keeps what was told by it before.
    pub fn silent_until(silent_until: Option<Instant>) -> Self {
        Self { silent_until, sent: None }
    }

    /// What to tell now, if anything; it counts as told.
    pub fn poll(&mut self, now: Instant, wanted: Feedback) -> Option<Feedback> {
        if self.due(wanted).is_some_and(|due| now < due) || self.is_settled(wanted) {
            return None;
        }
        self.sent = Some((wanted, now));
        Some(wanted)
    }

    /// When [`Self::poll`] has something to tell, if nothing changes; `None`: at once, or never again.
    pub fn due(&self, wanted: Feedback) -> Option<Instant> {
        let Some((told, at)) = self.sent else { return self.silent_until };
        (!self.is_settled(wanted)).then_some(())?;
        Some(at + if told == wanted { REPEAT_INTERVAL } else { CHANGE_INTERVAL_MIN })
    }

    /// That nothing is held back is told once: it clears what was said before.
    fn is_settled(&self, wanted: Feedback) -> bool {
        wanted.is_off() && self.sent.is_some_and(|(told, _)| told.is_off())
    }
}

/// Changes are told at most so often.
pub const CHANGE_INTERVAL_MIN: Duration = Duration::from_secs(1);

/// What has not changed is told again after this time, as by a standby with the default `wal_receiver_status_interval`.
const REPEAT_INTERVAL: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_session_begins_with_it_and_off_is_said_once() {
        let mut sender = FeedbackSender::default();
        let start = Instant::now();
        assert_eq!(
            sender.poll(start, Feedback::default()),
            Some(Feedback::default()),
            "clears what was before"
        );
        for seconds in [0, 1, 100] {
            assert_eq!(sender.poll(start + Duration::from_secs(seconds), Feedback::default()), None);
        }
        assert_eq!(sender.due(Feedback::default()), None);
        let wanted = Feedback::from_raw(700, 0);
        let now = start + Duration::from_secs(200);
        assert_eq!(sender.poll(now, wanted), Some(wanted));
        assert_eq!(sender.due(wanted), Some(now + REPEAT_INTERVAL));
        assert_eq!(sender.poll(now, Feedback::from_raw(701, 0)), None, "not so soon");
        assert_eq!(sender.due(Feedback::from_raw(701, 0)), Some(now + CHANGE_INTERVAL_MIN));
        assert_eq!(
            sender.poll(now + CHANGE_INTERVAL_MIN, Feedback::from_raw(701, 0)),
            Some(Feedback::from_raw(701, 0))
        );
        let later = now + Duration::from_secs(5);
        assert_eq!(sender.poll(later, Feedback::default()), Some(Feedback::default()), "nobody is left");
        assert_eq!(sender.poll(later + Duration::from_secs(50), Feedback::default()), None);
    }

    #[test]
    fn what_a_slot_holds_back_stays_until_standbys_had_time_to_come_back() {
        let start = Instant::now();
        let until = start + Duration::from_secs(15);
        let mut sender = FeedbackSender::silent_until(Some(until));
        let one = Feedback::from_raw(700, 0);
        for (seconds, wanted) in [(0, Feedback::default()), (5, one)] {
            let now = start + Duration::from_secs(seconds);
            assert_eq!(sender.poll(now, wanted), None, "another may need older rows");
            assert_eq!(sender.due(wanted), Some(until));
        }
        assert_eq!(sender.poll(until, one), Some(one));
        assert_eq!(sender.due(one), Some(until + REPEAT_INTERVAL));
        let mut nobody = FeedbackSender::silent_until(Some(until));
        assert_eq!(nobody.poll(until, Feedback::default()), Some(Feedback::default()), "nobody came back");
        assert_eq!(nobody.due(Feedback::default()), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// Whatever happens: what was told last is what is wanted, or will be within the interval; never told more often than
        /// that, and what holds something back is told again in time.
        #[test]
        fn what_is_wanted_is_told_in_time_and_not_more_often(
            steps in prop::collection::vec((0_u64..4_000, 0_u64..4, 0_u64..3), 1..60),
        ) {
            let start = Instant::now();
            let (mut now, mut sender) = (start, FeedbackSender::default());
            let (mut told, mut told_at, mut changed_at) = (None, None, start);
            let mut wanted = Feedback::default();
            for (milliseconds, xmin, catalog_xmin) in steps {
                now += Duration::from_millis(milliseconds);
                let next = Feedback::from_raw(xmin * 5, catalog_xmin * 7);
                if next != wanted {
                    (wanted, changed_at) = (next, now);
                }
                if let Some(said) = sender.poll(now, wanted) {
                    prop_assert_eq!(said, wanted);
                    prop_assert!(told_at.is_none_or(|at| now >= at + CHANGE_INTERVAL_MIN));
                    (told, told_at) = (Some(said), Some(now));
                }
                let is_late = now >= changed_at + CHANGE_INTERVAL_MIN;
                prop_assert!(told == Some(wanted) || !is_late || told_at > Some(changed_at));
                prop_assert!(wanted.is_off() || told_at.is_some_and(|at| now < at + REPEAT_INTERVAL));
            }
        }
    }
}
