//! Hot standby feedback: what the standbys behind us still read, told upstream as one.
//!
//! Owns the smallest of what they hold back, in 64 bits, and when it is told: at once at the beginning of a session, soon when
//! it has changed, and again from time to time. Takes nothing from a standby that the primary would ignore, because one bad
//! value would then cover the good ones. Asks nobody and sends nothing.

use std::time::{Duration, Instant};

use crate::protocol::replication::HotStandbyFeedback;
use crate::wal::{FullXid, PgTimestamp};

/// What somebody holds back; nothing by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Feedback {
    /// Oldest transaction whose rows may still be read.
    pub xmin: Option<FullXid>,
    /// The same for catalogs.
    pub catalog_xmin: Option<FullXid>,
}

/// Who tells what is held back by all.
pub trait Feedbacks: Send + Sync {
    /// The smallest of it.
    fn smallest(&self) -> Feedback;
}

impl Feedback {
    /// What a standby says.
    pub fn of(message: &HotStandbyFeedback) -> Self {
        Self {
            xmin: FullXid::new(message.xmin_epoch, message.xmin),
            catalog_xmin: FullXid::new(message.catalog_epoch, message.catalog_xmin),
        }
    }

    /// The message that says it.
    pub fn message(self, sent_at: PgTimestamp) -> HotStandbyFeedback {
        let halves = |id: Option<FullXid>| id.map_or((0, 0), |id| (id.xid(), id.epoch()));
        let ((xmin, xmin_epoch), (catalog_xmin, catalog_epoch)) =
            (halves(self.xmin), halves(self.catalog_xmin));
        HotStandbyFeedback { sent_at, xmin, xmin_epoch, catalog_xmin, catalog_epoch }
    }

    /// Whether nothing is held back.
    pub fn is_off(self) -> bool {
        self == Self::default()
    }

    /// Whether the primary, which gives out `next` next, would take it (`TransactionIdInRecentPast`); unknown is believed.
    pub fn is_plausible(self, next: Option<FullXid>) -> bool {
        let is_recent = |id: FullXid| next.is_none_or(|next| id <= next && next.0 - id.0 < RECENT_XIDS);
        self.xmin.is_none_or(is_recent) && self.catalog_xmin.is_none_or(is_recent)
    }

    /// The smaller of the two, as a session without a slot holds it.
    pub fn smaller(self) -> Option<FullXid> {
        self.xmin.into_iter().chain(self.catalog_xmin).min()
    }

    /// What two hold back together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let smaller = |one: Option<FullXid>, other: Option<FullXid>| match (one, other) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        Self {
            xmin: smaller(self.xmin, other.xmin),
            catalog_xmin: smaller(self.catalog_xmin, other.catalog_xmin),
        }
    }

    /// What a slot keeps of it: each id only advances, unless it is withdrawn (`PhysicalReplicationSlotNewXmin`).
    #[must_use]
    pub fn advanced_to(self, said: Self) -> Self {
        let advanced = |kept: Option<FullXid>, said: Option<FullXid>| match (kept, said) {
            (Some(kept), Some(said)) => Some(kept.max(said)),
            (_, said) => said,
        };
        Self {
            xmin: advanced(self.xmin, said.xmin),
            catalog_xmin: advanced(self.catalog_xmin, said.catalog_xmin),
        }
    }
}

/// When feedback is told in one upstream session.
#[derive(Clone, Copy, Debug, Default)]
pub struct FeedbackSender {
    sent: Option<(Feedback, Instant)>,
}

impl FeedbackSender {
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
        let (told, at) = self.sent?;
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

/// An id further back than this cannot be told from one that is ahead.
const RECENT_XIDS: u64 = 1 << 31;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn feedback(xmin: u64, catalog_xmin: u64) -> Feedback {
        let id = |raw: u64| (raw > 0).then_some(FullXid(raw));
        Feedback { xmin: id(xmin), catalog_xmin: id(catalog_xmin) }
    }

    #[test]
    fn it_goes_over_the_wire_in_halves_and_below_the_first_id_is_nothing() {
        let said = feedback(0x7_0000_0123, 0);
        let message = said.message(PgTimestamp(1));
        assert_eq!((message.xmin, message.xmin_epoch, message.catalog_xmin), (0x123, 7, 0));
        assert_eq!(Feedback::of(&message), said);
        let odd = HotStandbyFeedback { xmin: 2, xmin_epoch: 9, ..message };
        assert!(Feedback::of(&odd).is_off());
    }

    #[test]
    fn the_smallest_is_found_over_the_end_of_an_epoch() {
        let before = feedback(0x1_FFFF_FFF0, 0);
        let after = feedback(0x2_0000_0010, 0x2_0000_0020);
        assert_eq!(before.and(after), feedback(0x1_FFFF_FFF0, 0x2_0000_0020));
        assert_eq!(after.and(Feedback::default()), after);
    }

    #[test]
    fn what_the_primary_would_ignore_is_not_taken() {
        let next = Some(FullXid(0x2_0000_0100));
        for good in [feedback(0x2_0000_0100, 0), feedback(0x1_FFFF_0000, 0x2_0000_0001), feedback(0, 0)] {
            assert!(good.is_plausible(next), "{good:?}");
            assert!(good.is_plausible(None));
        }
        for bad in [
            feedback(0x2_0000_0101, 0),
            feedback(0x3_0000_0001, 0),
            feedback(0x0_0000_0001 + 3, 0),
            feedback(0x2_0000_0001, 0x9_0000_0001),
        ] {
            assert!(!bad.is_plausible(next), "{bad:?}");
        }
    }

    #[test]
    fn a_slot_only_advances_until_it_is_withdrawn() {
        let kept = feedback(100, 50);
        assert_eq!(kept.advanced_to(feedback(90, 60)), feedback(100, 60));
        assert_eq!(kept.advanced_to(feedback(0, 60)), feedback(0, 60));
        assert_eq!(feedback(0, 0).advanced_to(feedback(7, 0)), feedback(7, 0));
    }

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
        let wanted = feedback(700, 0);
        let now = start + Duration::from_secs(200);
        assert_eq!(sender.poll(now, wanted), Some(wanted));
        assert_eq!(sender.due(wanted), Some(now + REPEAT_INTERVAL));
        assert_eq!(sender.poll(now, feedback(701, 0)), None, "not so soon");
        assert_eq!(sender.due(feedback(701, 0)), Some(now + CHANGE_INTERVAL_MIN));
        assert_eq!(sender.poll(now + CHANGE_INTERVAL_MIN, feedback(701, 0)), Some(feedback(701, 0)));
        let later = now + Duration::from_secs(5);
        assert_eq!(sender.poll(later, Feedback::default()), Some(Feedback::default()), "nobody is left");
        assert_eq!(sender.poll(later + Duration::from_secs(50), Feedback::default()), None);
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
                let next = feedback(xmin * 5, catalog_xmin * 7);
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
