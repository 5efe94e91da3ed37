//! What hot standby feedback says, in whole transaction ids.
//!
//! Owns the arithmetic: what several hold back together, what a slot keeps of it, and what the primary would ignore, which
//! must not be taken from a standby, because one bad value would then cover the good ones.

use serde::{Deserialize, Serialize};

use crate::protocol::replication::HotStandbyFeedback;
use crate::wal::{FullXid, PgTimestamp};

/// What somebody holds back; nothing by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Feedback {
    /// Oldest transaction whose rows may still be read.
    pub xmin: Option<FullXid>,
    /// The same for catalogs.
    pub catalog_xmin: Option<FullXid>,
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

/// An id further back than this cannot be told from one that is ahead.
const RECENT_XIDS: u64 = 1 << 31;

#[cfg(test)]
impl Feedback {
    /// From raw ids; 0 is none.
    pub(crate) fn from_raw(xmin: u64, catalog_xmin: u64) -> Self {
        let id = |raw: u64| (raw > 0).then_some(FullXid(raw));
        Self { xmin: id(xmin), catalog_xmin: id(catalog_xmin) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_over_the_wire_in_halves_and_below_the_first_id_is_nothing() {
        let said = Feedback::from_raw(0x7_0000_0123, 0);
        let message = said.message(PgTimestamp(1));
        assert_eq!((message.xmin, message.xmin_epoch, message.catalog_xmin), (0x123, 7, 0));
        assert_eq!(Feedback::of(&message), said);
        let odd = HotStandbyFeedback { xmin: 2, xmin_epoch: 9, ..message };
        assert!(Feedback::of(&odd).is_off());
    }

    #[test]
    fn the_smallest_is_found_over_the_end_of_an_epoch() {
        let before = Feedback::from_raw(0x1_FFFF_FFF0, 0);
        let after = Feedback::from_raw(0x2_0000_0010, 0x2_0000_0020);
        assert_eq!(before.and(after), Feedback::from_raw(0x1_FFFF_FFF0, 0x2_0000_0020));
        assert_eq!(after.and(Feedback::default()), after);
    }

    #[test]
    fn what_the_primary_would_ignore_is_not_taken() {
        let next = Some(FullXid(0x2_0000_0100));
        for good in [
            Feedback::from_raw(0x2_0000_0100, 0),
            Feedback::from_raw(0x1_FFFF_0000, 0x2_0000_0001),
            Feedback::from_raw(0, 0),
        ] {
            assert!(good.is_plausible(next), "{good:?}");
            assert!(good.is_plausible(None));
        }
        for bad in [
            Feedback::from_raw(0x2_0000_0101, 0),
            Feedback::from_raw(0x3_0000_0001, 0),
            Feedback::from_raw(0x0_0000_0001 + 3, 0),
            Feedback::from_raw(0x2_0000_0001, 0x9_0000_0001),
        ] {
            assert!(!bad.is_plausible(next), "{bad:?}");
        }
    }

    #[test]
    fn a_slot_only_advances_until_it_is_withdrawn() {
        let kept = Feedback::from_raw(100, 50);
        assert_eq!(kept.advanced_to(Feedback::from_raw(90, 60)), Feedback::from_raw(100, 60));
        assert_eq!(kept.advanced_to(Feedback::from_raw(0, 60)), Feedback::from_raw(0, 60));
        assert_eq!(Feedback::from_raw(0, 0).advanced_to(Feedback::from_raw(7, 0)), Feedback::from_raw(7, 0));
    }
}
