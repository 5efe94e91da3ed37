//! What our slot makes the upstream keep.
//!
//! Owns the one figure by which an operator sees that the relay fills the primary's disk. As far as the upstream has told: while
//! there is no stream it grows unseen, but for the looks of `slot_cost`.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::metrics::{UpstreamMetrics, bytes_value};
use crate::wal::Lsn;

/// WAL that the upstream keeps for our slot. Told by the stream, and by what moves the slot beside it.
pub(super) struct Retained {
    /// Where the slot is; 0 until it is known (servers before 15 do not tell it).
    slot: AtomicU64,
    upstream_end: AtomicU64,
    mover: SlotMover,
    metrics: UpstreamMetrics,
}

/// What moves the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotMover {
    /// The flush positions that are reported on the stream.
    Reports,
    /// SQL, to what is durable here.
    Sql,
}

impl Retained {
    pub(super) fn new(
        slot: Option<Lsn>,
        upstream_end: Lsn,
        mover: SlotMover,
        metrics: UpstreamMetrics,
    ) -> Self {
        let retained = Self {
            slot: AtomicU64::new(slot.map_or(0, Lsn::get)),
            upstream_end: AtomicU64::new(upstream_end.get()),
            mover,
            metrics,
        };
        retained.publish();
        retained
    }

    /// What moves the slot.
    pub(super) fn mover(&self) -> SlotMover {
        self.mover
    }

    /// The upstream told how far it is.
    pub(super) fn note_upstream_end(&self, end: Lsn) {
        self.upstream_end.fetch_max(end.get(), Relaxed);
        self.publish();
    }

    /// A flush position goes to the upstream, which moves the slot of the stream there, forward or back.
    pub(super) fn note_reported(&self, flush: Lsn) {
        if self.mover == SlotMover::Reports {
            self.slot.store(flush.get(), Relaxed);
            self.publish();
        }
    }

    /// SQL has moved the slot there: not what was asked for, but what the upstream said.
    pub(super) fn note_moved(&self, reached: Lsn) {
        if self.mover == SlotMover::Sql {
            self.slot.store(reached.get(), Relaxed);
            self.publish();
        }
    }

    fn publish(&self) {
        let (slot, end) = (self.slot.load(Relaxed), self.upstream_end.load(Relaxed));
        // What was told of another server, or of a slot that is gone, says nothing of this one.
        let retained = if slot == 0 { 0 } else { end.saturating_sub(slot) };
        self.metrics.slot_retained.set(bytes_value(retained));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::AllMetrics;

    #[test]
    fn it_is_what_lies_between_the_slot_and_the_upstreams_end() {
        let lsn = |raw| Lsn::new(raw).unwrap();
        let all = AllMetrics::default();
        let shown = || {
            let text = all.registry.render();
            let value =
                |line: &str| line.strip_prefix("walrelay_upstream_slot_retained_bytes ")?.parse().ok();
            text.lines().find_map(value).unwrap_or(-1.0)
        };
        let retained = Retained::new(None, lsn(5000), SlotMover::Reports, all.upstream.clone());
        assert_eq!(shown(), 0.0);
        retained.note_reported(lsn(1000));
        assert_eq!(shown(), 4000.0);
        retained.note_upstream_end(lsn(9000));
        retained.note_upstream_end(lsn(8000));
        assert_eq!(shown(), 8000.0);
        retained.note_reported(lsn(500));
        assert_eq!(shown(), 8500.0);
        // One ahead of what was heard leaves nothing.
        retained.note_reported(lsn(9500));
        assert_eq!(shown(), 0.0);
        retained.note_moved(lsn(2000));
        assert_eq!(shown(), 0.0, "the stream moves it");
        let retained = Retained::new(Some(lsn(1000)), lsn(5000), SlotMover::Sql, all.upstream.clone());
        assert_eq!(shown(), 4000.0);
        retained.note_reported(lsn(4000));
        assert_eq!(shown(), 4000.0, "what is reported does not move it");
        retained.note_moved(lsn(2000));
        assert_eq!(shown(), 3000.0);
        let _retained = Retained::new(None, lsn(5000), SlotMover::Sql, all.upstream.clone());
        assert_eq!(shown(), 0.0, "this server does not tell");
    }
}
