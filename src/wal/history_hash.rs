//! A number that stands for a timeline's history.
//!
//! A timeline's number may stand for two histories, and then (timeline, position) for two different bytes. Whoever gives WAL
//! from one place to another compares these numbers first. Made of the switch points alone: comments, reasons and blank
//! lines of a history file do not matter.

use std::fmt;
use std::num::NonZeroU64;

use aws_lc_rs::digest::{SHA256, digest};

use crate::wal::TimelineHistory;

/// The first 64 bits of a SHA-256 over a timeline and all its ancestors with their switch points.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct HistoryHash(NonZeroU64);

impl HistoryHash {
    /// Of a history that is known whole.
    pub fn of(history: &TimelineHistory) -> Self {
        let mut text = DOMAIN.to_vec();
        for ancestor in history.ancestors() {
            text.extend(ancestor.timeline.get().to_be_bytes());
            text.extend(ancestor.switch_lsn.get().to_be_bytes());
        }
        text.extend(history.timeline().get().to_be_bytes());
        let hash = digest(&SHA256, &text);
        let first = hash.as_ref().first_chunk().copied().map_or(0, u64::from_be_bytes);
        // No hash is 0, which means on the wire that it is not known.
        Self(NonZeroU64::new(first).unwrap_or(NonZeroU64::MIN))
    }

    /// `None` for 0: the sender does not know the history.
    pub fn from_wire(raw: u64) -> Option<Self> {
        NonZeroU64::new(raw).map(Self)
    }

    /// 0 where it is not known.
    pub fn to_wire(hash: Option<Self>) -> u64 {
        hash.map_or(0, |hash| hash.0.get())
    }
}

impl fmt::Display for HistoryHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for HistoryHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Nothing else that is hashed begins so.
const DOMAIN: &[u8] = b"walrelay timeline history 1\0";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::TimelineId;

    fn hash(timeline: u32, content: &[u8]) -> HistoryHash {
        HistoryHash::of(&TimelineHistory::parse(TimelineId::new(timeline).unwrap(), content).unwrap())
    }

    #[test]
    fn switch_points_alone_matter() {
        let plain = hash(3, b"1\t0/5000158\tno recovery target specified\n\n2\t0/60000A0\tx\n");
        assert_eq!(plain, hash(3, b"# by hand\n1 0/5000158\n2\t0/60000A0\tanother reason\n"));
        for other in [
            hash(4, b"1\t0/5000158\t\n2\t0/60000A0\t\n"),
            hash(3, b"1\t0/5000159\t\n2\t0/60000A0\t\n"),
            hash(3, b"1\t0/5000158\t\n"),
            hash(3, b""),
            HistoryHash::of(&TimelineHistory::of_first()),
        ] {
            assert_ne!(plain, other);
        }
    }

    /// It stands in messages and names that other versions read.
    #[test]
    fn the_number_stays_what_it_is() {
        let first = HistoryHash::of(&TimelineHistory::of_first());
        let third = hash(3, b"1\t0/5000158\t\n2\t0/60000A0\t\n");
        assert_eq!([first.to_string(), third.to_string()], ["8a59564eed9382ec", "0e912c26110147eb"]);
        assert_eq!(HistoryHash::from_wire(HistoryHash::to_wire(Some(first))), Some(first));
        assert_eq!(HistoryHash::from_wire(HistoryHash::to_wire(None)), None);
    }
}
