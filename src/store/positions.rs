//! How far the store is, by four meanings.
//!
//! Owns the positions of the current timeline and their order. They only move forward, but for the moment in which another
//! timeline is gone over to; a broken order is a bug here and stops the store.

use crate::wal::{Lsn, TimelineId};

/// How far the store is. Every one is a place where a stream may be cut: the end of a record, or within the zeros after
/// XLOG_SWITCH the end of a page. `sealed <= flushed <= written <= verified`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Positions {
    /// The timeline that is received.
    pub timeline: TimelineId,
    /// Proved to be valid WAL, and readable.
    pub verified: Lsn,
    /// Given to the operating system; may be lost when the power fails.
    pub written: Lsn,
    /// On stable storage. The only one that may be reported upstream as flushed.
    pub flushed: Lsn,
    /// End of the newest complete segment.
    pub sealed: Option<Lsn>,
}

impl Positions {
    pub(super) fn at(timeline: TimelineId, end: Lsn, sealed: Option<Lsn>) -> Self {
        Self { timeline, verified: end, written: end, flushed: end, sealed }
    }

    pub(super) fn assert_order(self, before: Self) {
        assert!(before.verified <= self.verified, "verified went back: {before:?}, {self:?}");
        assert!(before.written <= self.written, "written went back: {before:?}, {self:?}");
        assert!(before.flushed <= self.flushed, "flushed went back: {before:?}, {self:?}");
        assert!(before.sealed <= self.sealed, "sealed went back: {before:?}, {self:?}");
        let is_ordered = self.sealed.is_none_or(|sealed| sealed <= self.flushed)
            && self.flushed <= self.written
            && self.written <= self.verified;
        assert!(is_ordered, "positions out of order: {self:?}");
    }
}
